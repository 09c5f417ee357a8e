"""`theworld-train validate`: are these configs right?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from theworld_train.cli.arguments import split_overrides
from theworld_train.cli.problems import EXIT_CODE, render_problems
from theworld_train.config import (
    ConfigError,
    Problem,
    RunConfig,
    config_kind,
    load_pipeline_config,
    load_run_config,
    load_stage_configs,
    load_sweep_config,
)


def validate(
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG | KEY=VALUE", help="YAML files, then overrides that hold for all."),
    ],
    rows: Annotated[bool, typer.Option("--data", help="Check every row of the data, too.")] = False,
) -> None:
    """Check run configs, pipelines with the configs of their stages, and sweeps with the points of their space.

    Nothing is loaded but the YAML files, and with --data the rows that they name, each of which has to be right; no
    medium is opened. Every file is reported.

    Exit codes: 0 all are right, 2 any is wrong.

    Example:
        theworld-train validate configs/stages/projection.yaml optimizer.lr=3e-4
    """
    paths, overrides = split_overrides(arguments)
    if not paths:
        raise ConfigError("no config file is named, only overrides")
    errors = [error for path in paths if (error := _report(path, overrides, rows))]
    if errors:
        raise typer.Exit(EXIT_CODE)


def _report(path: str, overrides: list[str], rows: bool) -> ConfigError | None:
    """Prints the line of one file, and its problems if it has any."""
    try:
        typer.echo(f"ok     {path}: {_summary(path, overrides, rows)}")
    except ConfigError as error:
        typer.echo(f"wrong  {path}")
        typer.echo(render_problems(error), err=True)
        return error
    return None


def _summary(path: str, overrides: list[str], rows: bool) -> str:
    kind = config_kind(path)
    if kind == "sweep":
        if rows:
            raise ConfigError(Problem("goes with run configs and pipelines", source=path, key="--data"))
        from theworld_train.sweep.opening import checked as check_space

        with check_space(load_sweep_config(path, overrides), path) as (found, _):
            keys = ", ".join(found.sweep.space)
            return f"sweep '{found.sweep.name}' of {found.wanted} trials ({found.sweep.search}) over {keys}"
    if kind == "pipeline":
        from theworld_train.pipeline.stages import plan_stages

        pipeline = load_pipeline_config(path, overrides)
        stages = load_stage_configs(pipeline, source=path)
        plan_stages(pipeline)
        checked = _check_data(stages) if rows else ""
        return f"pipeline '{pipeline.name}' of {', '.join(stage.name for stage in stages)}{checked}"
    config = load_run_config(path, overrides)
    checked = _check_data([config]) if rows else ""
    return f"run '{config.name}' trains {', '.join(config.trainable)}{checked}"


def _check_data(configs: Sequence[RunConfig]) -> str:
    """Checks every row that is not excluded, of data that several configs share once; returns what can be said.

    Raises:
        ConfigError: With the first problems of each data set.
    """
    from theworld_train.cli.ranks import offline

    offline()
    from theworld_train import hub
    from theworld_train.data import check_rows, open_source, read_exclusions

    numbers: dict[str, int] = {}
    problems: list[Problem] = []
    for unpinned in configs:
        config = hub.pin_revisions(unpinned, hub.read_lock(hub.LOCK_FILE))
        excluded = read_exclusions(Path(file) for file in config.data.exclude)
        for key, data, left_out in (("train", config.data.train, excluded), ("eval", config.data.eval, frozenset())):
            name = repr((data, config.data.world, left_out))
            if data is None or name in numbers:
                continue
            try:
                source = open_source(data, config.data.world)
                numbers[name] = len(source)
                problems += check_rows(source, f"data.{key}", 0, left_out).problems
            except ConfigError as error:
                problems += error.problems
    if problems:
        raise ConfigError(problems)
    return f"; {sum(numbers.values()):,} rows checked"
