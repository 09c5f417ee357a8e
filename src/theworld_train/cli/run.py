"""`theworld-train run`: run the stages of a pipeline."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Annotated, Any

import typer

from theworld_train.cli.arguments import split_overrides

if TYPE_CHECKING:
    from rich.console import Console


def run(
    arguments: Annotated[
        list[str], typer.Argument(metavar="PIPELINE [KEY=VALUE ...]", help="A pipeline, and dotted keys to override.")
    ],
) -> None:
    """Run a pipeline's stages one after the other, each in its own process, and show what they have come to.

    A pipeline that was stopped goes on where it was when it is run again.

    Example:
        theworld-train run configs/pipelines/quickstart.yaml output_dir=runs/second-try
    """
    from theworld_train import hub
    from theworld_train.cli.tables import output
    from theworld_train.config import config_kind, load_pipeline_config, load_stage_configs
    from theworld_train.config.errors import ConfigError, Problem
    from theworld_train.pipeline.runner import SUMMARY_FILE, StageFailedError, run_pipeline

    paths, overrides = split_overrides(arguments)
    if len(paths) != 1:
        raise ConfigError(f"run takes one pipeline, got {len(paths)}")
    if config_kind(paths[0]) == "run":
        hint = f"for a run config: theworld-train train {paths[0]}"
        raise ConfigError(Problem("has no stages, so it is no pipeline", source=paths[0], hint=hint))
    pipeline = load_pipeline_config(paths[0], overrides)
    if pipeline.launcher and shutil.which(pipeline.launcher[0]) is None:
        raise ConfigError(Problem("no such program", source=paths[0], key="launcher", value=pipeline.launcher[0]))
    # What stops a stage is told before the first one runs.
    lock = hub.read_lock(hub.LOCK_FILE)
    absent = [
        problem
        for config in load_stage_configs(pipeline, source=paths[0])
        for problem in hub.ensure_local(config, lock, paths[0])
    ]
    if absent:
        raise ConfigError(list(dict.fromkeys(absent)))
    console = output()
    try:
        summary = run_pipeline(pipeline, console)
    except StageFailedError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.returncode) from None
    show_summary(summary, console)
    console.print(f"summary: {pipeline.output_dir}/{SUMMARY_FILE}", highlight=False)


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the table of stages and, below it, that of their ablations."""
    from theworld_train.cli.tables import ablation_table, stage_table

    console.print(stage_table(summary))
    if any(stage["ablations"] for stage in summary["stages"]):
        console.print(ablation_table({stage["name"]: stage["ablations"] for stage in summary["stages"]}))
