"""`theworld-train fetch`: download models and datasets, the only time that the network is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from theworld_train.cli.arguments import split_overrides
from theworld_train.config import (
    ConfigError,
    Problem,
    config_kind,
    load_pipeline_config,
    load_run_config,
    load_stage_configs,
    load_sweep_config,
)

if TYPE_CHECKING:
    from theworld_train.config import RunConfig


def fetch(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG... [KEY=VALUE ...]", help="Run configs or pipelines, then overrides that hold for all."
        ),
    ] = None,
    lock: Annotated[
        str, typer.Option(metavar="FILE", help="Lock file that records the commits; commit it with the configs.")
    ] = "theworld.lock.json",
    check: Annotated[
        bool, typer.Option("--check", help="Only check, without the network, that all of it is here and complete.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Take what branches and tags stand for now, not the locked commits.")
    ] = False,
) -> None:
    """Download the models and datasets that configs name, once per node; training then runs with the hub offline.

    What is not pinned to a commit is pinned by the lock file. A gated model, such as Gemma, needs its licence accepted
    and a token: from HF_TOKEN or `hf auth login`, never from a config.

    Example:
        theworld-train fetch configs/pipelines/progressive.yaml
        theworld-train fetch --check
    """
    if check:
        from theworld_train.cli.ranks import offline

        offline()
    paths, overrides = split_overrides(arguments or [])
    if not paths and (overrides or not check):
        raise ConfigError("no config file is named")
    configs = _load(paths, overrides)
    if check:
        _check(configs, lock)
    else:
        _fetch(configs, lock, update)


def _fetch(configs: list[tuple[str, RunConfig]], lock: str, update: bool) -> None:
    from theworld_train import hub

    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        typer.echo(line)

    hub.fetch(configs, lock, update=update, say=say)
    typer.echo(f"lock: {lock}" if lines else "nothing to fetch: no hub repository is named")


def _check(configs: list[tuple[str, RunConfig]], lock: str) -> None:
    from pathlib import Path

    from theworld_train import hub

    if not Path(lock).is_file():
        raise ConfigError(Problem("no such lock file", source=lock, hint=hub.FETCH_HINT))
    locked = hub.read_lock(lock)
    problems = hub.check_lock(locked, lock)
    for path, config in configs:
        for problem in hub.ensure_local(config, locked, path):
            # Of what is locked and incomplete, the line of the lock is enough.
            if problem.value not in [known.value for known in problems]:
                problems.append(problem)
    if problems:
        raise ConfigError(problems)
    typer.echo(f"ok     {lock}: {len(locked.models)} model(s), {len(locked.datasets)} dataset(s), all here")


def _load(paths: list[str], overrides: list[str]) -> list[tuple[str, RunConfig]]:
    """Loads run configs, and those of pipelines and sweeps, each with the file that the user named."""
    from theworld_train.sweep.target import resolve_base

    configs: list[tuple[str, RunConfig]] = []
    problems: list[Problem] = []
    for path in paths:
        try:
            kind = config_kind(path)
            if kind == "sweep":
                configs += [(path, run) for run in resolve_base(load_sweep_config(path, overrides), path).runs]
            elif kind == "pipeline":
                stages = load_stage_configs(load_pipeline_config(path, overrides), source=path)
                configs += [(path, stage) for stage in stages]
            else:
                configs.append((path, load_run_config(path, overrides)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return configs
