"""`theworld-train tiny`: write the tiny model of the quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def tiny(
    directory: Annotated[Path, typer.Argument(help="Receives gemma/ and cosmos/.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    resolution: Annotated[
        int, typer.Option(min=8, help="Side of the frames that the VAE's statistics are measured on.")
    ] = 32,
) -> None:
    """Write a tiny Gemma 3 and a tiny video generator in the hub's layout, for a laptop without GPU, token or network.

    Example:
        theworld-train tiny runs/tiny
    """
    from theworld_train.cli.ranks import offline
    from theworld_train.config.errors import ConfigError

    if resolution % 8:
        raise ConfigError(f"--resolution must be a multiple of 8, got {resolution}")
    offline()
    from theworld_train.pipeline.tiny import build_tiny

    try:
        written = build_tiny(directory, seed, resolution)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written to: {error.strerror}") from error
    typer.echo(f"{directory}: {'written' if written else 'there already'}")
