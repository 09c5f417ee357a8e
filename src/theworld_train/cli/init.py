"""`theworld-train init`: write the skeleton of a project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Receives the project; made if it is not there.")],
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own rows: JSONL, Parquet or JSON. Drawn examples if absent."),
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="Held-out rows, to measure on; goes with --data.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Configs for a tiny model, which trains in minutes without a GPU.")
    ] = False,
) -> None:
    """Write a project: commented configs for all four stages on one base, a pipeline, data and the next commands.

    Nothing is overwritten: if one of the files is there already, none is written.

    Example:
        theworld-train init my-project --tiny
        theworld-train init my-project --data rows.jsonl --eval held-out.jsonl
    """
    from theworld_train.starter.write import Project, write_project

    written = write_project(Project(directory, tiny=tiny, data=data, eval_data=eval_data))
    shown = [name for name in written if not name.startswith("data/")]
    for name in shown:
        typer.echo(f"  {directory / name}")
    if len(shown) < len(written):
        typer.echo(f"  {directory / 'data'}: {len(written) - len(shown)} files of drawn examples")
    first = "theworld-train tiny runs/tiny" if tiny else "theworld-train doctor configs/stages/projection.yaml"
    typer.echo(f"next: cd {directory} && {first}; README.md has the commands after it")
