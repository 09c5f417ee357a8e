"""`theworld-train validate`: are these configs right?"""

from __future__ import annotations

from typing import Annotated

import typer

from theworld_train.cli.arguments import split_overrides
from theworld_train.cli.problems import EXIT_CODE, render_problems
from theworld_train.config import (
    ConfigError,
    config_kind,
    load_pipeline_config,
    load_run_config,
    load_stage_configs,
)


def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG | KEY=VALUE", help="YAML files, then overrides that hold for all."),
    ],
) -> None:
    """Check run configs and pipelines, and with a pipeline the configs of its stages.

    Nothing is loaded but the YAML files. Every file is reported; the exit code is 2 if any is wrong.

    Example:
        theworld-train validate configs/stages/projection.yaml optimizer.lr=3e-4
    """
    paths, overrides = split_overrides(arguments)
    if not paths:
        raise ConfigError("no config file is named, only overrides")
    errors = [error for path in paths if (error := _report(path, overrides))]
    if errors:
        raise typer.Exit(EXIT_CODE)


def _report(path: str, overrides: list[str]) -> ConfigError | None:
    """Prints the line of one file, and its problems if it has any."""
    try:
        typer.echo(f"ok     {path}: {_summary(path, overrides)}")
    except ConfigError as error:
        typer.echo(f"wrong  {path}")
        typer.echo(render_problems(error), err=True)
        return error
    return None


def _summary(path: str, overrides: list[str]) -> str:
    if config_kind(path) == "pipeline":
        pipeline = load_pipeline_config(path, overrides)
        stages = [stage.name for stage in load_stage_configs(pipeline, source=path)]
        return f"pipeline '{pipeline.name}' of {', '.join(stages)}"
    config = load_run_config(path, overrides)
    return f"run '{config.name}' trains {', '.join(config.trainable)}"
