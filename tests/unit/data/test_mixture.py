"""Shares of a mixture are kept, every sample of a part comes in each of its epochs, and a step is a pure function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import MixtureSource
from theworld_train.data import UnreadableSampleError
from theworld_train.data.mixture import BLOCK, MixedSource, MixtureOrder, Part, parts_of

THREE = (Part("a", 5000, 5), Part("b", 300, 3), Part("c", 77, 2))


def drawn(order: MixtureOrder, samples: int, batch: int = 8) -> list[int]:
    return [index for step in range(samples // batch) for index in order.indices(step)]


def part_of(index: int, parts: tuple[Part, ...] = THREE) -> str:
    for part in parts:
        if index < part.size:
            return part.name
        index -= part.size
    raise AssertionError("no such sample")


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_those_of_the_weights(seed: int):
    counts = Counter(part_of(index) for index in drawn(MixtureOrder(THREE, seed, 8), 10_000))
    for name, weight in (("a", 0.5), ("b", 0.3), ("c", 0.2)):
        assert abs(counts[name] / 10_000 - weight) < 0.001, "well within the 1% that is promised"


def test_shares_come_out_even_though_a_block_cannot_hold_them():
    parts = (Part("a", 10, 1), Part("b", 10, 1), Part("c", 10, 1), Part("rare", 10, 1e-4))
    counts = Counter(part_of(index, parts) for index in drawn(MixtureOrder(parts, 0, 10), 30 * BLOCK, 10))
    assert counts["rare"] == pytest.approx(30 * BLOCK * 1e-4 / 3.0001, abs=1)
    assert max(counts[name] for name in "abc") - min(counts[name] for name in "abc") <= 2


def test_every_sample_of_a_part_comes_once_in_each_of_its_epochs():
    indices = drawn(MixtureOrder(THREE, 0, 8), 10_000)
    of_c = [index for index in indices if part_of(index) == "c"]
    epochs = [of_c[start : start + 77] for start in range(0, len(of_c) - 77, 77)]
    assert len(epochs) > 20
    assert all(sorted(epoch) == list(range(5300, 5377)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each in an order of its own"


def test_parts_are_shuffled_into_each_other():
    names = [part_of(index) for index in drawn(MixtureOrder(THREE, 0, 8), 2 * BLOCK)]
    longest = max(len(run) for run in "".join(name[0] for name in names).replace("b", "|").replace("c", "|").split("|"))
    assert longest < 30
    assert names[:BLOCK] != names[BLOCK:]


def test_a_step_does_not_depend_on_those_before_it():
    straight = MixtureOrder(THREE, 3, 48)
    expected = {step: straight.indices(step) for step in range(200)}
    for step in (199, 20, 21, 0, 130):
        assert MixtureOrder(THREE, 3, 48).indices(step) == expected[step]
    jumping = MixtureOrder(THREE, 3, 48)
    for step in (150, 3, 151, 152, 2):
        assert jumping.indices(step) == expected[step]


def test_the_order_is_pinned_so_that_an_upgrade_cannot_change_a_resumed_run():
    assert MixtureOrder(THREE, 0, 8).indices(0) == PINNED[0]
    assert MixtureOrder(THREE, 0, 8).indices(1000) == PINNED[1]


PINNED = ([2305, 5327, 5252, 5261, 2342, 4023, 2350, 5288], [5353, 136, 5368, 5003, 3100, 5226, 996, 182])


def test_what_was_drawn_is_told():
    order = MixtureOrder(THREE, 0, 8)
    counts = Counter(part_of(index) for index in drawn(order, 1200))
    assert order.shares(149) == {name: counts[name] / 1200 for name in "abc"}


def test_a_part_ends_after_its_epochs_and_the_others_take_over():
    parts = (Part("a", 5000, 1), Part("b", 100, 1, limit=250))
    order = MixtureOrder(parts, 0, 10)
    counts = Counter(part_of(index, parts) for index in drawn(order, 5000, 10))
    assert counts["b"] == 250, "all of them in the first block, and shuffled into it"
    assert order.capacity == float("inf")


def test_a_mixture_that_is_used_up_says_so():
    order = MixtureOrder((Part("a", 10, 1, limit=20), Part("b", 10, 3, limit=15)), 0, 5)
    assert order.capacity == 35
    assert len(drawn(order, 35, 5)) == 35
    with pytest.raises(ConfigError, match="all 35 samples"):
        order.indices(7)


# -- as a config and as a source --------------------------------------------------------------------------------------


def mixture(**parts: dict[str, Any]) -> MixtureSource:
    digits = {"source": "moving_digits", "split": "train", "samples": 8}
    temperature = parts.pop("temperature", 1.0)
    entries = {name: {"data": digits, **part} for name, part in parts.items()}
    return MixtureSource.model_validate({"source": "mixture", "parts": entries, "temperature": temperature})


def test_weights_follow_sizes_where_none_are_stated():
    config = mixture(a={}, b={"max_epochs": 2.5})
    assert parts_of(config, {"a": 900, "b": 100}) == (Part("a", 900, 900), Part("b", 100, 100, 250))
    hot = mixture(a={}, b={}, temperature=2.0)
    assert [part.weight for part in parts_of(hot, {"a": 900, "b": 100})] == pytest.approx([30, 10])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"a": {"weight": 1}, "b": {}, "c": {}}, "for all parts or for none; missing: b, c"),
        ({"a": {"weight": 1}, "temperature": 2.0}, "temperature makes weights of sizes"),
    ],
)
def test_weights_are_stated_for_all_or_none(parts: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        mixture(**parts)


def test_samples_are_those_of_the_parts_one_after_the_other(fake_source: Callable[..., Any]):
    source = MixedSource({"x": fake_source(3), "y": fake_source(2, unreadable=frozenset({1}))})
    assert len(source) == 5
    assert [source[index].id for index in range(4)] == ["x/s0", "x/s1", "x/s2", "y/s0"]
    assert source.outline(3).id == "y/s0"
    with pytest.raises(UnreadableSampleError, match="y/s1: damaged"):
        source[4]
