"""Which samples share a row and a micro-batch, and that no sample is lost, doubled or moved to another step."""

from __future__ import annotations

import numpy as np
import pytest

from theworld_train.config.errors import ConfigError
from theworld_train.data.batching import Batching, MicroBatch

KINDS = ("padded", "grouped", "packed")
MAX_LENGTH = 100
LAYOUTS = [(1, 1), (1, 8), (2, 2), (4, 1), (4, 2), (8, 1)]


def drawn(seed: int, samples: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, MAX_LENGTH + 1, samples).astype(np.int32)


def laid_out(batching: Batching, indices: list[int], world_size: int, size: int) -> list[list[MicroBatch]]:
    return [batching.micro_batches(indices, rank, world_size, size) for rank in range(world_size)]


def indices_of(ranks: list[list[MicroBatch]]) -> list[int]:
    return [place.index for batches in ranks for batch in batches for row in batch for place in row]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world_size", "micro_batch_size"), LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_every_sample_of_a_step_is_taken_once_and_ranks_take_equally_many_batches(
    kind: str, world_size: int, micro_batch_size: int, seed: int
):
    indices = [int(index) for index in np.random.default_rng(seed).integers(0, 40, 16)]
    ranks = laid_out(Batching(kind, MAX_LENGTH, drawn(seed)), indices, world_size, micro_batch_size)
    assert sorted(indices_of(ranks)) == sorted(indices)
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch) for batches in ranks for batch in batches} == {micro_batch_size}


@pytest.mark.parametrize(("world_size", "micro_batch_size"), LAYOUTS)
def test_padded_keeps_the_order(world_size: int, micro_batch_size: int):
    indices = [5, 3, 8, 1, 9, 2, 4, 7]
    ranks = laid_out(Batching("padded", MAX_LENGTH), indices, world_size, micro_batch_size)
    accumulated = zip(*ranks, strict=True)
    assert [place.index for parts in accumulated for batch in parts for row in batch for place in row] == indices


def test_micro_batch_a_of_rank_r_is_at_its_documented_place():
    batches = Batching("padded", MAX_LENGTH).micro_batches(list(range(12, 24)), 1, 2, 3)
    assert [[row[0].index for row in batch] for batch in batches] == [[15, 16, 17], [21, 22, 23]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_that_leaves_a_rest_is_refused(kind: str):
    with pytest.raises(ConfigError, match="multiple of micro_batch_size x world size = 3 x 2"):
        Batching(kind, MAX_LENGTH, drawn(0)).micro_batches(list(range(8)), 0, 2, 3)


def padding(ranks: list[list[MicroBatch]], lengths: np.ndarray) -> float:
    tokens = positions = 0
    for batches in ranks:
        for batch in batches:
            rows = [sum(int(lengths[place.index]) for place in row) for row in batch]
            tokens, positions = tokens + sum(rows), positions + max(rows) * len(rows)
    return 1 - tokens / positions


@pytest.mark.parametrize("seed", range(5))
def test_less_is_padded_by_length_and_fewer_batches_are_needed_packed(seed: int):
    lengths, indices = drawn(seed, 64), list(range(64))
    ranks = {kind: laid_out(Batching(kind, MAX_LENGTH, lengths), indices, 2, 4) for kind in KINDS}
    shares = {kind: padding(laid, lengths) for kind, laid in ranks.items()}
    assert shares["grouped"] < 0.3 * shares["padded"]
    assert shares["packed"] < 0.3 * shares["padded"]
    assert len(ranks["packed"][0]) < len(ranks["padded"][0])
    total = int(lengths.sum())
    rows = sum(len(batch) for batches in ranks["packed"] for batch in batches)
    assert rows <= 11 / 9 * total / MAX_LENGTH + 8 + 1, "first fit, longest first, and what the ranks need"


@pytest.mark.parametrize("kind", ["grouped", "packed"])
def test_batches_that_run_side_by_side_are_of_like_length(kind: str):
    lengths, indices = drawn(3, 64), list(range(64))
    ranks = laid_out(Batching(kind, MAX_LENGTH, lengths), indices, 4, 1)
    in_turn = [batch for side_by_side in zip(*ranks, strict=True) for batch in side_by_side]
    found = [sum(int(lengths[place.index]) for row in batch for place in row) for batch in in_turn]
    assert found == sorted(found, reverse=True), "dealt longest first, a rank after the other"
    assert len(set(found)) > 4


@pytest.mark.parametrize(("world_size", "micro_batch_size"), LAYOUTS)
def test_no_row_is_longer_than_allowed(world_size: int, micro_batch_size: int):
    lengths = drawn(1)
    ranks = laid_out(Batching("packed", MAX_LENGTH, lengths), list(range(40)), world_size, micro_batch_size)
    for batches in ranks:
        for batch in batches:
            assert all(sum(int(lengths[place.index]) for place in row) <= MAX_LENGTH for row in batch)
            assert all(place.room == lengths[place.index] for row in batch for place in row)


def test_an_unusable_sample_takes_the_room_of_the_next_usable_one():
    lengths = np.array([0, 0, 60, 50, 0], dtype=np.int32)
    (batches,) = laid_out(Batching("packed", MAX_LENGTH, lengths), [0, 3, 4], 1, 1)
    rows = [{place.index: place.room for place in row} for batch in batches for row in batch]
    assert rows == [{0: 60}, {4: 60}, {3: 50}]


def test_what_is_packed_does_not_depend_on_chance():
    lengths = drawn(2)
    first, second = (laid_out(Batching("packed", MAX_LENGTH, lengths.copy()), list(range(40)), 2, 2) for _ in range(2))
    assert first == second


def test_what_cannot_be_used_counts_as_what_replaces_it_within_its_part() -> None:
    lengths = np.array([3, 0, 5, 0, 7, 0], dtype=np.int32)
    assert Batching("padded", 9, lengths).tokens.tolist() == [3, 5, 5, 7, 7, 3]
    assert Batching("padded", 9, lengths, ends=(4, 6)).tokens.tolist() == [3, 5, 5, 3, 7, 7]
