"""Published figures about TheWorld and its relatives, each beside our own value, which is computed and never stored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from theworld_train.accounting.expressions import Number, evaluate
from theworld_train.accounting.resources import table

_SCALES = {"": 1.0, "x": 1.0, "s": 1.0, "%": 0.01, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "GB": 1e9, "GiB": 2.0**30}
_PUBLISHED = re.compile(r"(?P<digits>[\d,]+)(?:\.(?P<decimals>\d+))?(?:e(?P<exponent>\d+))? ?(?P<unit>[A-Za-z%]*)")


class Agreement(StrEnum):
    """How a published value and ours agree."""

    EQUAL = "equal"
    ROUNDED = "equal after rounding"
    TRUNCATED = "equal after cutting digits off"
    DIFFERENT = "different"
    NOT_COMPUTED = "not computed by this version"
    OURS_ALONE = "nothing published"


@dataclass(frozen=True)
class Value:
    """One number of a figure.

    Attributes:
        label: What it counts.
        published: The number as it was published, with its unit; None where we add one of our own.
        expression: How ours is computed; None where this version does not compute it.
        unit: Unit in which ours is shown.
        ours: Our value; None where this version does not compute it.
        agreement: How the two agree.
        expected: How they are known to agree; anything else is a fault of ours.
    """

    label: str
    published: str | None
    expression: str | None
    unit: str
    ours: Number | None
    agreement: Agreement
    expected: Agreement

    @property
    def holds(self) -> bool:
        """Whether the two agree as they are known to."""
        return self.agreement is self.expected


@dataclass(frozen=True)
class Figure:
    """A published figure: its numbers, and what they really count."""

    title: str
    values: tuple[Value, ...]
    explanation: str


@dataclass(frozen=True)
class Group:
    """Figures from one place or on one subject."""

    title: str
    about: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Quantity:
    """A number that several expressions share."""

    name: str
    expression: str
    value: Number
    meaning: str


def quantities() -> tuple[Quantity, ...]:
    """Returns the shared numbers, each computed from those before it."""
    names: dict[str, Number] = {}
    result = []
    for entry in table("published_figures")["quantities"]:
        names[entry["name"]] = evaluate(entry["expression"], names)
        result.append(Quantity(entry["name"], entry["expression"], names[entry["name"]], entry["meaning"]))
    return tuple(result)


def published_figures() -> tuple[Group, ...]:
    """Returns every published figure with our value computed anew."""
    names = {quantity.name: quantity.value for quantity in quantities()}
    return tuple(
        Group(
            group["title"],
            group["about"],
            tuple(
                Figure(entry["figure"], tuple(_value(value, names) for value in entry["values"]), entry["explanation"])
                for entry in group["figures"]
            ),
        )
        for group in table("published_figures")["groups"]
    )


def broken(groups: Iterable[Group]) -> Iterator[str]:
    """Yields a line for every value that no longer agrees with the published one as it is known to."""
    for group in groups:
        for figure in group.figures:
            for value in figure.values:
                if not value.holds:
                    found = f"is {value.agreement} ({show(value)} beside {value.published})"
                    yield f"{figure.title}, {value.label}: {found}, but known as {value.expected}"


def compare(published: str, ours: Number) -> Agreement:
    """Returns how a published number, with its unit and as many digits as it has, agrees with ours."""
    amount, step = _parse(published)
    if ours == amount:
        return Agreement.EQUAL
    # A relative slack of 1e-9 keeps a value that lies on the edge of a digit from depending on floating point.
    if abs(ours - amount) <= step / 2 * (1 + 1e-9):
        return Agreement.ROUNDED
    if 0 <= ours - amount < step:
        return Agreement.TRUNCATED
    return Agreement.DIFFERENT


def show(value: Value) -> str:
    """Returns our value in its unit, whole numbers in full."""
    if value.ours is None:
        return ""
    if value.unit == "e":
        mantissa, exponent = f"{value.ours:.3e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if value.unit in ("%", "GiB", "GB"):
        return f"{value.ours / _SCALES[value.unit]:,.2f}{'' if value.unit == '%' else ' '}{value.unit}"
    text = f"{value.ours:,}" if isinstance(value.ours, int) else f"{value.ours:,.4g}"
    return text + (value.unit if value.unit in ("x", "s") else "")


def markdown() -> str:
    """Returns the page `docs/published-figures.md`."""
    page = table("published_figures")
    lines = ["# Published figures", "", *page["about"], ""]
    for group in published_figures():
        lines += [f"## {group.title}", "", group.about, ""]
        lines += ["| figure | number | published | ours | verdict |", "|---|---|---:|---:|---|"]
        notes = []
        for index, figure in enumerate(group.figures, start=1):
            lines += _rows(index, figure)
            notes.append(f"{index}. **{figure.title}**: {figure.explanation}")
        lines += ["", *notes, ""]
    lines += [
        "## How ours is computed",
        "",
        page["how"],
        "",
        "| name | value | computed as | meaning |",
        "|---|---:|---|---|",
    ]
    for quantity in quantities():
        value = f"{quantity.value:,}" if isinstance(quantity.value, int) else f"{quantity.value:.4g}"
        lines.append(f"| `{quantity.name}` | {value} | `{quantity.expression}` | {quantity.meaning} |")
    lines += ["", "| figure | number | computed as |", "|---|---|---|"]
    for group in published_figures():
        for figure in group.figures:
            for entry in figure.values:
                if entry.expression:
                    lines.append(f"| {figure.title} | {entry.label} | `{entry.expression}` |")
    return "\n".join(lines) + "\n"


def verdict(value: Value) -> str:
    """Returns how the two agree, with the difference where they do not: absolute if the published number is exact."""
    if value.agreement is not Agreement.DIFFERENT or value.published is None or value.ours is None:
        return str(value.agreement)
    amount = _parse(value.published)[0]
    difference = f"{value.ours - amount:+,.0f}" if value.unit == "" else f"{value.ours / amount - 1:+.2%}"
    return f"{value.agreement}: ours is {difference}"


def _rows(index: int, figure: Figure) -> Iterator[str]:
    for position, value in enumerate(figure.values):
        title = f"{index}. {figure.title}" if position == 0 else ""
        yield f"| {title} | {value.label} | {value.published or ''} | {show(value)} | {verdict(value)} |"


def _value(entry: dict[str, Any], names: dict[str, Number]) -> Value:
    published, expression = entry.get("published"), entry.get("expression")
    ours = evaluate(expression, names) if expression else None
    if ours is None:
        agreement = Agreement.NOT_COMPUTED
    elif published is None:
        agreement = Agreement.OURS_ALONE
    else:
        agreement = compare(published, ours)
    expected = Agreement[entry["expect"]] if "expect" in entry else agreement
    unit = entry.get("unit") or (_unit(published) if published else "")
    return Value(entry["label"], published, expression, unit, ours, agreement, expected)


def _unit(published: str) -> str:
    match = _PUBLISHED.fullmatch(published)
    assert match, published
    return "e" if match["exponent"] else match["unit"]


def _parse(published: str) -> tuple[float, float]:
    """Returns a published number and the worth of its last digit."""
    match = _PUBLISHED.fullmatch(published)
    assert match, published
    scale = _SCALES[match["unit"]] * 10.0 ** int(match["exponent"] or 0)
    decimals = match["decimals"] or ""
    amount = int(match["digits"].replace(",", "") + decimals) / 10 ** len(decimals)
    return amount * scale, scale / 10 ** len(decimals)
