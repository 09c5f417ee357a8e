"""`theworld-train report`: one page on a run, a pipeline or a sweep, or on several runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Format(StrEnum):
    """What a report is written as."""

    HTML = "html"
    MD = "md"


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN|PIPELINE|SWEEP",
            help="Directory of a run, a pipeline or a sweep; or of several runs.",
        ),
    ],
    form: Annotated[
        Format, typer.Option("--format", help="A page that opens offline, or Markdown for a pull request.")
    ] = Format.HTML,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File to write; if absent, report.html in the current directory, or md to stdout."),
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures/--no-pictures", help="Show the images and clips of sample answers.")
    ] = True,
) -> None:
    """Report on a run, a pipeline or a sweep, from its files alone; several runs are compared.

    Example:
        theworld-train report runs/quickstart --out quickstart.html
    """
    from theworld_train.cli.ranks import offline
    from theworld_train.report.making import make_report
    from theworld_train.report.markdown import render_markdown
    from theworld_train.report.page import render_page

    if form is Format.MD:
        text = render_markdown(make_report(paths, None))
        if out is None:
            typer.echo(text, nl=False)
            return
        target = out
    else:
        target = out or Path("report.html")
        finder = None
        if pictures:
            offline()
            finder = _find_pictures
        text = render_page(make_report(paths, finder))
    _write(target, text)
    typer.echo(f"{target}: written, {len(text.encode()) / 2**20:.2f} MiB", err=True)


def _find_pictures(
    data: Mapping[str, Any], answers: list[dict[str, Any]]
) -> tuple[list[tuple[tuple[str, ...], ...]], str | None]:
    """Opens the held-out data, which takes torch along: only a report with answers waits for it."""
    from theworld_train.report.pictures import pictures_of

    return pictures_of(data, answers)


def _write(path: Path, text: str) -> None:
    """Writes the file whole or not at all.

    Raises:
        ConfigError: If it cannot be written.
    """
    from theworld_train.config.errors import ConfigError, Problem

    partial = path.parent / f".{path.name}.partial"
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise ConfigError(Problem(f"cannot be written: {reason}", key="--out", value=str(path))) from error
