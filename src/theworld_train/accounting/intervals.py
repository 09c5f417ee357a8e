"""Measured values with 95% confidence intervals, samples being drawn independently of one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
#: Standard deviations on each side of a normal distribution's mean that hold that share of it.
Z = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value and the interval that it is likely to be in.

    Attributes:
        value: As measured; None if there was nothing to measure.
        low: Lower end of the interval.
        high: Upper end of the interval.
        count: What was measured: samples of a share, tokens of a loss.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the estimate as JSON-ready values, null for what is no finite number."""
        ends = {"value": self.value, "low": self.low, "high": self.high}
        finite = {name: end if end is not None and math.isfinite(end) else None for name, end in ends.items()}
        return {**finite, "count": self.count}


@dataclass(frozen=True)
class Share(Estimate):
    """A share of samples.

    Attributes:
        right: Samples that are in it.
    """

    right: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the share as JSON-ready values."""
        return {**super().to_dict(), "right": self.right}


def share(right: int, count: int) -> Share:
    """Returns a share with Wilson's score interval (Wilson 1927, JASA 22).

    Unlike the normal approximation it stays within 0 and 1, and has a width where all or none are right.

    Args:
        right: Samples that are in the share.
        count: All samples.
    """
    assert 0 <= right <= count, f"{right} of {count}"
    if not count:
        return Share(None, None, None, 0, right=0)
    value = right / count
    scale = 1 + Z**2 / count
    centre = (value + Z**2 / (2 * count)) / scale
    half = Z / scale * math.sqrt(value * (1 - value) / count + Z**2 / (4 * count**2))
    # At the ends the interval begins at the value itself, but for rounding.
    low = 0.0 if right == 0 else centre - half
    high = 1.0 if right == count else centre + half
    return Share(value, low, high, count, right=right)


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Returns the mean over all that samples hold, with a normal interval of a ratio of sums.

    Tokens of a sample depend on each other, and samples differ in length: the variance is that of the samples'
    deviations from the ratio (Cochran 1977, Sampling Techniques, section 6.4). Sums are exact, so that no order
    of the samples changes a bit of the result.

    Args:
        sums: Of each sample, such as the losses of its tokens.
        counts: Of each sample, such as the number of its tokens.
    """
    assert len(sums) == len(counts)
    total = sum(counts)
    if not total:
        return Estimate(None, None, None, 0)
    value = math.fsum(sums) / total
    number = len(sums)
    if number < 2 or not math.isfinite(value):
        return Estimate(value, None, None, total)
    squares = math.fsum((one - value * count) ** 2 for one, count in zip(sums, counts, strict=True))
    half = Z * math.sqrt(squares * number / (number - 1)) / total
    return Estimate(value, value - half, value + half, total)
