"""The report on a sweep: its trials over parallel axes, what mattered, and the best one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from theworld_train.report.blocks import (
    Axis,
    Bar,
    Bars,
    Block,
    Chart,
    Facts,
    Figures,
    Line,
    Note,
    Parallel,
    Report,
    Section,
    Series,
    Table,
)
from theworld_train.report.files import flat, items, objects, part, read_json, read_yaml
from theworld_train.report.run_sections import value_text
from theworld_train.report.scale import Scale, tick_text
from theworld_train.report.words import ABSENT, STEP, count, counted, duration, finite, number, share, short

SWEEP_FILE = "sweep.json"
FORMAT = 1
#: Trials whose values over the steps are drawn, the best ones.
CURVES = 8
#: States of trials that may still change.
OPEN_STATES = ("running", "interrupted")


@dataclass(frozen=True)
class SweepRecord:
    """What a sweep's directory holds.

    Attributes:
        directory: The directory.
        sweep: `sweep.json`.
        trials: Its trials in the order of their numbers.
        best_config: Keys and values of the best trial's config, empty if there is none.
        base: Those of the config that all trials were made from, empty if it is missing.
        remarks: What was damaged and left out.
    """

    directory: Path
    sweep: Mapping[str, Any]
    trials: tuple[dict[str, Any], ...]
    best_config: Mapping[str, Any]
    base: Mapping[str, Any]
    remarks: tuple[str, ...]

    @property
    def metric(self) -> str:
        """The metric that trials are judged by."""
        return str(self.sweep.get("metric") or "value")

    @property
    def minimizes(self) -> bool:
        """Whether a smaller value is better."""
        return self.sweep.get("direction") != "maximize"

    @property
    def best(self) -> dict[str, Any] | None:
        """The best trial, if any is complete."""
        return next((trial for trial in self.trials if trial.get("number") == self.sweep.get("best")), None)

    @property
    def keys(self) -> list[str]:
        """The keys that were searched, the ones that mattered most first."""
        return sorted(part(self.sweep, "space"), key=lambda key: -(self.importance.get(key) or 0.0))

    @property
    def importance(self) -> dict[str, float]:
        """What share of the result's variance each key explains."""
        found = part(self.sweep, "importance")
        return {key: value for key in found if (value := number(found, key)) is not None and math.isfinite(value)}


def is_sweep(directory: Path) -> bool:
    """Whether a directory is that of a sweep."""
    return (directory / SWEEP_FILE).is_file()


def read_sweep(directory: Path) -> SweepRecord:
    """Reads a sweep's directory; what is missing or damaged is left out, and what is damaged is said."""
    remarks: list[str] = []
    sweep = read_json(directory / SWEEP_FILE, remarks) or {}
    if sweep and sweep.get("format") != FORMAT:
        remarks.append(f"{SWEEP_FILE} is of format {sweep.get('format')!r}, and this version reads format {FORMAT}.")
        sweep = {}
    trials = tuple(
        {**trial, "number": int(place), "values": part(trial, "values")}
        for trial in objects(sweep, "trials")
        if (place := number(trial, "number")) is not None and math.isfinite(place)
    )
    trials = tuple(sorted(trials, key=lambda trial: trial["number"]))
    best = next((trial for trial in trials if trial.get("number") == sweep.get("best")), None)
    config = _settings(_inside(directory, best.get("directory"), "config.yaml"), remarks) if best else {}
    base = _settings(_inside(directory, sweep.get("base")), remarks) if sweep.get("base") else {}
    return SweepRecord(directory, sweep, trials, config, base, tuple(remarks))


def _settings(path: Path, remarks: list[str]) -> dict[str, Any]:
    """Returns a config as dotted keys; of a pipeline also those of the stages beside it, as `stages.NAME.KEY`."""
    settings = flat(read_yaml(path, remarks))
    for stage in sorted((path.parent / "stages").glob("*.yaml")):
        config = read_yaml(stage, remarks)
        settings |= {f"stages.{config.get('name')}.{key}": value for key, value in flat(config).items()}
    return settings


def _inside(directory: Path, *parts: object) -> Path:
    """Returns a path that a record names, if it lies in the sweep's directory; else one that does not exist."""
    path = directory.joinpath(*(str(part) for part in parts))
    return path if path.resolve().is_relative_to(directory.resolve()) else directory / "outside"


def sweep_report(record: SweepRecord) -> Report:
    """Returns the report on a sweep."""
    states = Counter(str(trial.get("state")) for trial in record.trials)
    said = ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in states.most_common())
    about = f"Sweep of {counted(len(record.trials), 'trial')}" + (f": {said}." if said else ".")
    sections = [_overview(record, states)]
    if record.trials:
        sections += [_best(record), _search(record), _trials(record)]
    return Report("sweep", str(record.sweep.get("name") or record.directory.resolve().name), about, sections)


def _overview(record: SweepRecord, states: Counter[str]) -> Section:
    sweep = record.sweep
    wanted = number(sweep, "trials_wanted")
    best = record.best
    rows = [
        ("trials", f"{len(record.trials):,}" + ("" if wanted is None else f" of {count(wanted)}")),
        ("search", str(sweep.get("search", ABSENT))),
        ("pruning", str(sweep.get("pruner", ABSENT))),
        ("judged by", f"{record.metric}, the {'smallest' if record.minimizes else 'largest'}" + _stage(sweep)),
        ("best value", short(number(best, "value")) + f" (trial {best['number']})" if best else ABSENT),
        ("time of all trials", duration(sum(finite([number(trial, "seconds") for trial in record.trials])))),
        ("launches", count(sum(number(trial, "launches") or 0 for trial in record.trials))),
    ]
    blocks: list[Block] = [Facts(tuple(rows)), *(Note(remark, warns=True) for remark in record.remarks)]
    if not record.trials:
        blocks.append(
            Note("No trial has begun. To go on with the sweep:", f"theworld-train sweep resume {record.directory}")
        )
    elif any(states[state] for state in OPEN_STATES) or (wanted is not None and len(record.trials) < wanted):
        blocks.append(
            Note("Not finished. If nobody is at work on it:", f"theworld-train sweep resume {record.directory}")
        )
    return Section("Overview", blocks)


def _stage(sweep: Mapping[str, Any]) -> str:
    return f", of the stage {sweep['stage']}" if sweep.get("stage") else ""


def _best(record: SweepRecord) -> Section:
    best = record.best
    if best is None:
        return Section("Best trial", [Note("No trial is complete, so there is no best one.")])
    values, base = best["values"], record.base
    rows = tuple(
        (key, value_text(key, values.get(key)), value_text(key, base[key]) if key in base else ABSENT)
        for key in record.keys
    )
    directory = f"{record.directory}/{best.get('directory')}"
    facts = (
        ("trial", str(best["number"])),
        (record.metric, short(number(best, "value"))),
        ("config", f"{directory}/config.yaml"),
    )
    blocks: list[Block] = [
        Facts(facts),
        Table(("key", "best", "in the base"), rows, "What was searched", texts=frozenset({1, 2})),
        Note("What became of it in detail:", f"theworld-train report {directory}/run"),
    ]
    if settings := sorted(record.best_config.items()):
        every = tuple((key, value_text(key, value)) for key, value in settings if value is not None)
        blocks.append(Table(("key", "value"), every, "The whole config", texts=frozenset({1}), brief=False))
    return Section("Best trial", blocks)


def _search(record: SweepRecord) -> Section:
    blocks: list[Block] = [_parallel(record)]
    figures: list[Chart | Bars] = []
    if record.importance:
        shares = [(key, record.importance[key]) for key in record.keys if key in record.importance]
        bars = tuple(Bar(key, value, share(value)) for key, value in shares)
        figures.append(Bars(f"Importance: share of the variance of {record.metric}", bars, most=1.0, brief=True))
    else:
        blocks.append(Note("The importance of the keys is known once four trials are complete."))
    figures += _progress(record)
    return Section("Search", [*blocks, *([Figures(tuple(figures))] if figures else [])])


def _progress(record: SweepRecord) -> list[Chart]:
    """Returns charts of the trials' values in their order, and of the best ones' over their steps."""
    values = [
        (float(trial["number"]), value) for trial in record.trials if (value := number(trial, "value")) is not None
    ]
    best, sofar = [], math.inf if record.minimizes else -math.inf
    for place, value in values:
        if math.isfinite(value):
            sofar = min(sofar, value) if record.minimizes else max(sofar, value)
            best.append((place, sofar))
    charts = []
    if values:
        series = (Series("best so far", tuple(best)), Series("trial", tuple(values), dotted=True, joined=False))
        charts.append(Chart("Trial by trial", "trial", record.metric, series, may_be_log=record.minimizes))
    sign = 1 if record.minimizes else -1
    told = [trial for trial in record.trials if _points(trial)]
    told.sort(
        key=lambda trial: sign * v if (v := number(trial, "value")) is not None and math.isfinite(v) else math.inf
    )
    if told:
        lines = tuple(Series(f"trial {trial['number']}", _points(trial), dotted=True) for trial in told[:CURVES])
        more = f", the best {CURVES}" if len(told) > CURVES else ""
        charts.append(Chart(f"While training{more}", STEP, record.metric, lines, may_be_log=record.minimizes))
    return charts


def _points(trial: Mapping[str, Any]) -> tuple[tuple[float, float], ...]:
    pairs = [row for row in items(trial, "intermediate") if isinstance(row, list) and len(row) == 2]
    return tuple((float(step), float(v) if _is_number(v) else math.nan) for step, v in pairs if _is_finite(step))


def _parallel(record: SweepRecord) -> Parallel:
    """Returns every trial as a line over the searched keys and its result."""
    axes, placers = [], []
    for key in record.keys:
        axis, place = _axis(key, record)
        axes.append(axis)
        placers.append(place)
    results = [number(trial, "value") for trial in record.trials]
    axis, place_result = _number_axis(record.metric, finite(results), log=False)
    lines = []
    for trial, result in zip(record.trials, results, strict=True):
        values = trial["values"]
        places = [placer(values.get(key)) for key, placer in zip(record.keys, placers, strict=True)]
        end = place_result(result)
        shade = None if end is None else end if record.minimizes else 1 - end
        said = ", ".join(f"{key} {value_text(key, values.get(key))}" for key in record.keys)
        name = f"trial {trial.get('number')}, {trial.get('state')}: {said}; {record.metric} {short(result)}"
        lines.append(Line(name, (*places, end), shade, best=trial is record.best))
    return Parallel("Trials over what was searched", (*axes, axis), tuple(lines))


def _axis(key: str, record: SweepRecord) -> tuple[Axis, Any]:
    """Returns the axis of a searched key and what places a value on it."""
    space = part(part(record.sweep, "space"), key)
    listed = items(space, "values")
    tried = [trial["values"].get(key) for trial in record.trials]
    if not listed and all(_is_finite(value) for value in tried if value is not None):
        ends = [space.get(end) for end in ("min", "max")]
        numbers = [float(value) for value in (*ends, *tried) if value is not None and _is_finite(value)]
        return _number_axis(key, numbers, log=bool(space.get("log")))
    names = list(dict.fromkeys(value_text(key, value) for value in (*listed, *tried) if value is not None))
    ticks = tuple((_even(index, len(names)), name) for index, name in enumerate(names))
    places = {name: place for place, name in ticks}
    return Axis(key, ticks), lambda value: None if value is None else places.get(value_text(key, value))


def _number_axis(name: str, values: Sequence[float], *, log: bool) -> tuple[Axis, Any]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if high <= low:
        low, high, log = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10, False
    scale = Scale(low, high, log=log and low > 0)
    ticks = scale.ticks()
    axis = Axis(name, tuple((scale.place(tick), tick_text(tick, ticks)) for tick in ticks))
    return axis, lambda value: scale.place(value) if _is_finite(value) else None


def _even(index: int, number: int) -> float:
    return index / (number - 1) if number > 1 else 0.5


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: object) -> TypeGuard[int | float]:
    return _is_number(value) and math.isfinite(value)


def _trials(record: SweepRecord) -> Section:
    rows: list[tuple[str, ...]] = []
    marked = []
    sign = 1 if record.minimizes else -1
    ordered = sorted(
        record.trials,
        key=lambda trial: (
            sign * value if (value := number(trial, "value")) is not None and math.isfinite(value) else math.inf
        ),
    )
    for trial in ordered:
        values = trial["values"]
        if trial is record.best:
            marked.append(len(rows))
        rows.append(
            (
                str(trial.get("number")),
                str(trial.get("state")).replace("_", " "),
                short(number(trial, "value")),
                *(_short_text(key, values.get(key)) for key in record.keys),
                duration(number(trial, "seconds")),
                count(number(trial, "launches")),
                str(trial.get("reason") or ABSENT),
            )
        )
    header = ("trial", "state", record.metric, *record.keys, "time", "launches", "reason")
    table = Table(header, tuple(rows), texts=frozenset({1, len(header) - 1}), marked=frozenset(marked))
    blocks: list[Block] = [table]
    for trial in ordered:
        tail = items(trial, "log_tail")
        if trial.get("state") == "failed" and tail:
            blocks.append(
                Note(f"Trial {trial.get('number')} failed; the end of its log:", "\n".join(map(str, tail[-8:])))
            )
    return Section("Trials", blocks)


def _short_text(key: str, value: object) -> str:
    return short(float(value)) if isinstance(value, float) else value_text(key, value)
