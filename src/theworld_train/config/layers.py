"""Layers: the files of an `extends` chain and the overrides of a command line, merged into one tree.

The rules, in the order in which they apply:

- `extends:` names one file or a list of files, relative to the file that states it. Those come first, in their order,
  and the file itself last; a file that is reached twice counts once, where it is reached first.
- Mappings merge key by key; everything else, lists included, is replaced. `null` is a value like any other.
- `trainable` is a unit: a file that states it replaces the whole table. Of overrides, `trainable.vision_tower.lr=1e-5`
  changes an entry, `trainable.vision_tower={}` replaces the entry, and `trainable={...}` the table.
- `data.train` and `data.eval` are replaced as a whole by a layer that states another `source` than the one before.
- A layer that trains other components than the layers before it restates `expect_trainable`, if those stated it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from theworld_train.config.credentials import looks_secret, secret_problem, take_out_secrets
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.outline import Outline
from theworld_train.config.reading import KeyPath, read_file, read_text

COMMAND_LINE = "command line"

#: `key=value` arguments, or the same as a mapping from dotted keys to values.
Overrides = Sequence[str] | Mapping[str, object]

_TRAINABLE: KeyPath = ("trainable",)
_SOURCES: tuple[KeyPath, ...] = (("data", "train"), ("data", "eval"))
_DOTTED_KEY = re.compile(r"[\w-]+(?:\.[\w-]+)*")
_FORM = "write key=value, such as optimizer.lr=3e-4"


@dataclass(frozen=True)
class Layer:
    """What one file, or the command line, states.

    Attributes:
        data: The values.
        source: The file's path, or `command line`.
        whole: Key paths of mappings that replace what is there instead of merging with it.
    """

    data: dict[str, object]
    source: str
    whole: frozenset[KeyPath] = frozenset()


@dataclass
class Findings:
    """Problems found so far.

    Attributes:
        problems: The problems.
        settled: Key paths about which enough has been said: problems found there later are consequences.
    """

    problems: list[Problem] = field(default_factory=list)
    settled: set[KeyPath] = field(default_factory=set)

    def note(self, problem: Problem) -> None:
        """Adds a problem, once: overrides may be repeated, and a tuple that lacks two values is short twice."""
        if problem not in self.problems:
            self.problems.append(problem)

    def add(self, path: KeyPath, problem: Problem) -> None:
        """Adds a problem of a key and settles the key."""
        self.note(problem)
        self.settled.add(path)

    def covers(self, path: KeyPath) -> bool:
        """Says whether a key, or a section that it is in, is settled."""
        return any(path[:length] in self.settled for length in range(1, len(path) + 1))


@dataclass
class Merged:
    """The layers as one tree.

    Attributes:
        data: The tree.
        main: The source that is to blame for what nobody states.
    """

    main: str
    data: dict[str, object] = field(default_factory=dict)
    _order: list[str] = field(default_factory=list)
    _stated_by: dict[KeyPath, str] = field(default_factory=dict)
    _opened_by: dict[KeyPath, str] = field(default_factory=dict)

    def source_of(self, path: KeyPath) -> str:
        """Returns the layer that stated a value, or, of a mapping, the last one that touched it."""
        return self._nearest(self._stated_by, path)

    def source_of_missing(self, path: KeyPath) -> str:
        """Returns the layer that should have stated a key: the one that first stated the section that it belongs to."""
        return self._nearest(self._opened_by, path)

    def last_source_of(self, paths: Iterable[KeyPath]) -> str:
        """Returns the last of the layers that stated some values: the one that made them contradict each other."""
        sources = [self.source_of(path) for path in paths]
        return max(sources, key=lambda source: self._order.index(source) if source in self._order else -1)

    def add(self, layer: Layer) -> None:
        """Merges a layer over those before it."""
        self._order.append(layer.source)
        for key, value in layer.data.items():
            self.data[key] = self._placed(self.data.get(key), value, (key,), layer)

    def _nearest(self, sources: dict[KeyPath, str], path: KeyPath) -> str:
        lengths = range(len(path), 0, -1)
        return next((sources[path[:length]] for length in lengths if path[:length] in sources), self.main)

    def _placed(self, old: object, new: object, path: KeyPath, layer: Layer) -> object:
        merges = isinstance(old, dict) and isinstance(new, dict) and not _replaces(old, new, path, layer)
        if not merges:
            self._forget(path)
        self._stated_by[path] = layer.source
        self._opened_by.setdefault(path, layer.source)
        if not isinstance(new, dict):
            return new
        kept: dict[str, object] = dict(old) if merges and isinstance(old, dict) else {}
        return kept | {key: self._placed(kept.get(key), item, (*path, key), layer) for key, item in new.items()}

    def _forget(self, path: KeyPath) -> None:
        for sources in (self._stated_by, self._opened_by):
            for known in [known for known in sources if known[: len(path)] == path]:
                del sources[known]


def read_layers(path: str, findings: Findings) -> list[Layer]:
    """Reads a file and all that it extends.

    Args:
        path: The file.
        findings: Takes the problems that leave the files readable.

    Returns:
        The layers, those that are overridden first.

    Raises:
        ConfigError: if a file cannot be read, or the chain leads back to a file of its own.
    """
    layers: dict[str, Layer] = {}
    failures: list[Problem] = []
    _collect(path, (), layers, findings, failures)
    if failures:
        # Without all its files the tree has holes, and every hole would be one false problem more.
        raise ConfigError([*findings.problems, *failures])
    return list(layers.values())


def override_layer(overrides: Overrides, outline: Outline, source: str, findings: Findings) -> Layer:
    """Makes a layer of overrides; a later one wins over an earlier one, and a section over its keys.

    Args:
        overrides: `key=value` texts, whose values are YAML, or dotted keys and plain values.
        outline: The keys that there are.
        source: Where the overrides come from.
        findings: Takes the problems; an override that has one is left out.

    Returns:
        The layer.
    """
    tree: dict[str, object] = {}
    whole: set[KeyPath] = set()
    for key, value in _assignments(overrides, source, findings):
        path = tuple(key.split("."))
        if looks_secret(key, value):
            findings.add(path, secret_problem(source, key))
        elif path == ("extends",):
            findings.add(path, Problem("`extends` is for files, it cannot be overridden", source=source, key=key))
        elif not outline.knows(path):
            findings.add(path, Problem("unknown key", source=source, key=key, hint=outline.suggest(path)))
        else:
            _set(tree, path, value)
            if path[0] in _TRAINABLE and isinstance(value, dict):
                whole.add(path)
    data, secrets = take_out_secrets(tree, source)
    for secret_path, problem in secrets.items():
        findings.add(secret_path, problem)
    return Layer(data, source, frozenset(whole))


def merge(layers: Sequence[Layer], main: str, findings: Findings) -> Merged:
    """Merges layers into one tree and checks that `expect_trainable` belongs to the table that results.

    Args:
        layers: The layers, those that are overridden first.
        main: The file that the user named.
        findings: Takes the problem of an `expect_trainable` that is out of date.

    Returns:
        The tree.
    """
    merged = Merged(main)
    outdated_by: str | None = None
    for layer in layers:
        before = _trained(merged.data)
        merged.add(layer)
        if before and _trained(merged.data) != before:
            outdated_by = layer.source
        if "expect_trainable" in layer.data:
            outdated_by = None
    expected = merged.data.get("expect_trainable")
    if outdated_by is not None and expected is not None:
        stated_in = merged.source_of(("expect_trainable",))
        message = f"must be restated: `trainable` is changed here, and {expected} belongs to the table in {stated_in}"
        hint = "state the number of the new table, or null to run without the check"
        findings.add(("expect_trainable",), Problem(message, source=outdated_by, key="expect_trainable", hint=hint))
    return merged


def _collect(
    path: str, chain: tuple[str, ...], layers: dict[str, Layer], findings: Findings, failures: list[Problem]
) -> None:
    """Adds a file's layer after those of the files that it extends, by real path."""
    identity = os.path.realpath(path)
    if identity in (os.path.realpath(link) for link in chain):
        circle = " -> ".join((*chain, path))
        failures.append(Problem(f"the files extend each other in a circle: {circle}", source=chain[-1], key="extends"))
        return
    if identity in layers:
        return
    try:
        document = read_file(path)
    except ConfigError as error:
        failures.extend(_blame(problem, chain) for problem in error.problems)
        return
    assert isinstance(document.data, dict)
    data, secrets = take_out_secrets(document.data, path)
    findings.problems += [*document.problems, *secrets.values()]
    findings.settled |= document.bad_keys | secrets.keys()
    for parent in _parents(data.pop("extends", None), path, failures):
        _collect(parent, (*chain, path), layers, findings, failures)
    layers[identity] = Layer(data, path, frozenset({_TRAINABLE}))


def _blame(problem: Problem, chain: tuple[str, ...]) -> Problem:
    """Says of a file that cannot be read which file extends it."""
    if not chain:
        return problem
    return Problem(f"{problem.source}: {problem.message}", source=chain[-1], key="extends", hint=problem.hint)


def _parents(stated: object, path: str, failures: list[Problem]) -> list[str]:
    """Returns the files that a file extends, as paths of their own."""
    stated = stated if isinstance(stated, list) else [] if stated is None else [stated]
    names = [name for name in stated if isinstance(name, str) and name]
    if len(names) < len(stated):
        failures.append(Problem("expected a path or a list of paths", source=path, key="extends"))
    return [os.path.normpath(os.path.join(os.path.dirname(path), name)) for name in names]


def _assignments(overrides: Overrides, source: str, findings: Findings) -> list[tuple[str, object]]:
    """Splits overrides into keys and values, and reports those that have another form."""
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs: list[tuple[str, object]] = []
    for text in [overrides] if isinstance(overrides, str) else overrides:
        key, sign, value = text.partition("=")
        if looks_secret(key, value) or looks_secret(None, text):
            findings.note(secret_problem(source, key))
        elif not sign or not value.strip() or not _DOTTED_KEY.fullmatch(key):
            findings.note(Problem("malformed override", source=source, value=text, hint=_FORM))
        else:
            pairs += _parsed(key, value, source, findings)
    return pairs


def _parsed(key: str, text: str, source: str, findings: Findings) -> list[tuple[str, object]]:
    """Reads the YAML value of one override; returns nothing if it is no YAML."""
    try:
        document = read_text(text, source)
    except ConfigError as error:
        problems = error.problems
    else:
        problems = document.problems
        if not problems:
            return [(key, document.data)]
    for problem in problems:
        inside = f"{key}.{problem.key}" if problem.key else key
        findings.add(tuple(key.split(".")), Problem(problem.message, source=source, key=inside, hint=problem.hint))
    return []


def _set(tree: dict[str, object], path: Sequence[str], value: object) -> None:
    for part in path[:-1]:
        inner = tree.get(part)
        if not isinstance(inner, dict):
            inner = tree[part] = {}
        tree = inner
    tree[path[-1]] = value


def _replaces(old: dict[str, object], new: dict[str, object], path: KeyPath, layer: Layer) -> bool:
    """Says whether a mapping takes the other's place instead of merging with it."""
    if path in layer.whole:
        return True
    return path in _SOURCES and "source" in new and new["source"] != old.get("source")


def _trained(data: dict[str, object]) -> set[str]:
    table = data.get("trainable")
    return set(table) if isinstance(table, dict) else set()
