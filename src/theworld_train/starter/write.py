"""Writes the skeleton of a project into a directory; nothing that is there is touched."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import yaml
from jinja2 import Environment

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.starter.example import example_files

#: Files that are listed when they are in the way; the rest are counted.
LISTED = 5


@dataclass(frozen=True)
class Project:
    """What a skeleton is made of.

    Attributes:
        directory: Where it goes.
        tiny: Whether its configs are for the tiny model.
        data: The user's own rows; drawn examples are written if absent.
        eval_data: Held-out rows of the user's own; nothing is measured if absent.
    """

    directory: Path
    tiny: bool = False
    data: Path | None = None
    eval_data: Path | None = None


def write_project(project: Project) -> list[str]:
    """Writes a project.

    Args:
        project: What it is made of.

    Returns:
        The paths of the files that were written, relative to the directory.

    Raises:
        ConfigError: If any of them is there already, or cannot be written; then nothing has been.
    """
    contents = project_files(project)
    target = project.directory
    taken = [name for name in contents if os.path.lexists(target / name)]
    if taken:
        more = f" and {len(taken) - LISTED} more" if len(taken) > LISTED else ""
        message = f"holds {', '.join(taken[:LISTED])}{more}; nothing is overwritten"
        raise ConfigError(Problem(message, source=str(target), hint="name another directory"))
    try:
        for name, content in contents.items():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(content)
    except OSError as error:
        raise ConfigError(Problem(f"cannot be written: {error.strerror}", source=str(error.filename))) from error
    return list(contents)


def project_files(project: Project) -> dict[str, bytes]:
    """Returns what a project consists of: paths and contents.

    Raises:
        ConfigError: If the user's own file cannot be trained on.
    """
    templates = files(__package__) / "templates"
    values: dict[str, object] = {"tiny": project.tiny, "name": project.directory.resolve().name, "own": False}
    if project.data is not None:
        values |= {"own": True, "train": _source(project, project.data, "--data"), "eval": "null"}
    if project.eval_data is not None:
        if project.data is None:
            raise ConfigError(Problem("goes with --data, the rows to train on", key="--eval"))
        values |= {"eval": _source(project, project.eval_data, "--eval")}
    contents = {
        "README.md": _rendered(templates / "README.md.jinja", values),
        ".gitignore": (templates / "gitignore").read_bytes(),
        "configs/base/data.yaml": _rendered(templates / "data.yaml.jinja", values),
    }
    contents |= _tree(templates / ("tiny" if project.tiny else "real"), "")
    if project.data is None:
        contents |= dict(example_files())
    return dict(sorted(contents.items()))


def _source(project: Project, data: Path, option: str) -> str:
    """Returns the section of a config that reads a file of rows."""
    path = _as_seen_from(project.directory, data)
    return f"{{source: {source_of(data, option)}, path: {_quoted(path)}}}"


def source_of(data: Path, option: str = "--data") -> str:
    """Tells which source reads a file of rows, by its name and its first row.

    Args:
        data: The file.
        option: What has named it, for problems.

    Returns:
        `jsonl`, `parquet`, `llava` or `sharegpt`.

    Raises:
        ConfigError: If the file is not there, or its first row is a conversation in none of these formats.
    """
    if not data.is_file():
        raise ConfigError(Problem("no such file", key=option, value=str(data)))
    if data.suffix == ".parquet":
        return "parquet"
    row = _first_row(data)
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return "jsonl"
        if isinstance(row.get("conversations"), list):
            return "sharegpt" if "images" in row or "videos" in row else "llava"
    hint = "docs/data.md describes the formats, and the sources for others"
    message = "its first row is no conversation: expected a JSON object with messages"
    raise ConfigError(Problem(message, key=option, value=str(data), hint=hint))


def _first_row(data: Path) -> object:
    """Returns the first row of a JSONL file or a JSON array; None if it cannot be read."""
    try:
        with data.open(encoding="utf-8") as file:
            if data.suffix == ".json":
                # The first object of an array, which may be too large to be read whole.
                text = file.read(1 << 20).lstrip().removeprefix("[").lstrip()
                return json.JSONDecoder().raw_decode(text)[0]
            return json.loads(next(line for line in file if line.strip()))
    except (OSError, ValueError, StopIteration):
        return None


def _as_seen_from(directory: Path, data: Path) -> str:
    """Returns the path by which a file is reached from the project: relative if it lies inside, or else absolute."""
    relative = os.path.relpath(data.resolve(), directory.resolve())
    return str(data.resolve()) if relative.startswith(os.pardir) else relative


def _quoted(path: str) -> str:
    """Returns a path as YAML, in quotes where it needs them inside of a flow mapping."""
    return path if re.fullmatch(r"[\w./-]+", path) else yaml.dump(path, default_style='"', width=1 << 30).strip()


def _rendered(template: Traversable, values: dict[str, object]) -> bytes:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(template.read_text(encoding="utf-8")).render(values).encode()


def _tree(folder: Traversable, prefix: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for item in folder.iterdir():
        name = f"{prefix}{item.name}"
        found |= _tree(item, f"{name}/") if item.is_dir() else {name: item.read_bytes()}
    return found
