"""Reads what runs leave on disk, as far as it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theworld_train.config.errors import ConfigError
from theworld_train.config.reading import read_file


@dataclass(frozen=True)
class Lines:
    """The rows of a JSONL file.

    Attributes:
        rows: Those that could be read.
        damaged: Number of the others, a torn last one not counted.
        torn: Whether the last one was being written when its writer ended.
    """

    rows: tuple[dict[str, Any], ...]
    damaged: int = 0
    torn: bool = False

    def remarks(self, name: str) -> list[str]:
        """Says what was left out."""
        said = []
        if self.torn:
            said.append(
                f"The last line of {name} is incomplete, as its writer was stopped or is at work; it is left out."
            )
        if self.damaged:
            lines = "line is" if self.damaged == 1 else "lines are"
            said.append(f"{self.damaged} damaged {lines} left out of {name}.")
        return said


def read_lines(path: Path) -> Lines:
    """Reads a JSONL file; one that is missing has no lines."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Lines(())
    rows: list[dict[str, Any]] = []
    damaged, torn = 0, False
    lines = text.split("\n")
    for index, line in enumerate(lines):
        row = _parsed(line)
        if row is not None:
            rows.append(row)
        elif line.strip():
            # What follows the last line break was being written.
            torn |= index == len(lines) - 1
            damaged += index < len(lines) - 1
    return Lines(tuple(rows), damaged, torn)


def read_json(path: Path, remarks: list[str]) -> dict[str, Any] | None:
    """Reads a JSON object.

    Args:
        path: The file.
        remarks: Takes in a sentence if the file is there and cannot be read.

    Returns:
        The object, or None if it is missing or cannot be read.
    """
    try:
        if not path.is_file():
            return None
        value = _parsed(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        remarks.append(f"{path.name} cannot be read: {error.strerror}.")
        return None
    if value is None:
        remarks.append(f"{path.name} is damaged and left out.")
    return value


def read_yaml(path: Path, remarks: list[str]) -> dict[str, Any]:
    """Reads a config as plain data, empty if it is missing or cannot be read.

    The schema is not asked: a report shall be possible of a run that another version has written.

    Args:
        path: The file.
        remarks: Takes in a sentence if the file is there and cannot be read.
    """
    try:
        if not path.is_file():
            return {}
        data = read_file(str(path)).data
    except (ConfigError, OSError):
        remarks.append(f"{path.name} is damaged and left out.")
        return {}
    assert isinstance(data, dict)
    return data


def part(row: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """Returns the object that a key holds, empty if it holds none."""
    value = None if row is None else row.get(key)
    return {str(name): each for name, each in value.items()} if isinstance(value, Mapping) else {}


def items(row: Mapping[str, Any] | None, key: str) -> list[Any]:
    """Returns the list that a key holds, empty if it holds none."""
    value = None if row is None else row.get(key)
    return value if isinstance(value, list) else []


def objects(row: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Returns the objects of the list that a key holds."""
    return [value for value in items(row, key) if isinstance(value, dict)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested mappings as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _whole(digits: str) -> int | float:
    """Parses a whole number; one that no float can hold becomes infinite, as larger ones with a point do."""
    return int(digits) if len(digits) < 300 else float(digits)


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
