"""What the shell offers for the values of arguments and options: config files and names, without importing torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typer._click import Command as AnyCommand
    from typer._click import Context

#: How deep below what is typed config files are looked for, how many are offered, and where none are looked for.
DEPTH, MOST = 4, 200
PASSED_OVER = ("runs", "node_modules", "site-packages", "__pycache__")
#: Words of an argument's metavar that stand for a YAML file.
YAML_ARGUMENTS = ("CONFIG", "PIPELINE", "SWEEP")


class Completion(NamedTuple):
    """What is offered, with the attributes that Typer's shells read; its own class has no public name.

    Attributes:
        value: What stands in the place of what was typed.
        help: What shells that can do so show beside it.
        type: Always `plain`: text, and no file for the shell to look for.
    """

    value: str
    help: str | None = None
    type: str = "plain"


def config_files(incomplete: str) -> list[str]:
    """Returns the YAML files below the working directory, or the directory that is typed, which begin with it."""
    if "=" in incomplete:
        return []
    folder = os.path.dirname(incomplete)
    files = (os.path.normpath(path) if not folder else path for path in _yaml_files(folder or ".", DEPTH))
    found: list[str] = []
    for path in files:
        if path.startswith(incomplete):
            found.append(path)
            if len(found) == MOST:
                break
    return found


def _yaml_files(folder: str, depth: int) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in PASSED_OVER:
            continue
        path = os.path.join(folder, entry.name)
        if entry.is_file() and entry.name.endswith((".yaml", ".yml")):
            yield path
        elif depth > 1 and entry.is_dir(follow_symlinks=False):
            yield from _yaml_files(path, depth - 1)


def _gpus() -> list[str]:
    from theworld_train.accounting.gpus import gpu_specs

    return [spec.name for spec in gpu_specs()]


def _strategies() -> list[str]:
    from theworld_train.config.schema import OFFLOADING

    return list(OFFLOADING["none"])


def _offloads() -> list[str]:
    from theworld_train.config.schema import OFFLOADING

    return list(OFFLOADING)


def _ablations() -> list[str]:
    from theworld_train.config.schema import ABLATIONS, FRAME_ABLATIONS

    return [*ABLATIONS, *FRAME_ABLATIONS]


def _components() -> list[str]:
    from theworld_train.config.components import Component

    return [component.value for component in Component]


#: Names that options take, by the option; those of `--gpu` and `--strategy` may be several with commas.
OPTION_NAMES: dict[str, Callable[[], list[str]]] = {
    "--gpu": _gpus,
    "--strategy": _strategies,
    "--offload": _offloads,
    "--ablation": _ablations,
    "--only": _components,
}


def complete_values(command: AnyCommand) -> None:
    """Lets the values of a command's arguments and options be completed.

    Args:
        command: The command; by the metavars of its arguments and the names of its options.
    """
    for parameter in command.params:
        complete: Callable[[str], list[str]] | None = None
        if parameter.param_type_name == "argument":
            metavar = getattr(parameter, "metavar", None) or ""
            if any(word in metavar for word in YAML_ARGUMENTS):
                complete = config_files
        else:
            names = next((OPTION_NAMES[option] for option in parameter.opts if option in OPTION_NAMES), None)
            complete = partial(_last_of_list, names) if names is not None else None
        if complete is not None:
            parameter.shell_complete = partial(_items, complete)  # type: ignore[assignment]


def _items(complete: Callable[[str], list[str]], _: Context, incomplete: str) -> list[Completion]:
    return [Completion(value) for value in complete(incomplete)]


def _last_of_list(names: Callable[[], list[str]], incomplete: str) -> list[str]:
    """Completes the last name of a list with commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in names() if name.startswith(last)]
