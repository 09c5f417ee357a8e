"""`theworld-train export`: write a checkpoint as a complete Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A step-N directory, or its run's.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to write; it must not exist yet.")],
    dtype: Annotated[Literal["bf16", "fp32"], typer.Option(help="Of all weights but the world encoder's.")] = "bf16",
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Upload it to this repository too.")] = None,
) -> None:
    """Write merged weights, configs, processor and model card; the directory needs neither the run nor its bases.

    Example:
        theworld-train export runs/quickstart/full exported/quickstart
    """
    from theworld_train.cli.ranks import offline

    if push_to_hub is None:
        offline()
    from theworld_train.export.directory import export as write
    from theworld_train.export.directory import push

    source = write(checkpoint, target, dtype)
    typer.echo(f"{source} is exported to {target}")
    if push_to_hub is not None:
        typer.echo(f"uploaded: {push(target, push_to_hub)}")
