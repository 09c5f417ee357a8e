"""The space of a sweep: each key with the values that it may take, checked before anything starts."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.sweep import MOST_GRID_VALUES, Dimension, SweepConfig
from theworld_train.sweep.target import Target, Values

#: Points that are loaded as configs before a sweep starts; of larger spaces each key is tried alone.
MOST_CHECKED = 256

#: What Optuna takes for a choice: a value itself, or other values as JSON.
Label = str | int | float | bool | None


@dataclass(frozen=True)
class Axis:
    """One key that is varied.

    Attributes:
        key: The dotted key.
        choices: Its values, if they are listed; a grid's always are.
        low: Lowest value of a range.
        high: Highest value of a range.
        log: Whether it is drawn by its logarithm.
        step: Distance of the range's values, if they have one.
        whole: Whether the key takes whole numbers.
    """

    key: str
    choices: tuple[object, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False

    @property
    def labels(self) -> list[Label]:
        """The listed values as Optuna takes them."""
        return [label_of(value) for value in self.choices or ()]

    def value_of(self, drawn: Label) -> object:
        """Returns the value that Optuna's choice or number stands for."""
        if self.choices is not None:
            # Equal numbers of other types are other labels: 1 is no true.
            known = {(type(label), label): value for label, value in zip(self.labels, self.choices, strict=True)}
            return known.get((type(drawn), drawn), drawn)
        assert isinstance(drawn, int | float)
        return int(drawn) if self.whole else float(drawn)

    def stepped(self) -> tuple[object, ...]:
        """Returns all values of a range that has a step, or of whole numbers."""
        step = self.step or 1.0
        number = math.floor((self.high - self.low) / step + 1e-9) + 1
        # 12 digits are what is left of 0.1 + 0.2.
        return tuple(self.value_of(float(f"{self.low + index * step:.12g}")) for index in range(number))

    def corners(self) -> tuple[object, ...]:
        """Returns the listed values, or the bounds."""
        return self.choices or (self.value_of(self.low), self.value_of(self.high))


def label_of(value: object) -> Label:
    """Returns a value as Optuna takes it: other things than words, numbers and nothing are written as JSON."""
    return value if value is None or isinstance(value, str | int | float | bool) else json.dumps(value)


def axes_of(sweep: SweepConfig, target: Target, source: str) -> tuple[Axis, ...]:
    """Returns the keys that a sweep varies.

    Args:
        sweep: The sweep.
        target: What is varied.
        source: The sweep's file, for problems.

    Raises:
        ConfigError: With every key that does not exist or cannot take what it is to be varied over.
    """
    axes: list[Axis] = []
    problems: list[Problem] = []
    for key, dimension in sweep.space.items():
        problem = target.problem(key)
        if problem is None:
            found = _axis(key, dimension, target, grid=sweep.search == "grid")
            if isinstance(found, Axis):
                axes.append(found)
                continue
            problem = found
        problems.append(replace(problem, source=f"{source}: space"))
    if problems:
        raise ConfigError(problems)
    return tuple(axes)


def _axis(key: str, dimension: Dimension, target: Target, *, grid: bool) -> Axis | Problem:
    if dimension.values is not None:
        return Axis(key, dimension.values)
    outline, path = target.outline(key)
    node = outline.locate(path)[1]
    kind = "" if node is None else outline.kind(node)
    if node is not None and kind not in ("integer", "number"):
        return Problem(f"takes {outline.describe(node)}, so it has no range", key=key, hint="list values: [...]")
    assert dimension.min is not None
    assert dimension.max is not None
    whole = kind == "integer"
    stated = {"min": dimension.min, "max": dimension.max, "step": dimension.step}
    for name, value in stated.items():
        if whole and value is not None and not float(value).is_integer():
            return Problem(f"takes whole numbers, and {name} is none", key=key, value=value)
    axis = Axis(key, None, dimension.min, dimension.max, dimension.log, dimension.step, whole)
    if not grid:
        return axis
    number = math.floor((axis.high - axis.low) / (axis.step or 1.0) + 1e-9) + 1
    if number > MOST_GRID_VALUES:
        return Problem(f"has {number:,} values, and a grid takes at most {MOST_GRID_VALUES:,}", key=key)
    return Axis(key, axis.stepped(), whole=whole)


def grid_size(axes: Sequence[Axis]) -> int:
    """Returns the number of points of a grid."""
    return math.prod(len(axis.choices or ()) for axis in axes)


def check_points(axes: Sequence[Axis], target: Target, source: str) -> None:
    """Makes configs of all combinations of values and bounds, or of each key's alone if they are many.

    Raises:
        ConfigError: With every problem of every point.
    """
    problems: list[Problem] = []
    for values in _points(axes):
        try:
            target.resolve(values, "trial", str(Path("runs") / "trial"), f"{source}: space")
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(problems)


def _points(axes: Sequence[Axis]) -> Iterator[Values]:
    if math.prod(len(axis.corners()) for axis in axes) > MOST_CHECKED:
        for axis in axes:
            yield from ({axis.key: value} for value in axis.corners())
        return
    for values in itertools.product(*(axis.corners() for axis in axes)):
        yield {axis.key: value for axis, value in zip(axes, values, strict=True)}
