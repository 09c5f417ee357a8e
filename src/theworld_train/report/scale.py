"""Axes: where a value lies on one, and where its ticks are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Ratio of the largest to the smallest value from which on an axis becomes logarithmic, if it may.
LOG_RATIO = 50


@dataclass(frozen=True)
class Scale:
    """An axis from its lowest to its highest value.

    Attributes:
        low: Lowest value.
        high: Highest value, which is larger.
        log: Whether equal distances are equal ratios.
    """

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Returns where a value lies: 0 at the lowest, 1 at the highest, and never outside."""
        if self.log:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, self.low))
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))

    def ticks(self, most: int = 5) -> list[float]:
        """Returns about so many round values on the axis."""
        return self._log_ticks(most) if self.log else self._linear_ticks(most)

    def _linear_ticks(self, most: int) -> list[float]:
        step = nice((self.high - self.low) / most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]

    def _log_ticks(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        factors: tuple[int, ...] = (1, 2, 5) if len(decades) <= 3 else (1,)
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if self.low * (1 - 1e-9) <= tick <= self.high * (1 + 1e-9)]
        return ticks[:: max(1, math.ceil(len(ticks) / (most + 2)))]


def nice(step: float) -> float:
    """Returns the next larger one of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def scale_for(values: Sequence[float], *, may_be_log: bool = False) -> Scale:
    """Returns the axis for finite values: logarithmic if it may be and they span much, else with zero if that is near.

    Args:
        values: Finite values; without any the axis goes from 0 to 1.
        may_be_log: Whether it may be logarithmic.
    """
    if not values:
        return Scale(0.0, 1.0)
    low, high = min(values), max(values)
    positive = [value for value in values if value > 0]
    if may_be_log and positive and len(positive) >= 0.9 * len(values) and high / min(positive) >= LOG_RATIO:
        return Scale(min(positive), high, log=True)
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    if high <= low:
        room = abs(high) * 0.1 or 1.0
        low, high = low - room if low else 0.0, high + room
    return Scale(low, high + (high - low) * 0.04)


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """Writes a tick as briefly as its neighbours allow: `0.02`, `20k`, `1e-4`."""
    largest = max(abs(tick) for tick in ticks)
    if not value:
        return "0"
    if largest >= 1e14 or abs(value) < 1e-3 * (1 - 1e-9):
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= 10 * unit and abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"
