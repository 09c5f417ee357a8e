"""The report on a pipeline: its stages in order, what ended them, and what each has come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from theworld_train.report.blocks import Block, Chart, Facts, Figures, Note, Report, Section, Series, Table
from theworld_train.report.evaluation import (
    AS_TRAINED,
    SHARES,
    Pictures,
    ablations,
    answers,
    interval_text,
    main_share,
    measured,
    share_names,
)
from theworld_train.report.files import flat, objects, part, read_json, read_lines
from theworld_train.report.run import RunRecord, is_run, read_run
from theworld_train.report.run_sections import CPU_MEMORY, incidents, ledger, settled
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

JOURNAL_FILE = "journal.jsonl"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline.

    Attributes:
        name: Its name.
        state: `complete`, `running`, `failed`, `stopped`, `skipped` or `pending`.
        attempts: How often it was launched.
        reason: Why it is in its state, empty if nothing is to be said.
        run: Its run directory, if there is one.
    """

    name: str
    state: str
    attempts: int
    reason: str
    run: RunRecord | None


@dataclass(frozen=True)
class PipelineRecord:
    """What a pipeline's directory holds.

    Attributes:
        directory: The directory.
        name: The pipeline's name.
        stages: Its stages in order.
        journal: The lines of its journal.
        remarks: What was damaged and left out.
    """

    directory: Path
    name: str
    stages: tuple[Stage, ...]
    journal: tuple[dict[str, Any], ...] = field(repr=False)
    remarks: tuple[str, ...] = ()


def is_pipeline(directory: Path) -> bool:
    """Whether a directory is that of a pipeline: it holds a pipeline's journal or summary."""
    return (directory / JOURNAL_FILE).is_file() or (directory / SUMMARY_FILE).is_file()


def read_pipeline(directory: Path) -> PipelineRecord:
    """Reads a pipeline's directory; what is missing or damaged is left out, and what is damaged is said."""
    remarks: list[str] = []
    lines = read_lines(directory / JOURNAL_FILE)
    remarks += lines.remarks(JOURNAL_FILE)
    summary = read_json(directory / SUMMARY_FILE, remarks) or {}
    begun = [row for row in lines.rows if row.get("event") == "run"]
    told = [row for row in lines.rows if row.get("event") == "stage"]
    summarised = objects(summary, "stages")
    planned = begun[-1].get("stages") if begun else None
    names = planned if isinstance(planned, list) else [row.get("name") for row in summarised]
    stages = tuple(_stage(directory, str(name), told, summarised) for name in names)
    name = (begun[-1].get("pipeline") if begun else None) or summary.get("pipeline") or directory.resolve().name
    return PipelineRecord(directory, str(name), stages, lines.rows, tuple(remarks))


def _stage(directory: Path, name: str, told: list[dict[str, Any]], summarised: list[dict[str, Any]]) -> Stage:
    own = [row for row in told if row.get("stage") == name]
    # A name from a journal is no path.
    folder = directory / name
    run = read_run(folder) if folder.parent == directory and is_run(folder) else None
    if own:
        state = str(own[-1].get("state", ABSENT))
    else:
        state = next((str(row.get("state", "complete")) for row in summarised if row.get("name") == name), "pending")
    if run is not None and run.result is not None:
        state = "complete"
    reason = str((run.result or {}).get("reason") or "") if run is not None and run.result is not None else ""
    attempts = max([whole(row, "attempt") or 0 for row in own], default=1 if run is not None else 0)
    return Stage(name, state, attempts, reason or str(own[-1].get("reason") or "" if own else ""), run)


def pipeline_report(record: PipelineRecord, pictures: Pictures | None) -> Report:
    """Returns the report on a pipeline."""
    ran = [(stage.name, stage.run) for stage in record.stages if stage.run is not None]
    done = sum(stage.state == "complete" for stage in record.stages)
    states = ", ".join(
        f"{name}: {number}"
        for name in ("running", "failed", "stopped", "skipped", "pending")
        if (number := sum(stage.state == name for stage in record.stages))
    )
    about = f"Pipeline: {done} of {counted(len(record.stages), 'stage')} complete" + (f"; {states}." if states else ".")
    sections = [_overview(record), *([_curves(ran), _evaluation(record, ran)] if ran else [])]
    if ran:
        sections.append(_titled(answers(_last_answered(ran), pictures), f"of {_last_answered(ran).name}"))
        sections += [_speed(ran), _titled(ledger(ran[-1][1]), f"of {ran[-1][0]}"), _journal(record)]
        sections += [_titled(found, f"in {name}") for name, run in ran if (found := _incidents(run))]
    return Report("pipeline", record.name, about, sections)


def _titled(section: Section, more: str) -> Section:
    return Section(f"{section.title} {more}", section.blocks)


def _last_answered(ran: list[tuple[str, RunRecord]]) -> RunRecord:
    """Returns the last stage that was measured, or the last one."""
    return next((run for _, run in reversed(ran) if ablations(run.evaluation)), ran[-1][1])


def _incidents(run: RunRecord) -> Section | None:
    """Returns what went wrong in a stage, or None if nothing did."""
    found = incidents(run)
    return found if any(isinstance(block, Table) for block in found.blocks) else None


def _seconds(run: RunRecord) -> float:
    return sum(finite([number(row, "time/step_s") for row in run.steps]))


def _overview(record: PipelineRecord) -> Section:
    rows = []
    for stage in record.stages:
        run = stage.run
        losses = [] if run is None else finite([number(row, "train/loss") for row in run.steps])
        trainable = None if run is None else number(run.ledger or run.result or {}, "trainable")
        ended = "" if run is None else str((run.result or {}).get("ended_by") or "")
        rows.append(
            (
                stage.name,
                stage.state,
                f"{stage.attempts}",
                ABSENT if run is None else f"{run.last_step:,}",
                count(trainable),
                short(losses[0]) if losses else ABSENT,
                short(losses[-1]) if losses else ABSENT,
                ABSENT if run is None else duration(_seconds(run)),
                ended or ABSENT,
                stage.reason or ABSENT,
            )
        )
    header = (
        "stage",
        "state",
        "launches",
        "steps",
        "trainable",
        "first loss",
        "last loss",
        "in steps",
        "ended by",
        "reason",
    )
    facts = [("time in optimizer steps", duration(sum(_seconds(s.run) for s in record.stages if s.run is not None)))]
    if wall := _wall(record):
        facts += [("from first to last line of the journal", duration(wall))]
    gates = [f"{row[0]}: {row[8]}" for row in rows if row[8] not in (ABSENT, "max_steps")]
    facts.append(("gates that fired", ", ".join(gates) or "none"))
    blocks: list[Block] = [Facts(tuple(facts)), Table(header, tuple(rows), texts=frozenset({1, 8, 9}))]
    blocks += [Note(remark, warns=True) for remark in record.remarks]
    blocks += [
        Note(f"{stage.name}: {remark}", warns=True)
        for stage in record.stages
        if stage.run is not None
        for remark in stage.run.remarks
    ]
    if any(stage.state not in ("complete", "skipped") for stage in record.stages):
        blocks.append(
            Note(
                "The pipeline is not complete. It goes on where it was with the command that began it:",
                "theworld-train run PIPELINE",
            )
        )
    return Section("Stages", blocks)


def _wall(record: PipelineRecord) -> float | None:
    times = []
    for row in record.journal:
        try:
            times.append(datetime.fromisoformat(str(row.get("time"))).timestamp())
        except ValueError:
            continue
    return times[-1] - times[0] if len(times) > 1 else None


def _curves(ran: list[tuple[str, RunRecord]]) -> Section:
    """Loss over all stages one after the other, and their rates and speed."""
    begins, total = [], 0
    for _, run in ran:
        begins.append(total)
        total += run.last_step
    marks = tuple((float(begin), name) for begin, (name, _) in zip(begins, ran, strict=True))

    def joined(key: str) -> tuple[tuple[float, float], ...]:
        return tuple(
            (step + begin, value) for begin, (_, run) in zip(begins, ran, strict=True) for step, value in run.curve(key)
        )

    held_out = tuple(
        (row["step"] + begin, value)
        for begin, (_, run) in zip(begins, ran, strict=True)
        for row in run.evals
        if (value := number(row, "eval/loss")) is not None
    )
    over = f"{STEP} of the pipeline"
    breaks = tuple(begin + 0.5 for begin in begins)
    loss = [Series("training loss", joined("train/loss"), breaks=breaks)]
    loss += [Series("held-out loss", held_out, dotted=True, breaks=breaks)] if held_out else []
    rates = dict.fromkeys(key for _, run in ran for row in run.steps for key in row if key.startswith("lr/"))

    def chart(title: str, unit: str, keys: Mapping[str, str], *, log: bool = False) -> Chart:
        series = (Series(name, joined(key), breaks=breaks) for key, name in keys.items())
        return Chart(title, over, unit, tuple(one for one in series if one.points), marks=marks, may_be_log=log)

    charts = [
        Chart("Loss", over, LOSS_UNIT, tuple(loss), marks=marks, may_be_log=True),
        chart("Gradient norm before clipping", "norm", {"train/grad_norm": "gradient norm"}, log=True),
        chart("Learning rate", "learning rate", {key: key.removeprefix("lr/") for key in rates}),
        chart("Time of a step", "seconds", {"time/step_s": "step", "time/data_wait_s": "waiting for data"}),
    ]
    return Section("Training", [Figures(tuple(each for each in charts if any(one.points for one in each.series)))])


def _speed(ran: list[tuple[str, RunRecord]]) -> Section:
    """What a step of each stage takes, beside what was planned, and the tokens that it has seen."""
    rows = []
    for name, run in ran:
        taken = run.resources or {}
        times = settled(run, "time/step_s")
        step = statistics.median(times) if times else None
        samples = number(flat(run.config), "training.global_batch_size")
        peak, planned = number(taken, "memory/peak_bytes"), number(taken, "memory/planned_bytes")
        rows.append(
            (
                name,
                short(step),
                ABSENT if not step or samples is None else short(samples / step),
                size(peak),
                size(planned),
                ABSENT if peak is None or not planned else f"{peak / planned - 1:+.0%}",
                count(sum(finite([number(row, "train/tokens") for row in run.steps]))),
                count(sum(finite([number(row, "train/supervised_tokens") for row in run.steps]))),
            )
        )
    header = ("stage", "s/step", "samples/s", "peak memory", "planned", "off", "tokens", "supervised tokens")
    blocks: list[Block] = [Table(header, tuple(rows))]
    if any((run.resources or {}).get("device") == "cpu" for _, run in ran):
        blocks.append(Note(CPU_MEMORY))
    return Section("Speed, memory and tokens", blocks)


def _evaluation(record: PipelineRecord, ran: list[tuple[str, RunRecord]]) -> Section:
    """What each stage answers, at its end and with parts taken away."""
    blocks: list[Block] = []
    if charts := _over_stages(ran):
        blocks.append(Figures(tuple(charts)))
    results = {name: found for name, run in ran if (found := ablations(run.evaluation))}
    rows = []
    names = [main_share(variants.get(AS_TRAINED, {})) for variants in results.values()]
    chosen = names[-1] if names else "predicted"
    kinds = list(
        dict.fromkeys(kind for variants in results.values() for each in variants.values() for kind in measured(each))
    )
    for stage, variants in results.items():
        for variant, result in variants.items():
            parts = measured(result)
            loss = part(part(result, "total"), "loss")
            cells = (interval_text(part(parts.get(kind, {}), chosen), share) for kind in kinds)
            rows.append((stage, str(result.get("description") or variant), interval_text(loss, short), *cells))
    if rows:
        title = f"Held-out samples {SHARES[chosen]}, with 95% intervals"
        blocks.append(Table(("stage", "variant", "loss", *kinds), tuple(rows), title, texts=frozenset({1})))
    else:
        last = ran[-1][1].directory
        text = "No stage is measured with parts taken away. The pipeline's key evaluation asks for it; by hand:"
        blocks.append(Note(text, f"theworld-train evaluate {last} --json {last}/evaluation.json"))
    return Section("Evaluation", blocks)


def _over_stages(ran: list[tuple[str, RunRecord]]) -> list[Chart]:
    """Returns charts of the last held-out measurement of each stage: shares by kind, and the loss."""
    last = [run.evals[-1] if run.evals else {} for _, run in ran]
    names = tuple(name for name, _ in ran)

    def series(prefix: str) -> tuple[Series, ...]:
        keys = dict.fromkeys(key for row in last for key in row if key == prefix or key.startswith(f"{prefix}/"))
        return tuple(
            Series(
                key.removeprefix(prefix).removeprefix("/") or "total",
                tuple((float(i), value) for i, row in enumerate(last) if (value := number(row, key)) is not None),
                dotted=True,
            )
            for key in keys
        )

    charts = [
        Chart(f"After each stage: {SHARES.get(name, name)}", "stage", "share of held-out samples", found, ticks=names)
        for name in share_names(key for row in last for key in row)
        if (found := series(f"eval/{name}"))
    ]
    if found := series("eval/loss"):
        charts.append(Chart("After each stage: held-out loss", "stage", LOSS_UNIT, found, ticks=names))
    return charts


def _journal(record: PipelineRecord) -> Section:
    if not record.journal:
        return Section("Journal", [Note(f"There is no {JOURNAL_FILE}.")])
    rows = tuple(
        (
            str(row.get("time", ABSENT)),
            "pipeline started" if row.get("event") == "run" else str(row.get("stage", ABSENT)),
            str(row.get("state") or ABSENT),
            count(number(row, "attempt")),
            count(number(row, "exit_code")),
            str(row.get("reason") or ABSENT),
        )
        for row in record.journal
    )
    header = ("time", "stage", "state", "launch", "exit code", "reason")
    title = counted(len(rows), "line")
    return Section("Journal", [Table(header, rows, title, texts=frozenset({1, 2, 5}), brief=False)])
