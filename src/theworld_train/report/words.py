"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

GIB = 2**30
MIB = 2**20
ABSENT = "-"
#: Names of axes.
STEP = "optimizer step"
LOSS_UNIT = "nats per supervised token"


def number(row: Mapping[str, Any], key: str) -> float | None:
    """Returns a number of a row, which may be not finite; None if it is missing or no number."""
    value = row.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def whole(row: Mapping[str, Any], key: str) -> int | None:
    """Returns a whole number of a row, None if it is missing, no number or not finite."""
    value = number(row, key)
    return None if value is None or not math.isfinite(value) else int(value)


def finite(values: list[float | None]) -> list[float]:
    """Returns those of the values that are there and finite."""
    return [value for value in values if value is not None and math.isfinite(value)]


def short(value: float | None) -> str:
    """Writes a number with four significant digits: `0.06053`, `1.2e-05`, `13,094`."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return "not finite"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        digits, _, exponent = f"{value:.3e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def count(value: float | None) -> str:
    """Writes a whole number: `1,234`."""
    return ABSENT if value is None or not math.isfinite(value) else f"{value:,.0f}"


def share(value: float | None) -> str:
    """Writes a share as a percentage with one digit."""
    return ABSENT if value is None or not math.isfinite(value) else f"{value:.1%}"


def size(value: float | None) -> str:
    """Writes bytes as GiB, MiB or KiB."""
    if value is None or not math.isfinite(value):
        return ABSENT
    if not value:
        return "0"
    if value >= GIB:
        return f"{value / GIB:,.2f} GiB"
    return f"{value / MIB:,.1f} MiB" if value >= MIB else f"{value / 1024:,.1f} KiB"


def duration(seconds: float | None) -> str:
    """Writes seconds as people say them: `43 s`, `12 min 05 s`, `3 h 12 min`, `2 d 5 h`."""
    if seconds is None or not math.isfinite(seconds):
        return ABSENT
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def counted(number: int, thing: str) -> str:
    """Writes a number of things: `1 step`, `3 steps`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
