"""`theworld-train figures`: what was published, and what is right."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from theworld_train.accounting.published import Group, broken, markdown, published_figures, show, verdict
from theworld_train.config.errors import ConfigError, Problem


def figures(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page docs/published-figures.md instead of tables.")
    ] = False,
    check: Annotated[
        Path | None, typer.Option(metavar="PAGE", help="Fail if the page differs from what would be printed now.")
    ] = None,
) -> None:
    """Print every published figure about TheWorld and its relatives beside our own value, computed anew.

    Exit codes: 0 done, 2 wrong input, a value that no longer agrees with the published one as it is known to, or a page
    that differs.

    Example:
        theworld-train figures --markdown > docs/published-figures.md
        theworld-train figures --check docs/published-figures.md
    """
    groups = published_figures()
    problems = [Problem(line, "published figures") for line in broken(groups)]
    if check is not None:
        problems += _differences(check)
    if problems:
        raise ConfigError(problems)
    if check is not None:
        typer.echo(f"{check} is up to date")
    elif as_markdown:
        typer.echo(markdown(), nl=False)
    else:
        _print(groups)


def _differences(page: Path) -> list[Problem]:
    """Returns the first lines in which a page differs from the one that would be written now."""
    try:
        written = page.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(f"cannot be read: {error}", str(page))) from error
    changes = [
        line
        for line in difflib.unified_diff(written, markdown().splitlines(), lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    if not changes:
        return []
    hint = f"write it again: theworld-train figures --markdown > {page}"
    shown = "\n    ".join(changes[:10])
    return [
        Problem(f"differs in {len(changes)} lines from what is computed now:\n    {shown}\n ", str(page), hint=hint)
    ]


def _print(groups: tuple[Group, ...]) -> None:
    console = Console()
    for group in groups:
        table = Table(title=group.title, title_justify="left")
        table.add_column("figure", overflow="fold", ratio=3)
        table.add_column("number", overflow="fold", ratio=3)
        table.add_column("published", justify="right")
        table.add_column("ours", justify="right")
        table.add_column("verdict", overflow="fold", ratio=2)
        for figure in group.figures:
            for position, value in enumerate(figure.values):
                title = figure.title if position == 0 else ""
                table.add_row(title, value.label, value.published or "", show(value), verdict(value))
        console.print(table)
    console.print("`theworld-train figures --markdown` explains each of them.", highlight=False)
