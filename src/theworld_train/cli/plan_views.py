"""What `theworld-train plan` has found, as tables for people and as rows for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from theworld_train.accounting.gpus import gpu_specs
from theworld_train.assemble.encoded import frozen_encoders, kept_encoders
from theworld_train.cli.tables import output
from theworld_train.memory.tracker import CATEGORIES
from theworld_train.plan.advice import GIB, judge
from theworld_train.plan.timing import plan_time

if TYPE_CHECKING:
    from theworld_train.accounting.gpus import Efficiencies, GpuSpec
    from theworld_train.config.schema import RunConfig
    from theworld_train.plan.advice import Assessment, Change, Planner, Setting


@dataclass(frozen=True)
class Group:
    """One run on one number of GPUs.

    Attributes:
        planner: Of the run.
        ranks: GPUs.
        settings: One for each strategy, in the order in which they are to be taken.
    """

    planner: Planner
    ranks: int
    settings: tuple[Setting, ...]


# -- JSON -------------------------------------------------------------------------------------------------------------


def rows(group: Group, kinds: Sequence[GpuSpec], shares: Efficiencies | None) -> Iterator[dict[str, Any]]:
    """Returns what programs are told: a row for each strategy and kind of GPU."""
    for setting in group.settings:
        yield from _rows(group.planner, setting, kinds, shares)


def _rows(
    planner: Planner, setting: Setting, kinds: Sequence[GpuSpec], shares: Efficiencies | None
) -> Iterator[dict[str, Any]]:
    need, run = planner.need(setting), planner.run(setting)
    row = {
        "name": planner.config.name,
        "gpus": setting.ranks,
        "strategy": setting.strategy.name,
        "offload": setting.offload,
        "micro_batch_size": setting.micro_batch_size,
        "positions": run.shape.positions,
        "supervised": run.shape.supervised,
        "encoders_read": sorted(component.value for component in kept_encoders(planner.config)),
        "peak_bytes": need.peak.total,
        "reserved_bytes": need.reserved,
        "overhead_bytes": need.overhead,
        "peak": {
            "phase": need.peak.phase,
            "op": need.peak.op,
            "module": need.peak.module,
            "by_category": need.peak.by_category(),
            "by_component": need.peak.by_component(),
        },
    }
    if not kinds:
        yield row
    for kind in kinds:
        assessment = planner.assess(setting, kind)
        verdict = assessment.verdict
        yield row | {
            "gpu": kind.name,
            "gpu_bytes": int(kind.usable_gib * GIB),
            "verdict": verdict.word,
            "margin_bytes": verdict.margin,
            "largest_micro_batch": assessment.largest_micro_batch,
            "change": _change_row(assessment.change),
            "least": _change_row(assessment.least),
            "time": _time_row(planner, setting, kind, shares),
        }


def _change_row(change: Change | None) -> dict[str, Any] | None:
    if change is None:
        return None
    need = change.verdict.need
    return {
        "arguments": str(change),
        "overrides": dict(change.overrides),
        "strategy": need.setting.strategy.name,
        "offload": need.setting.offload,
        "peak_bytes": need.peak.total,
        "reserved_bytes": need.reserved,
        "verdict": change.verdict.word,
        "margin_bytes": change.verdict.margin,
    }


# -- tables -----------------------------------------------------------------------------------------------------------


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def print_one(group: Group, kinds: Sequence[GpuSpec], shares: Efficiencies | None) -> None:
    """Prints one run on one kind of GPU: every strategy, and what the first one's peak consists of."""
    planner, settings, console = group.planner, group.settings, output()
    shape, first = planner.run(settings[0]).shape, settings[0]
    where = f" on {first.ranks} x {kinds[0].title} ({kinds[0].usable_gib:g} GiB)" if kinds else ""
    console.print(
        f"{planner.config.name}{where}: micro-batch {first.micro_batch_size} of {shape.positions:,} positions,"
        f" {shape.supervised:,} supervised; GiB of one GPU",
        highlight=False,
    )
    assessments = [planner.assess(setting, kinds[0]) if kinds else None for setting in settings]
    console.print(_strategy_table(planner, settings, assessments))
    if kinds:
        console.print(_time_table(planner, settings, kinds[0], shares))
        console.print(_encoders_line(planner.config), highlight=False, markup=False, soft_wrap=True)
    peak = planner.need(first).peak
    place = f"{peak.op} in {peak.module}" if peak.module else peak.op
    console.print(f"The peak of {first.strategy.name} comes in {peak.phase}, at {place}:", highlight=False)
    console.print(_peak_table(peak.parts))
    for setting, assessment in zip(settings, assessments, strict=True):
        for line in _advice(setting, assessment):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _encoders_line(config: RunConfig) -> str:
    """Says which frozen encoders run in a step and which are read instead, as the times take it."""
    kept = kept_encoders(config)
    parts = [
        f"{component.value} {f'is read from {config.data.encoded}' if component in kept else 'runs in every step'}"
        for component in frozen_encoders(config)
    ]
    return f"Frozen encoders: {', '.join(parts) or 'none'}."


def _strategy_table(planner: Planner, settings: Sequence[Setting], assessments: Sequence[Assessment | None]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("strategy")
    for heading in ("peak", "reserved", "with CUDA", "verdict", "margin", "largest micro-batch"):
        table.add_column(heading, justify="right")
    for setting, assessment in zip(settings, assessments, strict=True):
        need = planner.need(setting)
        name = setting.strategy.name + ("" if setting.offload == "none" else f", {setting.offload} offloaded")
        cells = [name, _gib(need.peak.total), _gib(need.reserved), _gib(need.usual)]
        if assessment is None:
            cells += ["-", "-", "-"]
        else:
            verdict = assessment.verdict
            cells += [verdict.word, f"{verdict.margin / GIB:+.2f}", str(assessment.largest_micro_batch)]
        table.add_row(*cells)
    return table


def _time_table(planner: Planner, settings: Sequence[Setting], gpu: GpuSpec, shares: Efficiencies | None) -> Table:
    """Returns the table of times, each as the expected one with the best and the worst."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("strategy")
    for heading in ("step (s)", "exchange", "tokens/s", "MFU", "run (h)", "GPU hours"):
        table.add_column(heading, justify="right")
    for setting in settings:
        if setting.offload != "none":
            continue  # what moves to and from the host is not timed
        planned = plan_time(planner.config, planner.run(setting), setting, gpu, shares)
        step, run = planned.step, planned.run
        table.add_row(
            setting.strategy.name,
            f"{step.seconds.expected:.2f} ({step.seconds.best:.2f}-{step.seconds.worst:.2f})",
            f"{step.exposed / step.seconds.expected:.0%}",
            f"{step.tokens_per_second.expected:,.0f}",
            f"{step.mfu.expected:.0%}",
            "-" if run is None else f"{run.seconds.expected / 3600:.1f}",
            "-" if run is None else f"{run.gpu_hours.expected:,.1f}",
        )
    return table


def _time_row(planner: Planner, setting: Setting, gpu: GpuSpec, shares: Efficiencies | None) -> dict[str, Any] | None:
    if setting.offload != "none":
        return None
    planned = plan_time(planner.config, planner.run(setting), setting, gpu, shares)
    step, run = planned.step, planned.run
    return {
        "step_s": step.seconds._asdict(),
        "communication_s": step.communication,
        "exposed_communication_s": step.exposed,
        "tokens_per_s": step.tokens_per_second._asdict(),
        "mfu": step.mfu._asdict(),
        "run_s": None if run is None else run.seconds._asdict(),
        "gpu_hours": None if run is None else run.gpu_hours._asdict(),
    }


def _peak_table(parts: dict[Any, int]) -> Table:
    """Returns the table of a peak: components down, categories across."""
    components = list(dict.fromkeys(component for _, component in parts))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("component")
    for heading in (*CATEGORIES, "total"):
        table.add_column(heading, justify="right")
    for component in components:
        sizes = [parts.get((category, component), 0) for category in CATEGORIES]
        table.add_row(component, *(_gib(size) if size else "" for size in sizes), _gib(sum(sizes)))
    sums = [sum(parts.get((category, component), 0) for component in components) for category in CATEGORIES]
    table.add_row("total", *(_gib(size) if size else "" for size in sums), _gib(sum(sums)))
    return table


def _advice(setting: Setting, assessment: Assessment | None) -> Iterator[str]:
    """Says what makes a setting fit, or that nothing does and which GPU would."""
    if assessment is None or assessment.verdict.word == "fits":
        return
    verdict = assessment.verdict
    name = setting.strategy.name
    said = f"{name} is tight" if verdict.word == "tight" else f"{name} does not fit"
    if assessment.change is not None:
        yield f"{said}. The cheapest change that fits: {assessment.change} ({_price(assessment.change)})."
        return
    least = assessment.least
    if least is None:
        yield f"{said}, and there is nothing left to change."
        return
    yield f"{said}, and no change that a plan knows makes it fit. The least takes {_price(least)}: {least}."
    wide = _holding(least)
    if wide:
        yield f"That would fit {wide}; more GPUs, fewer positions or fewer trained components take less."


def _price(change: Change) -> str:
    return f"{_gib(change.verdict.need.usual)} GiB, margin {change.verdict.margin / GIB:+.2f}"


def _holding(change: Change) -> str | None:
    """Returns the smallest known GPU that a changed run fits."""
    fitting = [kind for kind in gpu_specs() if judge(change.verdict.need, kind).word == "fits"]
    smallest = min(fitting, key=lambda kind: kind.usable_gib, default=None)
    return None if smallest is None else f"{smallest.title} ({smallest.usable_gib:g} GiB)"


def print_matrix(groups: Sequence[Group], kinds: Sequence[GpuSpec]) -> None:
    """Prints several runs, numbers or kinds of GPUs: for each the first strategy that fits, or what would."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run")
    table.add_column("GPUs", justify="right")
    for kind in kinds:
        table.add_column(f"{kind.title}\n{kind.usable_gib:g} GiB", overflow="fold")
    if not kinds:
        table.add_column("peak and reserved, GiB")
    for group in groups:
        if kinds:
            cells = [_cell(group.planner, group.settings, kind) for kind in kinds]
        else:
            needs = [group.planner.need(setting) for setting in group.settings]
            cells = ["\n".join(f"{n.setting.strategy.name} {_gib(n.peak.total)} {_gib(n.reserved)}" for n in needs)]
        table.add_row(group.planner.config.name, str(group.ranks), *cells)
    output().print(table)


def _cell(planner: Planner, settings: Sequence[Setting], kind: GpuSpec) -> str:
    """Returns one cell: verdict, strategy, margin and largest micro-batch, or the cheapest change."""
    best = settings[0]
    for setting in settings:
        if judge(planner.need(setting), kind).word == "fits":
            best = setting
            break
    assessment = planner.assess(best, kind)
    verdict = assessment.verdict
    text = f"{verdict.word}: {best.strategy.name} {verdict.margin / GIB:+.1f} GiB"
    if assessment.largest_micro_batch:
        text += f", micro-batch up to {assessment.largest_micro_batch}"
    if assessment.change is not None:
        text += f"\nfits with {assessment.change} ({assessment.change.verdict.margin / GIB:+.1f})"
    elif assessment.least is not None:
        text += f"\nnothing fits; least {_gib(assessment.least.verdict.need.usual)} GiB"
    return text
