"""The report on several runs: their curves over one another, and where their configs differ."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from theworld_train.report.blocks import Block, Chart, Facts, Figures, Note, Report, Section, Series, Table
from theworld_train.report.evaluation import (
    SHARES,
    ablations,
    interval_text,
    main_share,
    measured,
    share_names,
    variant_name,
)
from theworld_train.report.files import flat, part
from theworld_train.report.run import Points, RunRecord, curve
from theworld_train.report.run_sections import describe, settled, value_text
from theworld_train.report.words import ABSENT, LOSS_UNIT, STEP, count, duration, finite, number, share, short, size

#: Keys that differ by where runs are written, and say nothing of what they do.
PLACES = frozenset({"name", "output_dir", "resume"})


def comparison_report(runs: Sequence[RunRecord]) -> Report:
    """Returns the report on several runs."""
    names = _names(runs)
    about = "; ".join(f"{name}: {describe(run)}" for name, run in zip(names, runs, strict=True))
    sections = [_results(names, runs), _differences(names, runs), _curves(names, runs)]
    evaluated = [(name, run) for name, run in zip(names, runs, strict=True) if ablations(run.evaluation)]
    if evaluated:
        sections.append(_ablations(evaluated))
    title = " / ".join(names) if len(names) < 5 else f"{len(names)} runs"
    return Report("comparison", title, f"Runs compared. {about}.", sections)


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the names of runs, or what tells their directories apart where names are equal."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    paths = [run.directory.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({index})" for index, name in enumerate(names, start=1)]


def _results(names: Sequence[str], runs: Sequence[RunRecord]) -> Section:
    rows = []
    for name, run in zip(names, runs, strict=True):
        losses = finite([number(row, "train/loss") for row in run.steps])
        last = run.evals[-1] if run.evals else {}
        times = settled(run, "time/step_s")
        step = statistics.median(times) if times else None
        samples = number(flat(run.config), "training.global_batch_size")
        rows.append(
            (
                name,
                f"{run.last_step:,}",
                short(losses[-1]) if losses else ABSENT,
                short(number(last, "eval/loss")),
                *(share(number(last, f"eval/{which}")) for which in _shares(runs)),
                short(step),
                ABSENT if not step or samples is None else short(samples / step),
                size(number(run.resources or {}, "memory/peak_bytes")),
                duration(sum(finite([number(row, "time/step_s") for row in run.steps]))),
                count(sum(number(row, "train/skipped") or 0 for row in run.steps)),
            )
        )
    shares = (f"held out, {SHARES.get(which, which)}" for which in _shares(runs))
    header = (
        "run",
        "steps",
        "last loss",
        "held-out loss",
        *shares,
        "s/step",
        "samples/s",
        "peak memory",
        "in steps",
        "skipped",
    )
    blocks: list[Block] = [Table(header, tuple(rows))]
    blocks += [
        Note(f"{name}: {remark}", warns=True) for name, run in zip(names, runs, strict=True) for remark in run.remarks
    ]
    blocks += [
        Note(f"{name} holds no optimizer step.", warns=True)
        for name, run in zip(names, runs, strict=True)
        if not run.steps
    ]
    return Section("Results", blocks)


def _shares(runs: Sequence[RunRecord]) -> list[str]:
    """Returns the shares over all kinds that any run has measured."""
    keys = dict.fromkeys(key for run in runs for row in run.evals[-1:] for key in row if key.count("/") == 1)
    return share_names(keys)


def _differences(names: Sequence[str], runs: Sequence[RunRecord]) -> Section:
    """Returns where the configs differ."""
    settings = [flat(run.config) for run in runs]
    if not all(settings):
        absent = ", ".join(name for name, found in zip(names, settings, strict=True) if not found)
        return Section("Differences of the configs", [Note(f"There is no config of {absent}.", warns=True)])
    keys = sorted({key for each in settings for key in each})
    rows = [
        (key, *(value_text(key, each[key]) if key in each else ABSENT for each in settings))
        for key in keys
        if key not in PLACES and len({value_text(key, each.get(key)) for each in settings}) > 1
    ]
    if not rows:
        return Section("Differences of the configs", [Note("But for where they write, the configs are the same.")])
    columns = frozenset(range(1, len(names) + 1))
    alike = len(keys) - len(rows)
    return Section(
        "Differences of the configs",
        [Table(("key", *names), tuple(rows), texts=columns), Facts((("keys that agree", f"{alike:,}"),))],
    )


def _curves(names: Sequence[str], runs: Sequence[RunRecord]) -> Section:
    """Returns the charts in which the runs lie over one another."""

    def over(title: str, unit: str, points: Callable[[RunRecord], Points], *, log: bool = False) -> Chart:
        series = (Series(name, points(run)) for name, run in zip(names, runs, strict=True))
        return Chart(title, STEP, unit, tuple(each for each in series if each.points), may_be_log=log)

    def held_out(title: str, unit: str, key: str, *, log: bool = False) -> Chart:
        series = (Series(name, curve(run.evals, key), dotted=True) for name, run in zip(names, runs, strict=True))
        return Chart(title, STEP, unit, tuple(each for each in series if each.points), may_be_log=log)

    def rate(run: RunRecord) -> Points:
        samples = number(flat(run.config), "training.global_batch_size")
        return tuple((step, samples / took) for step, took in run.curve("time/step_s") if samples and took > 0)

    charts = [
        over("Training loss", LOSS_UNIT, lambda run: run.curve("train/loss"), log=True),
        held_out("Held-out loss", LOSS_UNIT, "eval/loss", log=True),
        *(
            held_out(f"Held out: {SHARES.get(which, which)}", "share of samples", f"eval/{which}")
            for which in _shares(runs)
        ),
        over("Gradient norm before clipping", "norm", lambda run: run.curve("train/grad_norm"), log=True),
        over("Samples", "samples/s", rate),
        over("Time of a step", "seconds", lambda run: run.curve("time/step_s")),
    ]
    return Section("Curves", [Figures(tuple(chart for chart in charts if chart.series))])


def _ablations(evaluated: Sequence[tuple[str, RunRecord]]) -> Section:
    """Returns the variants of all runs in one table."""
    results = {name: ablations(run.evaluation) for name, run in evaluated}
    chosen = main_share(next(iter(next(iter(results.values())).values())))
    kinds = list(
        dict.fromkeys(kind for found in results.values() for each in found.values() for kind in measured(each))
    )
    rows = tuple(
        (
            variant_name(variant),
            name,
            *(interval_text(part(measured(found[variant]).get(kind, {}), chosen), share) for kind in kinds),
        )
        for variant in dict.fromkeys(variant for found in results.values() for variant in found)
        for name, found in results.items()
        if variant in found
    )
    title = f"Held-out samples {SHARES[chosen]}, with 95% intervals"
    return Section("Ablations", [Table(("variant", "run", *kinds), rows, title, texts=frozenset({1}))])
