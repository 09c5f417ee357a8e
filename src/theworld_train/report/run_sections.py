"""The sections of a report on one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from theworld_train.config.credentials import looks_secret
from theworld_train.report.blocks import Bar, Bars, Block, Chart, Facts, Figures, Note, Section, Series, Table
from theworld_train.report.files import flat, items, objects, part
from theworld_train.report.run import METRICS_FILE, RunRecord, curve
from theworld_train.report.words import (
    ABSENT,
    LOSS_UNIT,
    STEP,
    count,
    counted,
    duration,
    finite,
    number,
    share,
    short,
    size,
    whole,
)

CPU_MEMORY = "On a CPU the measure is what the process has grown by, libraries included; the plan counts tensors."
#: Rows of a list that is not shown whole.
LISTED = 20
#: Steps of each launch that say little of the others: kernels are chosen and memory is taken.
WARM_UP_STEPS = 2
#: Keys of a step that have charts of their own or are no curves.
_SHOWN = ("lr/", "train/grad_norm/", "train/weight_norm/", "data/share/")
_SHOWN_KEYS = frozenset(
    {
        "event",
        "step",
        "loss_hex",
        "dropped",
        "suspects",
        "train/loss",
        "train/grad_norm",
        "train/supervised_tokens",
        "train/tokens",
        "time/tokens_per_s",
        "train/padding_share",
        "train/trimmed",
        "train/skipped",
        "time/step_s",
        "time/data_wait_s",
    }
)


def describe(run: RunRecord) -> str:
    """Says how far a run has come, without a full stop."""
    whole = "" if run.max_steps is None else f" of {run.max_steps:,}"
    if run.result is not None:
        reason = f", ended by {run.result['ended_by']}" if run.result.get("ended_by") else ""
        return f"complete after {counted(run.last_step or run.max_steps or 0, 'optimizer step')}{reason}"
    if not run.steps:
        return "no optimizer step is recorded yet"
    saved = f"the newest checkpoint is step-{run.saved[-1]}" if run.saved else "no checkpoint is saved"
    return f"not complete: {run.last_step:,}{whole} optimizer steps are recorded, and {saved}"


def overview(run: RunRecord) -> Section:
    """What the run is, how far it came, and what was wrong with its files."""
    settings = flat(run.config)
    losses = finite([number(row, "train/loss") for row in run.steps])
    trained = _trained(run)
    rows = [
        ("optimizer steps", f"{run.last_step:,}" + ("" if run.max_steps is None else f" of {run.max_steps:,}")),
        ("training loss, first to last", f"{short(losses[0])} to {short(losses[-1])}" if losses else ABSENT),
        ("held-out loss", short(number(run.evals[-1], "eval/loss")) if run.evals else "not measured"),
        ("time in steps", duration(sum(finite([number(row, "time/step_s") for row in run.steps])))),
        ("trains", ", ".join(trained) or ABSENT),
        ("base", str(settings.get("model.base", ABSENT))),
        ("precision", str(settings.get("precision", ABSENT))),
        ("samples in a step", str(settings.get("training.global_batch_size", ABSENT))),
        ("samples in a micro-batch", str(settings.get("training.micro_batch_size", ABSENT))),
        ("launches", f"{len(run.starts):,}" if run.starts else ABSENT),
    ]
    if reason := (run.result or {}).get("reason"):
        rows.append(("ended because", str(reason)))
    if origin := settings.get("init_from"):
        rows.append(("starts from", str(origin)))
    blocks: list[Block] = [Facts(tuple(row for row in rows if row[1] != ABSENT))]
    blocks += [Note(remark, warns=True) for remark in run.remarks]
    command = f"theworld-train train {run.directory}/config.yaml resume=latest"
    if not run.steps:
        text = f"{METRICS_FILE} holds no optimizer step. The run has not begun, or failed in its first one:"
        blocks.append(Note(text, command, warns=True))
    elif run.result is None:
        blocks.append(Note("The run is at work, or was stopped. If it was, this goes on with it:", command))
    return Section("Overview", blocks)


def _trained(run: RunRecord) -> list[str]:
    return list(part(run.config, "trainable"))


def curves(run: RunRecord) -> Section | None:
    """Loss, rates and norms over the steps."""
    if not run.steps:
        return None
    marks = _restarts(run)
    loss = [Series("training loss", run.curve("train/loss"))]
    if held_out := curve(run.evals, "eval/loss"):
        loss.append(Series("held-out loss", held_out, dotted=True))
    charts = [
        Chart("Loss", STEP, LOSS_UNIT, tuple(loss), marks=marks, may_be_log=True),
        _family(run, "Learning rate", "learning rate", "lr/", marks),
        Chart(
            "Gradient norm before clipping",
            STEP,
            "norm",
            (Series("whole gradient", run.curve("train/grad_norm")), *_members(run, "train/grad_norm/")),
            marks=marks,
            levels=_clipping(run),
            may_be_log=True,
        ),
        _family(run, "Weight norm", "norm of trainable weights", "train/weight_norm/", marks),
        _family(run, "Parts of the mixture", "share of samples drawn", "data/share/", marks),
        *_others(run, marks),
    ]
    return Section("Training", [Figures(tuple(chart for chart in charts if _has_points(chart)))])


def _has_points(chart: Chart) -> bool:
    return any(series.points for series in chart.series)


def _restarts(run: RunRecord) -> tuple[tuple[float, str], ...]:
    return tuple((float(row["step"]), "restart") for row in run.starts[1:])


def _clipping(run: RunRecord) -> tuple[tuple[float, str], ...]:
    limit = number(flat(run.config), "training.gradient_clip_norm")
    return () if limit is None else ((limit, f"clipped to {short(limit)}"),)


def _members(run: RunRecord, prefix: str) -> tuple[Series, ...]:
    """Returns a series for each key of the steps that begins with a prefix, named by the rest of it."""
    names = dict.fromkeys(key for row in run.steps for key in row if key.startswith(prefix))
    return tuple(Series(key.removeprefix(prefix), run.curve(key)) for key in names)


def _family(run: RunRecord, title: str, unit: str, prefix: str, marks: tuple[tuple[float, str], ...]) -> Chart:
    return Chart(title, STEP, unit, _members(run, prefix), marks=marks)


def _others(run: RunRecord, marks: tuple[tuple[float, str], ...]) -> list[Chart]:
    """Returns charts of whatever else the steps have recorded, such as a later version's metrics."""
    known = {key for row in run.steps for key in row if key in _SHOWN_KEYS or key.startswith(_SHOWN)}
    rest = dict.fromkeys(key for row in run.steps for key in row if key not in known)
    return [Chart(key, STEP, key, (Series(key, run.curve(key)),), marks=marks) for key in rest]


# -- time, memory, tokens ---------------------------------------------------------------------------------------------


def speed(run: RunRecord) -> Section | None:
    """Throughput over the steps, and time and memory beside the plan."""
    if not run.steps:
        return None
    samples = number(flat(run.config), "training.global_batch_size")
    seconds = dict(run.curve("time/step_s"))
    tokens = dict(run.curve("train/tokens"))
    marks = _restarts(run)
    rate = tuple((step, samples / took) for step, took in seconds.items() if samples and took > 0)
    flow = tuple((step, tokens[step] / took) for step, took in seconds.items() if step in tokens and took > 0)
    charts: list[Chart | Bars] = [
        Chart("Samples", STEP, "samples/s", (Series("samples/s", rate),), marks=marks),
        Chart("Tokens, padding not counted", STEP, "tokens/s", (Series("tokens/s", flow),), marks=marks),
        Chart(
            "Time of a step",
            STEP,
            "seconds",
            (Series("step", run.curve("time/step_s")), Series("waiting for data", run.curve("time/data_wait_s"))),
            marks=marks,
            levels=_planned_time(run),
        ),
    ]
    blocks: list[Block] = [Figures(tuple(chart for chart in charts if isinstance(chart, Bars) or _has_points(chart)))]
    blocks += _against_plan(run)
    return Section("Speed and memory", blocks)


def _planned_time(run: RunRecord) -> tuple[tuple[float, str], ...]:
    planned = number(run.resources or {}, "time/planned_step_s/expected")
    return () if planned is None else ((planned, "planned"),)


def _against_plan(run: RunRecord) -> list[Block]:
    taken = run.resources
    if taken is None:
        text = "Memory and time beside the plan are recorded when a run ends. What the plan says of it now:"
        return [Note(text, f"theworld-train plan {run.directory}/config.yaml")]
    measured, planned = number(taken, "memory/peak_bytes"), number(taken, "memory/planned_bytes")
    on_cpu = taken.get("device") == "cpu"
    bars = [Bar("measured", measured, size(measured))] if measured is not None else []
    bars += [Bar("planned", planned, size(planned))] if planned is not None else []
    blocks: list[Block] = [Figures((Bars("Peak memory of a rank", tuple(bars)),))] if bars else []
    if planned is None:
        blocks.append(Note("The run has recorded no plan to hold its memory against."))
    elif on_cpu:
        blocks.append(Note(CPU_MEMORY))
    rows = [("peak memory of a rank", size(measured), size(planned), _off(measured, planned))]
    step, expected = number(taken, "time/step_s"), number(taken, "time/planned_step_s/expected")
    if step is not None:
        limits = [number(taken, f"time/planned_step_s/{case}") for case in ("best", "worst")]
        said = ABSENT if expected is None else f"{short(expected)} s ({short(limits[0])} to {short(limits[1])})"
        rows.append(("median time of a step", f"{short(step)} s", said, _off(step, expected)))
    waited = number(taken, "time/data_wait_share")
    rows += [("share of time waiting for data", share(waited), ABSENT, ABSENT)] if waited is not None else []
    ranks = counted(whole(taken, "ranks") or 1, "rank")
    title = f"Measured and planned, on {ranks} of {taken.get('device', ABSENT)}"
    return [*blocks, Table(("", "measured", "planned", "off"), tuple(rows), title)]


def _off(measured: float | None, planned: float | None) -> str:
    return ABSENT if measured is None or not planned else f"{measured / planned - 1:+.0%}"


def tokens(run: RunRecord) -> Section | None:
    """Where the tokens of all steps went."""
    if not run.steps:
        return None

    def total(key: str) -> float:
        return sum(finite([number(row, key) for row in run.steps]))

    # Of each step, positions = tokens / (1 - share of padding).
    padding = sum(
        (number(row, "train/tokens") or 0.0) * lost / (1 - lost)
        for row in run.steps
        if (lost := number(row, "train/padding_share")) is not None and 0 <= lost < 1
    )
    seen, supervised = total("train/tokens"), total("train/supervised_tokens")
    positions, steps = seen + padding, len(run.steps)
    rows = [
        (name, count(value), short(value / steps), share(value / positions if positions else None))
        for name, value in (
            ("positions computed", positions),
            ("tokens", seen),
            ("supervised tokens", supervised),
            ("padding", padding),
        )
    ]
    samples = number(flat(run.config), "training.global_batch_size")
    facts = [
        ("samples", count(None if samples is None else samples * steps)),
        ("samples cut", count(total("train/trimmed"))),
    ]
    dropped = sum(len(items(row, "dropped")) for row in run.steps)
    facts.append(("samples replaced by others", count(dropped)))
    table = Table(("", "in all", "in a step", "share"), tuple(rows))
    note = Note("What each kind of token takes, before training:", f"theworld-train data {run.directory}/config.yaml")
    return Section("Token budget", [table, Facts(tuple(facts)), note])


def ledger(run: RunRecord) -> Section:
    """The parameters by component."""
    rows = objects(run.ledger, "rows")
    if not rows:
        text = "The parameter ledger is saved with each checkpoint, and there is none yet. It is counted by"
        return Section("Parameters", [Note(text, f"theworld-train params {run.directory}/config.yaml")])
    cells = [
        (
            str(row.get("component")),
            count(number(row, "total")),
            count(number(row, "trainable")),
            "+".join(sorted(part(row, "dtypes"))) or ABSENT,
            "frozen" if row.get("lr") is None else short(number(row, "lr")),
            *(size(number(row, f"{kind}_bytes")) for kind in ("weight", "master", "gradient", "optimizer")),
        )
        for row in rows
    ]

    def total(key: str) -> float:
        return sum(finite([number(row, key) for row in rows]))

    trains = total("trainable") / max(1.0, total("total"))
    sums = (size(total(f"{kind}_bytes")) for kind in ("weight", "master", "gradient", "optimizer"))
    cells.append(("total", count(total("total")), count(total("trainable")), "", f"{trains:.2%} train", *sums))
    header = (
        "component",
        "parameters",
        "trainable",
        "dtype",
        "peak rate",
        "weights",
        "masters",
        "gradients",
        "optimizer",
    )
    return Section("Parameters", [Table(header, tuple(cells), texts=frozenset({3}), marked=frozenset({len(rows)}))])


# -- what went wrong, and where it ran --------------------------------------------------------------------------------


def incidents(run: RunRecord) -> Section:
    """Skipped steps, losses that stand out, restarts, and samples that could not be used."""
    skipped = [row for row in run.steps if number(row, "train/skipped")]
    odd = [row for row in run.steps if not _is_finite(row) and row not in skipped]
    spikes = [row for row in run.steps if items(row, "suspects") and row not in skipped and row not in odd]
    rows = [
        (
            f"{int(row['step']):,}",
            what,
            short(number(row, "train/loss")),
            short(number(row, "train/grad_norm")),
            _listed(map(str, items(row, "suspects"))),
        )
        for what, found in (
            ("skipped, gradient not finite", skipped),
            ("not finite", odd),
            ("loss stands out", spikes),
        )
        for row in found
    ]
    rows.sort(key=lambda row: int(row[0].replace(",", "")))
    blocks: list[Block] = []
    if rows:
        header = ("step", "what", "loss", "gradient norm", "samples")
        others = f"{len(rows) - len(skipped):,} that {'stands' if len(rows) - len(skipped) == 1 else 'stand'} out"
        title = f"{counted(len(skipped), 'skipped step')}, and {others}"
        blocks += _head(Table(header, tuple(rows), title, texts=frozenset({1, 4})))
    if len(run.starts) > 1:
        blocks.append(_launches(run))
    if run.quarantine:
        cells = [
            (str(row.get("id")), count(number(row, "step")), str(row.get("reason", ABSENT))) for row in run.quarantine
        ]
        title = f"{counted(len(cells), 'sample')} that could not be used"
        blocks += _head(Table(("sample", "first met in step", "reason"), tuple(cells), title, texts=frozenset({2})))
    if not blocks:
        blocks.append(Note("No step was skipped, no sample was quarantined, and the run was started once."))
    return Section("Incidents", blocks)


def _is_finite(row: Mapping[str, Any]) -> bool:
    values = [number(row, key) for key in ("train/loss", "train/grad_norm")]
    return all(value is None or math.isfinite(value) for value in values)


def _launches(run: RunRecord) -> Table:
    rows = [
        (
            f"{index}",
            count(number(row, "step")),
            count(number(row, "ranks")),
            str(row.get("device", ABSENT)),
        )
        for index, row in enumerate(run.starts, start=1)
    ]
    return Table(("launch", "after step", "ranks", "device"), tuple(rows), "Launches", texts=frozenset({3}))


def _head(table: Table) -> list[Block]:
    """Returns a table without its later rows, and says how many there are."""
    left_out = len(table.rows) - LISTED
    if left_out <= 0:
        return [table]
    shown = Table(table.header, table.rows[:LISTED], table.title, table.texts)
    return [shown, Note(f"{left_out:,} more are not shown.")]


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - 8:,} more" if len(every) > 8 else ""
    return (", ".join(every[:8]) + more) or ABSENT


def environment(run: RunRecord) -> Section:
    """Versions, hardware and git state of the launches, and the config."""
    found = objects(run.record, "launches")
    blocks: list[Block] = []
    if found:
        blocks.append(Facts(tuple(_launch_facts(found[-1]))))
        if any(part(launch, "versions") != part(found[-1], "versions") for launch in found):
            blocks.append(Note("Launches of this run had different versions; these are the last one's.", warns=True))
    else:
        devices = [str(row.get("device", ABSENT)) for row in run.starts[-1:]]
        text = "The run has recorded no versions, hardware or git state (run.json)."
        blocks.append(Note(text + (f" It ran on {devices[0]}." if devices else "")))
    if settings := flat(run.config):
        rows = tuple((key, value_text(key, value)) for key, value in sorted(settings.items()) if value is not None)
        blocks.append(Table(("key", "value"), rows, "Resolved config", texts=frozenset({1}), brief=False))
    return Section("Versions and config", blocks)


def _launch_facts(launch: Mapping[str, Any]) -> list[tuple[str, str]]:
    git = part(launch, "git")
    rows = [("started", str(launch.get("started", ABSENT)))]
    if git:
        changed = ", with uncommitted changes" if git.get("dirty") else ""
        rows.append(("git", f"{str(git.get('commit', ABSENT))[:12]} on {git.get('branch') or 'no branch'}{changed}"))
    else:
        rows.append(("git", "not run from a repository"))
    for group in ("hardware", "versions"):
        values = flat(part(launch, group))
        rows += [
            (
                key.removesuffix("_bytes"),
                size(number(values, key)) if key.endswith("_bytes") else value_text(key, value),
            )
            for key, value in values.items()
            if value is not None
        ]
    return rows


def value_text(key: str, value: Any) -> str:  # noqa: ANN401
    """Writes a value of a config as YAML would; one that looks like a secret stays hidden."""
    if looks_secret(key, value):
        return "(hidden)"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(value_text(key, item) for item in value)}]"
    return str(value)


def settled(run: RunRecord, key: str) -> list[float]:
    """Returns a metric of the steps without the first ones of each launch."""
    begins = {int(row["step"]) for row in run.starts} or {0}
    early = {begin + offset for begin in begins for offset in range(1, WARM_UP_STEPS + 1)}
    return finite([number(row, key) for row in run.steps if int(row["step"]) not in early])
