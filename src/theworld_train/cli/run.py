"""`theworld-train run`: run the stages of a pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from theworld_train.cli.arguments import split_overrides

if TYPE_CHECKING:
    from rich.console import Console

    from theworld_train.config import PipelineConfig, RunConfig
    from theworld_train.pipeline.stages import StagePlan


def run(
    arguments: Annotated[
        list[str], typer.Argument(metavar="PIPELINE [KEY=VALUE ...]", help="A pipeline, and dotted keys to override.")
    ],
    first: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Begin with this stage; those before it stay.")
    ] = None,
    last: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="End with this stage.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show ledger, plan and commands of the stages, and run nothing.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="With --dry-run: the kind of GPU to plan for, such as h100-80gb.")
    ] = None,
) -> None:
    """Run a pipeline's stages one after the other, each in its own process, and show what they have come to.

    A pipeline that was stopped or killed goes on where it was when it is run again. Exit codes: 0 if all is done, 2 if
    something is wrong with the input, 75 if a signal has stopped it and all is saved, else that of the failed stage.

    Example:
        theworld-train run configs/pipelines/quickstart.yaml --until vision output_dir=runs/second-try
    """
    from theworld_train.cli.tables import output
    from theworld_train.config import config_kind, load_pipeline_config, load_stage_configs
    from theworld_train.config.errors import ConfigError, Problem
    from theworld_train.pipeline.runner import SUMMARY_FILE, PipelineHaltedError, run_pipeline
    from theworld_train.pipeline.stages import chosen, plan_stages

    paths, overrides = split_overrides(arguments)
    if len(paths) != 1:
        raise ConfigError(f"run takes one pipeline, got {len(paths)}")
    if (kind := config_kind(paths[0])) != "pipeline":
        hint = f"theworld-train {'sweep run' if kind == 'sweep' else 'train'} {paths[0]}"
        raise ConfigError(Problem("has no stages, so it is no pipeline", source=paths[0], hint=hint))
    if gpu is not None and not dry_run:
        raise ConfigError(Problem("goes with --dry-run", key="--gpu", value=gpu))
    pipeline = load_pipeline_config(paths[0], overrides)
    stages = load_stage_configs(pipeline, source=paths[0])
    plans = plan_stages(pipeline)
    selected = chosen(plans, first, last)
    if dry_run:
        _show_dry_run(paths[0], plans, selected, gpu)
        return
    # What stops a stage is told before the first one runs.
    _refuse_absent(pipeline, stages, paths[0])
    console = output()
    try:
        summary = run_pipeline(pipeline, console, first, last)
    except PipelineHaltedError as halted:
        typer.echo(f"error: {halted}", err=True)
        raise typer.Exit(halted.returncode) from None
    show_summary(summary, console)
    console.print(f"summary: {pipeline.output_dir}/{SUMMARY_FILE}", highlight=False)


def _show_dry_run(path: str, plans: Sequence[StagePlan], selected: Sequence[StagePlan], gpu: str | None) -> None:
    from theworld_train.accounting.gpus import gpu_spec
    from theworld_train.cli.params import wrong_names
    from theworld_train.cli.ranks import offline
    from theworld_train.config.errors import ConfigError
    from theworld_train.pipeline.stages import refuse_changed, refuse_mixed

    kind = None if gpu is None else gpu_spec(gpu, key="--gpu")
    if problems := [problem for plan in plans for problem in wrong_names(plan.config, path)]:
        raise ConfigError(list(dict.fromkeys(problems)))
    refuse_changed(plans)
    refuse_mixed(plans)
    offline()
    from theworld_train.cli.pipeline_views import show_dry_run

    show_dry_run(plans, selected, kind)


def _refuse_absent(pipeline: PipelineConfig, stages: tuple[RunConfig, ...], path: str) -> None:
    """Refuses a pipeline whose launchers, models or data are not on this machine."""
    from theworld_train import hub
    from theworld_train.config.errors import ConfigError, Problem

    launchers = {"launcher": pipeline.launcher}
    launchers |= {f"stages[{index}].launcher": stage.launcher or () for index, stage in enumerate(pipeline.stages)}
    absent = [
        Problem("no such program", source=path, key=key, value=launcher[0])
        for key, launcher in launchers.items()
        if launcher and shutil.which(launcher[0]) is None
    ]
    lock = hub.read_lock(hub.LOCK_FILE)
    absent += [problem for config in stages for problem in hub.ensure_local(config, lock, path)]
    if absent:
        raise ConfigError(list(dict.fromkeys(absent)))


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the table of stages and, below it, that of their ablations."""
    from theworld_train.cli.tables import ablation_table, stage_table

    console.print(stage_table(summary))
    for stage in summary["stages"]:
        said = stage.get("reason") or stage["state"]
        console.print(f"{stage['name']}: {said}", highlight=False, markup=False, soft_wrap=True)
    measured = {stage["name"]: stage["ablations"] for stage in summary["stages"] if stage.get("ablations")}
    if measured:
        console.print(ablation_table(measured))
