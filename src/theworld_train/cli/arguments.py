"""What commands share in reading their arguments."""

from __future__ import annotations

from collections.abc import Sequence

from theworld_train.config import ConfigError, Problem, config_kind, load_run_config
from theworld_train.config.schema import RunConfig


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tells files from overrides among a command's arguments.

    Args:
        arguments: Paths, then `key=value` texts; what holds a `=` is an override.

    Returns:
        The paths and the overrides, each in their order.
    """
    paths = [argument for argument in arguments if "=" not in argument]
    return paths, [argument for argument in arguments if "=" in argument]


def one_run_config(command: str, paths: Sequence[str], overrides: Sequence[str]) -> tuple[str, RunConfig]:
    """Loads the config of a command that runs one stage.

    Args:
        command: The command's name.
        paths: The files that it was given.
        overrides: The overrides that it was given.

    Returns:
        The path and the config.

    Raises:
        ConfigError: If there is not exactly one file, or it is a pipeline, or anything in it is wrong.
    """
    if len(paths) != 1:
        raise ConfigError(f"{command} takes one config, got {len(paths)}")
    kind = config_kind(paths[0])
    if kind == "pipeline":
        hint = f"theworld-train run {paths[0]}"
        raise ConfigError(Problem("has stages, so it is a pipeline", source=paths[0], hint=hint))
    if kind == "sweep":
        hint = f"theworld-train sweep run {paths[0]}"
        raise ConfigError(Problem("has a space, so it is a sweep", source=paths[0], hint=hint))
    return paths[0], load_run_config(paths[0], overrides)


def at_hand(path: str, config: RunConfig, *, generating: bool = False) -> RunConfig:
    """Returns a config with its hub revisions pinned, once everything that it reads is on this machine.

    Args:
        path: Where the config was read.
        config: The config.
        generating: Whether its rollouts are to be generated, rather than read.

    Raises:
        ConfigError: With everything that is missing.
    """
    from theworld_train import hub

    lock = hub.read_lock(hub.LOCK_FILE)
    if problems := hub.ensure_local(config, lock, path, generating=generating):
        raise ConfigError(problems)
    return hub.pin_revisions(config, lock)
