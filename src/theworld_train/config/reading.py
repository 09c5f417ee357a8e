"""Reading of YAML text: plain data and nothing else, with the surprises of YAML 1.1 taken out.

PyYAML reads `3e-4` as text, `on` as true and `010` as eight, keeps the last of two equal keys, and builds Python
objects from tags. Here numbers are the ones of YAML 1.2 (with `_` between digits), only `true` and `false` are
booleans, equal keys are errors, and no tag has a meaning beyond the plain types.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from theworld_train.config.errors import ConfigError, Problem, nearest

#: Mapping keys and list positions from the top of a config to a value.
KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _MERGE, _STR = (_TAG + name for name in ("null", "bool", "int", "float", "merge", "str"))

#: Far above any config; reached only when aliases of aliases multiply.
_MAX_NODES = 100_000


@dataclass(frozen=True)
class Document:
    """What a YAML text holds.

    Attributes:
        data: The value at its top, made of dict, list, str, int, float, bool and None alone.
        problems: What is wrong with the text, though it could be read.
        bad_keys: The dotted keys whose value in `data` is not to be judged any further.
    """

    data: object
    problems: tuple[Problem, ...] = ()
    bad_keys: frozenset[KeyPath] = frozenset()


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows the scalars of YAML 1.2's core schema; used for composing only, never for constructing."""


#: The plain scalars that are not text: tag, pattern, and the characters that they may begin with.
IMPLICIT_SCALARS: tuple[tuple[str, re.Pattern[str], list[str]], ...] = (
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(
            r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
    (_MERGE, re.compile(r"^<<$"), ["<"]),
)
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in IMPLICIT_SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


def dotted(path: Sequence[str | int]) -> str:
    """Writes a key path as users write it, such as `stages[0].config`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def read_file(path: str) -> Document:
    """Reads a YAML file.

    Args:
        path: The file; also the `source` of every problem.

    Returns:
        The file's content, whose top is a mapping.

    Raises:
        ConfigError: if the file is missing, unreadable, no YAML, or no mapping at its top.
    """
    document = read_text(_file_text(path), path)
    if document.data is None:
        raise ConfigError([*document.problems, Problem("the file is empty, expected `key: value` lines", source=path)])
    if not isinstance(document.data, dict):
        kind = "a list" if isinstance(document.data, list) else "a single value"
        message = f"the file holds {kind} at its top level, expected `key: value` lines"
        raise ConfigError([*document.problems, Problem(message, source=path)])
    return document


def read_text(text: str, source: str) -> Document:
    """Reads one YAML document.

    Args:
        text: The document.
        source: Where it comes from, for problems.

    Returns:
        The document's content.

    Raises:
        ConfigError: if the text is no YAML, or holds several documents.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        converter = _Converter(source)
        data = None if node is None else converter.convert(node, ())
    except yaml.YAMLError as error:
        raise ConfigError(Problem(_syntax_message(error), source=source)) from None
    except RecursionError:
        raise ConfigError(Problem("the YAML is nested too deeply", source=source)) from None
    return Document(data, tuple(converter.problems), frozenset(converter.bad_keys))


def _file_text(path: str) -> str:
    """Returns a file's text; every way in which that fails becomes a ConfigError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(Problem("there is no such file", source=path, hint=_nearest_file(path))) from None
    except IsADirectoryError:
        raise ConfigError(Problem("this is a directory, expected a YAML file", source=path)) from None
    except UnicodeDecodeError:
        raise ConfigError(Problem("the file is not UTF-8 text", source=path)) from None
    except OSError as error:
        raise ConfigError(Problem(f"cannot be read: {error.strerror}", source=path)) from None


def _nearest_file(path: str) -> str | None:
    """Names the file of the same directory whose name is nearest to that of `path`."""
    directory = Path(path).parent
    if not directory.is_dir():
        return f"there is no directory '{directory}' either"
    name = nearest(Path(path).name, sorted(entry.name for entry in directory.iterdir()))
    return f"did you mean '{os.path.join(os.path.dirname(path), name)}'?" if name else None


def _syntax_message(error: yaml.YAMLError) -> str:
    """Says what is wrong with a text that is no YAML, without quoting the text: the line may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return "not valid YAML: the text holds characters that YAML does not allow"
    mark = error.problem_mark
    tab = "; indent with spaces, not tabs" if "\\t" in (error.problem or "") else ""
    return f"not valid YAML: {error.problem} in line {mark.line + 1}, column {mark.column + 1}{tab}"


class _Converter:
    """Turns composed nodes into plain data and collects what is wrong on the way."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self.bad_keys: set[KeyPath] = set()
        self._open: set[int] = set()
        self._nodes = 0

    def convert(self, node: yaml.Node, path: KeyPath) -> object:
        """Returns the plain value of a node."""
        self._nodes += 1
        if id(node) in self._open or self._nodes > _MAX_NODES:
            raise ConfigError(self._problem(node, path, "the alias leads back to itself or multiplies without end"))
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                self._check_tag(node, path, _TAG + "seq")
                return [self.convert(item, (*path, index)) for index, item in enumerate(node.value)]
            assert isinstance(node, yaml.ScalarNode)
            return self._scalar(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, object]:
        self._check_tag(node, path, _TAG + "map")
        merged: dict[str, object] = {}
        own: dict[str, object] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                merged |= self._merged(value_node, path)
                continue
            key = self._key(key_node, path)
            if key is None:
                continue
            if key in lines:
                message = f"the key is stated twice, in lines {lines[key]} and {_line(key_node)}"
                self._report(Problem(message, source=self.source, key=dotted((*path, key))))
                continue
            lines[key] = _line(key_node)
            own[key] = self.convert(value_node, (*path, key))
        # YAML's merge key: what a mapping states itself wins over what it merges in.
        return {**merged, **own}

    def _merged(self, node: yaml.Node, path: KeyPath) -> dict[str, object]:
        value = self.convert(node, path)
        parts = value if isinstance(value, list) else [value]
        merged: dict[str, object] = {}
        for part in reversed(parts):
            if not isinstance(part, dict):
                self._report(self._problem(node, path, "`<<` merges mappings"))
                continue
            merged |= part
        return merged

    def _key(self, node: yaml.Node, path: KeyPath) -> str | None:
        if isinstance(node, yaml.ScalarNode) and node.tag == _STR:
            return str(node.value)
        shown = f", not {node.value}; put it in quotes" if isinstance(node, yaml.ScalarNode) else ""
        self._report(self._problem(node, path, f"keys are names{shown}"))
        return None

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> object:
        read = _READERS.get(node.tag)
        if read is None:
            self._check_tag(node, path, "")
            return node.value
        try:
            return read(node.value)
        except (ValueError, KeyError):
            # `!!int some words`: the text stays, and whoever expects a number says so.
            return node.value

    def _check_tag(self, node: yaml.Node, path: KeyPath, expected: str) -> None:
        if node.tag == expected:
            return
        tag = node.tag.replace(_TAG, "!!")
        self.bad_keys.add(path)
        self._report(self._problem(node, path, f"the tag {tag} is refused: configs hold plain values only"))

    def _problem(self, node: yaml.Node, path: KeyPath, message: str) -> Problem:
        return Problem(f"{message} (line {_line(node)})", source=self.source, key=dotted(path) or None)

    def _report(self, problem: Problem) -> None:
        # A node that several aliases name is converted several times, but its faults are one.
        if problem not in self.problems:
            self.problems.append(problem)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _integer(text: str) -> int:
    # Base 16 alone has a prefix here; `int(text, 0)` would also refuse `+5_000_` less plainly.
    return int(text, 16) if "x" in text else int(text)


def _number(text: str) -> float:
    # YAML writes `.inf` and `.nan`, Python `inf` and `nan`.
    return float(re.sub(r"\.(inf|nan)", r"\1", text.lower()))


_READERS: dict[str, Callable[[str], object]] = {
    _STR: str,
    _NULL: lambda _: None,
    _BOOL: lambda text: {"true": True, "false": False}[text.lower()],
    _INT: _integer,
    _FLOAT: _number,
    _MERGE: str,
}
