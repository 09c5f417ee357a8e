"""`theworld-train checkpoint`: what checkpoints a run has, and whether they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from theworld_train.checkpoint_files import (
    COMPONENTS_FILE,
    MANIFEST_FILE,
    DamagedCheckpointError,
    checkpoints,
    newest_checkpoint,
    read_record,
    resolve_checkpoint,
    verify_checkpoint,
)
from theworld_train.config.errors import ConfigError, Problem

Action = Literal["list", "verify", "show", "prune"]


def checkpoint(
    action: Annotated[Action, typer.Argument(help="What to do.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run directory, or one of its step-N.")],
    keep: Annotated[int, typer.Option(min=1, help="For prune: how many of the newest stay.")] = 1,
) -> None:
    """List, verify, show or prune the checkpoints of a run; `show` takes the newest one unless DIR is a step-N.

    Exit codes: 0 done, 2 wrong input, or a checkpoint that is damaged.

    Example:
        theworld-train checkpoint verify runs/quickstart/full
        theworld-train checkpoint prune runs/quickstart/full --keep 2
    """
    if newest_checkpoint(directory) is None:
        raise ConfigError(Problem("holds no complete checkpoint", source=str(directory)))
    if action == "show":
        _show(resolve_checkpoint(directory))
    elif action == "prune":
        _prune(directory, keep)
    else:
        found = [directory] if (directory / MANIFEST_FILE).is_file() else checkpoints(directory)
        (_list if action == "list" else _verify)(found)


def _list(found: list[Path]) -> None:
    for path in found:
        manifest = read_record(path / MANIFEST_FILE)
        size = sum(entry["size"] for entry in manifest["files"].values())
        facts = f"{len(manifest['files'])} files  {size:,} bytes  {manifest['world_size']} rank(s)"
        typer.echo(f"{path}  step {manifest['step']}  run {manifest['run']}  {facts}")


def _verify(found: list[Path]) -> None:
    problems: list[Problem] = []
    for path in found:
        try:
            verify_checkpoint(path)
        except DamagedCheckpointError as error:
            problems += error.problems
        else:
            typer.echo(f"{path}: whole")
    if problems:
        raise ConfigError(problems)


def _show(path: Path) -> None:
    manifest, record = read_record(path / MANIFEST_FILE), read_record(path / COMPONENTS_FILE)
    origin = record["init_from"]
    typer.echo(f"{path}: step {manifest['step']} of run {manifest['run']}, {manifest['world_size']} rank(s)")
    typer.echo(f"  base: {_base(record['base'])}")
    if record["encoder"]:
        typer.echo(f"  world encoder: {_base(record['encoder'])}")
    typer.echo(f"  started from: {origin['path'] if origin else 'its bases'}")
    for name, entry in record["components"].items():
        trained = f"trained by {entry['trained_by']}" if entry["trained_by"] else "as initialised"
        typer.echo(f"  {name}: {trained}, sha256 {entry['sha256']}")


def _base(base: dict[str, Any]) -> str:
    return f"{base['id']}@{base['revision']}" if base["revision"] else str(base["id"])


def _prune(directory: Path, keep: int) -> None:
    if (directory / MANIFEST_FILE).is_file():
        raise ConfigError(Problem("is a checkpoint; name its run directory", source=str(directory)))
    from theworld_train.train.checkpoint import clear_remains, retire
    from theworld_train.train.run_lock import run_lock

    with run_lock(directory, "checkpoint prune"):
        clear_remains(directory)
        for path in retire(directory, keep):
            typer.echo(f"{path}: removed")
