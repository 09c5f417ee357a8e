"""What `theworld-train run --dry-run` shows of a pipeline: ledger, plan and commands of its stages."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from theworld_train.assemble.model import ledger_of
from theworld_train.checkpoint_files import newest_checkpoint
from theworld_train.cli.params import ledger_table, print_whole
from theworld_train.cli.strategy import strategies_of
from theworld_train.cli.tables import output
from theworld_train.config import format_overrides
from theworld_train.pipeline.stages import StagePlan, good_enough
from theworld_train.plan.advice import GIB, Assessment, Planner, Setting, judge
from theworld_train.plan.timing import plan_time

if TYPE_CHECKING:
    from theworld_train.accounting.gpus import GpuSpec


def show_dry_run(plans: Sequence[StagePlan], selected: Sequence[StagePlan], gpu: GpuSpec | None) -> None:
    """Prints what a command would do.

    Args:
        plans: All stages.
        selected: Those that the command would run.
        gpu: What it is planned for; memory alone is shown without one.
    """
    console = output()
    print_whole(ledger_table({plan.name: ledger_of(plan.config) for plan in plans}))
    table, advice = _plan_table(selected, gpu)
    console.print(table)
    for line in advice:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for plan in selected:
        number = plans.index(plan)
        enough = good_enough(plans[plans.index(selected[0]) : number])
        lines = [f"stage {number + 1}/{len(plans)} {plan.name}: {_state(plan, enough)}"]
        lines += [f"  ends before its last step by {gate}" for gate in _gates(plan)]
        if plan.retries:
            lines.append(f"  is started again up to {plan.retries} times if it fails")
        lines += [f"  $ {shlex.join(command)}" for command in _commands(plan, enough)]
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _state(plan: StagePlan, enough: str | None) -> str:
    """Says what the command would make of a stage."""
    result, newest = plan.result, newest_checkpoint(plan.directory)
    if result is not None:
        return f"complete already: {result.get('reason', 'all steps are done')}"
    if enough is not None:
        return f"would be skipped, as {enough}"
    if newest is not None:
        return f"would go on from {newest}"
    source = plan.config.init_from
    return f"would start from the newest checkpoint in {source}" if source else "would start from the bases"


def _gates(plan: StagePlan) -> tuple[str, ...]:
    """Returns the gates of a stage, as one would write them on a command line."""
    training = plan.config.training
    sections = {"advance_when": training.advance_when, "stop_when": training.stop_when}
    return format_overrides(
        {
            f"{section}.{gate}": value
            for section, gates in sections.items()
            for gate, value in gates.model_dump(mode="json", exclude_none=True).items()
        }
    )


def _commands(plan: StagePlan, enough: str | None) -> list[tuple[str, ...]]:
    """Returns the commands that are left of a stage."""
    if enough is not None and not plan.is_complete:
        return []
    training = [] if plan.is_complete else [plan.command]
    return training if plan.evaluation is None or plan.is_measured else [*training, plan.evaluation]


# -- the plan ---------------------------------------------------------------------------------------------------------


def _plan_table(selected: Sequence[StagePlan], gpu: GpuSpec | None) -> tuple[Table, list[str]]:
    """Returns the table of memory and time, and what to change of the stages that do not fit."""
    title = "memory of one GPU in GiB" if gpu is None else f"{gpu.title} ({gpu.usable_gib:g} GiB): memory in GiB"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for heading in (
        "GPUs",
        "strategy",
        "peak",
        "with CUDA",
        "verdict",
        "margin",
        "step (s)",
        "at most (h)",
        "GPU hours",
    ):
        table.add_column(heading, justify="right")
    advice: list[str] = []
    hours: list[tuple[float, float]] = []
    for plan in selected:
        planner = Planner(plan.config)
        setting = _setting(plan, planner, gpu)
        need = planner.need(setting)
        cells = [plan.name, str(setting.ranks), _layout(plan, setting), f"{need.peak.total / GIB:.2f}"]
        cells.append(f"{need.usual / GIB:.2f}")
        if gpu is not None:
            verdict = judge(need, gpu)
            cells += [verdict.word, f"{verdict.margin / GIB:+.2f}", *_time(planner, setting, gpu, hours)]
            if verdict.word != "fits":
                advice.append(_advice(plan.name, planner.assess(setting, gpu)))
        table.add_row(*cells)
    if len(hours) > 1 and len(hours) == len(selected):
        table.add_section()
        table.add_row("together", *[""] * 7, *(f"{sum(column):,.1f}" for column in zip(*hours, strict=True)))
    if gpu is None:
        advice.append("Whether it fits, and what it takes in time: name the GPU, such as --gpu h100-80gb.")
    if any(plan.ranks is None for plan in selected):
        advice.append("A launcher does not say how many processes it starts; its stages are planned for one.")
    return table, advice


def _setting(plan: StagePlan, planner: Planner, gpu: GpuSpec | None) -> Setting:
    """Returns the layout of a stage: the config's, or the first that fits where the plan is to choose."""
    config, ranks = plan.config, plan.ranks or 1
    if ranks == 1:
        return planner.setting("ddp", 1)
    if config.runtime.strategy != "auto":
        return planner.setting(config.runtime.strategy, ranks, config.runtime.offload)
    settings = [planner.setting(name, ranks, config.runtime.offload) for name in strategies_of(config)]
    if gpu is None:
        return settings[0]
    return next((each for each in settings if judge(planner.need(each), gpu).word == "fits"), settings[-1])


def _layout(plan: StagePlan, setting: Setting) -> str:
    if setting.ranks == 1:
        return "one process"
    chosen = " (auto)" if plan.config.runtime.strategy == "auto" else ""
    return f"{setting.strategy.name}{chosen}" + ("" if setting.offload == "none" else f", {setting.offload} offloaded")


def _time(planner: Planner, setting: Setting, gpu: GpuSpec, hours: list[tuple[float, float]]) -> list[str]:
    """Returns the cells of a stage's times, and adds its hours to a list if they are known."""
    if setting.offload != "none":
        return ["-", "-", "-"]  # what moves to and from the host is not timed
    planned = plan_time(planner.config, planner.run(setting), setting, gpu)
    step = f"{planned.step.seconds.expected:.2f}"
    if planned.run is None:
        return [step, "-", "-"]
    hours.append((planned.run.seconds.expected / 3600, planned.run.gpu_hours.expected))
    return [step, *(f"{value:,.1f}" for value in hours[-1])]


def _advice(name: str, assessment: Assessment) -> str:
    if assessment.change is not None:
        return f"{name} fits with {assessment.change} ({assessment.change.verdict.margin / GIB:+.2f} GiB)."
    return f"{name}: no change that a plan knows makes it fit; `theworld-train plan` says more."
