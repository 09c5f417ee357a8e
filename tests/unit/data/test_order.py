"""Which samples a step learns from depends on the seed and the step alone."""

from __future__ import annotations

import pytest

from theworld_train.config.errors import ConfigError
from theworld_train.data.order import (
    TrainingOrder,
    accumulation_steps,
    evaluation_micro_batches,
    permutation,
)


def indices(order: TrainingOrder, steps: int) -> list[int]:
    return [index for step in range(steps) for index in order.indices(step)]


def test_each_epoch_takes_every_sample_once_and_in_an_order_of_its_own() -> None:
    order = TrainingOrder(num_samples=12, seed=3, global_batch_size=4)
    stream = indices(order, steps=9)
    epochs = [stream[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_global_batches_run_over_the_end_of_an_epoch() -> None:
    order = TrainingOrder(num_samples=5, seed=0, global_batch_size=4)
    stream = indices(order, steps=5)
    assert all(sorted(stream[start : start + 5]) == list(range(5)) for start in (0, 5, 10, 15))


def test_a_batch_may_be_larger_than_the_source() -> None:
    stream = indices(TrainingOrder(num_samples=2, seed=0, global_batch_size=7), steps=2)
    assert sorted(stream) == [0] * 7 + [1] * 7


def test_the_order_is_pinned_so_that_an_upgrade_cannot_change_a_resumed_run() -> None:
    assert permutation(8, 0, 0).tolist() == [1, 4, 5, 6, 2, 0, 3, 7]
    assert permutation(8, 17, 2).tolist() == [5, 0, 7, 3, 1, 2, 4, 6]


@pytest.mark.parametrize("seed", [-1, 0, 2**63])
def test_any_seed_serves(seed: int) -> None:
    assert sorted(permutation(50, seed, 1)) == list(range(50))


def test_seeds_and_epochs_do_not_mirror_each_other() -> None:
    orders = {(seed, epoch): tuple(permutation(20, seed, epoch)) for seed in range(6) for epoch in range(6)}
    assert len(set(orders.values())) == 36


def test_the_permutation_has_no_favourites() -> None:
    first = [int(permutation(4, seed, 0)[0]) for seed in range(400)]
    assert all(70 < first.count(index) < 130 for index in range(4))


@pytest.mark.parametrize(("global_batch_size", "micro_batch_size", "world_size"), [(8, 3, 1), (8, 2, 3), (2, 2, 2)])
def test_a_split_that_leaves_a_rest_is_refused_with_its_numbers(
    global_batch_size: int, micro_batch_size: int, world_size: int
) -> None:
    with pytest.raises(ConfigError, match=f"{micro_batch_size} x {world_size}.*{global_batch_size}"):
        accumulation_steps(global_batch_size, micro_batch_size, world_size)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ConfigError, match="no training samples"):
        TrainingOrder(num_samples=0, seed=0, global_batch_size=1)


@pytest.mark.parametrize("num_samples", [0, 1, 5, 8, 9])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 4), (2, 2), (3, 1), (4, 3)])
def test_evaluation_counts_each_sample_once_and_gives_ranks_equally_many_full_batches(
    num_samples: int, world_size: int, micro_batch_size: int
) -> None:
    ranks = [evaluation_micro_batches(num_samples, rank, world_size, micro_batch_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    slots = [slot for batches in ranks for batch in batches for slot in batch]
    assert sorted(slot.index for slot in slots if slot.counted) == list(range(num_samples))
    assert all(0 <= slot.index < num_samples for slot in slots)
    assert {len(batch) for batches in ranks for batch in batches} <= {micro_batch_size}
    assert len(slots) < num_samples + world_size * micro_batch_size
