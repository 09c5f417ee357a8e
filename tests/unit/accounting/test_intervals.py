"""Intervals have the values of the textbook, and do not depend on the order of what is added."""

from __future__ import annotations

import math
import random

import pytest

from theworld_train.accounting.intervals import ratio, share


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_shares_have_wilsons_interval(right: int, count: int, low: float, high: float):
    found = share(right, count)
    assert (found.value, found.right, found.count) == (right / count, right, count)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)
    mirrored = share(count - right, count)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_a_share_of_nothing_has_no_value():
    assert share(0, 0).to_dict() == {"value": None, "low": None, "high": None, "count": 0, "right": 0}


def test_a_mean_over_tokens_weighs_samples_by_their_length():
    assert ratio([2.0, 1.0], [4, 1]).value == 0.6
    same = ratio([1.0] * 10, [2] * 10)
    assert (same.value, same.low, same.high, same.count) == (0.5, 0.5, 0.5, 20), "samples that agree leave no doubt"
    # With one token each it is the mean, and its interval that of the mean.
    values = [0.1, 0.4, 0.4, 0.9]
    found = ratio(values, [1] * 4)
    deviation = math.sqrt(sum((value - 0.45) ** 2 for value in values) / 3)
    assert found.high - found.low == pytest.approx(2 * 1.959964 * deviation / 2, rel=1e-6)


def test_the_order_of_samples_changes_no_bit():
    draw = random.Random(0)
    pairs = [(draw.expovariate(1) * 10 ** draw.randint(-6, 6), draw.randint(1, 9)) for _ in range(500)]
    first = ratio(*zip(*pairs, strict=True))
    draw.shuffle(pairs)
    assert ratio(*zip(*pairs, strict=True)) == first


def test_what_cannot_be_said_is_left_out():
    assert ratio([], []).to_dict() == {"value": None, "low": None, "high": None, "count": 0}
    assert (ratio([3.0], [2]).value, ratio([3.0], [2]).low) == (1.5, None), "one sample says nothing of the others"
    assert ratio([math.nan, 1.0], [1, 1]).to_dict() == {"value": None, "low": None, "high": None, "count": 2}
