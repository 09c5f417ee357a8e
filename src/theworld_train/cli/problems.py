"""How a user's errors are shown: by file, a line for each problem, and exit code 2."""

from __future__ import annotations

from dataclasses import replace

import typer

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.layers import COMMAND_LINE

EXIT_CODE = 2


def render_problems(error: ConfigError) -> str:
    """Lists an error's problems under the file that each was found in.

    Args:
        error: The error.

    Returns:
        Lines such as `2 problems in FILE` and, indented below, `optimizer.lr: expected a number > 0 (got -1)`.
    """
    by_source: dict[str | None, list[Problem]] = {}
    for problem in error.problems:
        by_source.setdefault(problem.source, []).append(problem)
    lines: list[str] = []
    for source, problems in by_source.items():
        if source:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            lines.append(f"{count} {'on the' if source == COMMAND_LINE else 'in'} {source}")
        indent = "  " if source else ""
        lines += [f"{indent}{replace(problem, source=None)}" for problem in problems]
    return "\n".join(lines)


def exit_if_config_error(error: Exception) -> None:
    """Prints the problems of a user's error and ends the command; does nothing about any other exception.

    Args:
        error: What a command raised.

    Raises:
        typer.Exit: with code 2, if the error is a ConfigError.
    """
    if isinstance(error, ConfigError):
        typer.echo(render_problems(error), err=True)
        raise typer.Exit(EXIT_CODE) from None
