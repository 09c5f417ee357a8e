"""Translation of pydantic's errors into problems: the same facts in plain words, with the file and the dotted key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TypedDict

from pydantic import ValidationError

from theworld_train.config.errors import Problem, nearest
from theworld_train.config.layers import Findings, Merged
from theworld_train.config.outline import Node, Outline
from theworld_train.config.reading import KeyPath, dotted

_SHOWN_LENGTH = 80
_YES = ("yes", "on", "y", "1")
_NO = ("no", "off", "n", "0")


class _Error(TypedDict):
    """The parts of pydantic's error that are read here."""

    type: str
    loc: tuple[str | int, ...]
    input: object
    ctx: Mapping[str, object]


def add_problems(error: ValidationError, outline: Outline, merged: Merged, findings: Findings) -> None:
    """Adds the problems of a failed validation.

    Args:
        error: What pydantic found.
        outline: The keys of the config.
        merged: The tree that was validated.
        findings: Takes the problems, except for those at keys that are settled.
    """
    translator = _Translator(outline, merged)
    for raw in error.errors(include_url=False):
        part = _Error(type=raw["type"], loc=raw["loc"], input=raw["input"], ctx=raw.get("ctx", {}))
        is_component = part["loc"][-1:] == ("[key]",)
        where, _ = outline.locate(part["loc"][:-1] if is_component else part["loc"])
        if findings.covers(where):
            continue
        path, problem = translator.translate(part)
        if not findings.covers(path):
            findings.note(problem)
        # A component that does not exist is one problem, whatever its settings are.
        if is_component:
            findings.settled.add(where)


def _shown(value: object) -> object | None:
    """Returns a value as an error may show it: whole if short, cut if it is long text, not at all otherwise."""
    if isinstance(value, str) and len(value) > _SHOWN_LENGTH:
        return value[:_SHOWN_LENGTH] + "..."
    return value if not isinstance(value, dict | list) or len(repr(value)) <= _SHOWN_LENGTH else None


class _Translator:
    def __init__(self, outline: Outline, merged: Merged) -> None:
        self._outline = outline
        self._merged = merged

    def translate(self, error: _Error) -> tuple[KeyPath, Problem]:
        """Returns the key path that an error is about, and the problem."""
        special: dict[str, Callable[[_Error], tuple[KeyPath, Problem]]] = {
            "extra_forbidden": self._unknown,
            "missing": self._missing,
            "value_error": self._contradiction,
            "union_tag_invalid": self._variant,
            "union_tag_not_found": self._variant,
        }
        if error["loc"][-1:] == ("[key]",):
            return self._unknown(error)
        return special.get(error["type"], self._mistyped)(error)

    def _unknown(self, error: _Error) -> tuple[KeyPath, Problem]:
        loc = error["loc"]
        is_component = loc[-1] == "[key]"
        path, _ = self._outline.locate(loc[:-1] if is_component else loc)
        message = "unknown component" if is_component else "unknown key" + self._of_variant(path)
        hint = self._outline.suggest(loc[:-1] if is_component else loc)
        return path, Problem(message, source=self._merged.source_of(path), key=dotted(path), hint=hint)

    def _of_variant(self, path: KeyPath) -> str:
        """Says which variant of a union does not know a key, as another one may know it."""
        if not self._outline.knows([str(part) for part in path]):
            return ""
        section: object = self._merged.data
        for part in path[:-1]:
            section = section.get(str(part)) if isinstance(section, dict) else None
        source = section.get("source") if isinstance(section, dict) else None
        return f" when source is '{source}'"

    def _missing(self, error: _Error) -> tuple[KeyPath, Problem]:
        if isinstance(error["loc"][-1], int):
            # A tuple that is too short: the list is wrong, not the place of the value that it lacks.
            return self._mistyped(_Error(type="", loc=error["loc"][:-1], input=error["input"], ctx={}))
        path, node = self._outline.locate(error["loc"])
        expected = f", expected {self._outline.describe(node)}" if node is not None else ""
        source = self._merged.source_of_missing(path)
        return path, Problem(f"is required but not stated{expected}", source=source, key=dotted(path))

    def _contradiction(self, error: _Error) -> tuple[KeyPath, Problem]:
        path, _ = self._outline.locate(error["loc"])
        message = str(error["ctx"]["error"])
        source = self._merged.last_source_of(self._named(path, message) or [path])
        return path, Problem(message, source=source, key=dotted(path) or None)

    def _named(self, section: KeyPath, message: str) -> list[KeyPath]:
        """Returns the keys that a message names, by their dotted names or those in the section that it is about."""
        words = set(re.findall(r"[a-z_0-9]+(?:\.[a-z_0-9]+)*", message))
        prefix = f"{dotted(section)}." if section else ""
        sections = {key.rpartition(".")[0] for key in self._outline.known_keys}
        names = {word for word in words if "." in word} | {prefix + word for word in words}
        return [tuple(key.split(".")) for key in self._outline.known_keys if key in names and key not in sections]

    def _variant(self, error: _Error) -> tuple[KeyPath, Problem]:
        section, node = self._outline.locate(error["loc"])
        assert node is not None
        key, tags = self._outline.discriminator(node)
        path = (*section, key)
        expected = f"expected one of {', '.join(tags)}"
        if error["type"] == "union_tag_not_found":
            source = self._merged.source_of_missing(path)
            return path, Problem(f"is required but not stated, {expected}", source=source, key=dotted(path))
        section_value = error["input"]
        # Pydantic's own `tag` is the value written as text.
        tag = section_value.get(key) if isinstance(section_value, dict) else None
        return path, self._wrong(path, expected, tag, _near_hint(tag, tags))

    def _mistyped(self, error: _Error) -> tuple[KeyPath, Problem]:
        path, node = self._outline.locate(error["loc"])
        assert node is not None, f"pydantic judged {dotted(path)}, which the schema does not know"
        value = error["input"]
        expected = f"expected {self._outline.describe(node)}"
        if value is None:
            expected += ", not null"
        return path, self._wrong(path, expected, value, self._hint(node, value))

    def _wrong(self, path: KeyPath, expected: str, value: object, hint: str | None) -> Problem:
        return Problem(expected, source=self._merged.source_of(path), key=dotted(path), value=_shown(value), hint=hint)

    def _hint(self, node: Node, value: object) -> str | None:
        choices = self._outline.choices(node)
        if choices:
            return _near_hint(value, choices)
        hints: dict[str, Callable[[object], str | None]] = {
            "integer": _integer_hint,
            "number": _number_hint,
            "boolean": _boolean_hint,
            "string": _text_hint,
            "array": _list_hint,
        }
        kind = self._outline.kind(node)
        if kind == "object" and value is None and "required" not in node:
            return "write {} for the defaults"
        return hints[kind](value) if kind in hints else None


def _near_hint(value: object, choices: list[str]) -> str | None:
    near = nearest(value, choices) if isinstance(value, str) else None
    return f"did you mean '{near}'?" if near else None


def _integer_hint(value: object) -> str | None:
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        return f"write {int(value)}"
    return _number_hint(value)


def _number_hint(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    if re.match(r"[-+]?0\d", value):
        return "write it without leading zeros"
    try:
        return "write it without quotes" if math.isfinite(float(value)) else None
    except ValueError:
        return None


def _boolean_hint(value: object) -> str | None:
    word = str(value).lower()
    if word in ("true", "false"):
        return "write it without quotes"
    return "write true" if word in _YES else "write false" if word in _NO else None


def _text_hint(value: object) -> str | None:
    return "put it in quotes to make it text" if isinstance(value, bool | int | float) else None


def _list_hint(value: object) -> str | None:
    return None if value is None or isinstance(value, dict | list) else f"write [{value}]"
