"""The content of every step is the same whoever loads it, and nothing is left running afterwards."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.data.conftest import FakeSource
from theworld_train.batch import Batch, Encoder, FlatBatch
from theworld_train.config.errors import ConfigError
from theworld_train.data import (
    Batching,
    Collator,
    MixedSource,
    Sample,
    TrainingOrder,
    Window,
    check_budget,
    evaluation_batches,
    measure_lengths,
    training_batches,
)
from theworld_train.data.batching import Place
from theworld_train.data.loader import _MicroBatches
from theworld_train.data.source import Source

Sources = Callable[..., Any]


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def train(source: Source, encoder: Encoder, **changes: Any) -> Generator[Window, None, None]:
    options: dict[str, Any] = {
        "rank": 0,
        "world_size": 1,
        "micro_batch_size": 2,
        "start_step": 0,
        "num_steps": 4,
        "num_workers": 0,
        "pin_memory": False,
    }
    order = TrainingOrder(len(source), seed=changes.pop("seed", 1), global_batch_size=4)
    collator = Collator(encoder, changes.pop("max_length", 50))
    kind = changes.pop("batching", "padded")
    lengths = None if kind == "padded" else measure_lengths(source, collator, range(len(source)), 0)
    batching = Batching(kind, collator.max_length, lengths)
    return training_batches(source, collator, order, batching, **{**options, **changes})


def content(batches: tuple[Batch, ...]) -> list[tuple[Any, ...]]:
    return [(batch.sample_ids, batch.input_ids.tolist(), batch.labels.tolist()) for batch in batches]


def ids(windows: Iterator[Window]) -> list[list[str]]:
    return [[name for batch in window.micro_batches for name in batch.sample_ids] for window in windows]


def test_a_window_holds_the_micro_batches_of_its_step(fake_source: Sources, encoder: Encoder) -> None:
    windows = list(train(fake_source(10), encoder, start_step=3, num_steps=2))
    assert [window.step for window in windows] == [3, 4]
    assert all(len(window.micro_batches) == 2 for window in windows)
    order = TrainingOrder(10, seed=1, global_batch_size=4)
    due = [[f"s{index}" for index in order.indices(step)] for step in (3, 4)]
    assert ids(iter(windows)) == due
    assert windows[0].micro_batches[0].kinds[0] == ("even" if int(due[0][0][1:]) % 2 == 0 else "odd")


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [2, 4])
def test_the_number_of_workers_changes_nothing(fake_source: Sources, encoder: Encoder, num_workers: int) -> None:
    source = fake_source(10, long=frozenset({2, 3}), unreadable=frozenset({7}))
    alone = list(train(source, encoder, num_steps=6))
    helped = list(train(source, encoder, num_steps=6, num_workers=num_workers))
    assert [content(window.micro_batches) for window in helped] == [content(window.micro_batches) for window in alone]
    assert [window.dropped for window in helped] == [window.dropped for window in alone]
    assert any(window.dropped for window in alone)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_the_number_of_ranks_changes_nothing(
    fake_source: Sources, encoder: Encoder, world_size: int, micro_batch_size: int
) -> None:
    source = fake_source(10, long=frozenset({2, 3}), unreadable=frozenset({7}))
    alone = ids(train(source, encoder, micro_batch_size=4))
    ranks = [
        train(source, encoder, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]
    for expected, windows in zip(alone, zip(*ranks, strict=True), strict=True):
        batches = zip(*(window.micro_batches for window in windows), strict=True)
        assert [name for parts in batches for batch in parts for name in batch.sample_ids] == expected


def test_a_resumed_run_goes_on_with_the_same_steps(fake_source: Sources, encoder: Encoder) -> None:
    whole = ids(train(fake_source(7), encoder, num_steps=8))
    assert ids(train(fake_source(7), encoder, start_step=5, num_steps=3, num_workers=2)) == whole[5:]


def test_an_unusable_sample_is_replaced_by_the_next_one_and_reported(fake_source: Sources, encoder: Encoder) -> None:
    source = fake_source(10, long=frozenset({2, 3}), unreadable=frozenset({4, 9}))
    windows = list(train(source, encoder, num_steps=5))
    usable = {2: 5, 3: 5, 4: 5, 9: 0}
    order = TrainingOrder(10, seed=1, global_batch_size=4)
    due = [order.indices(step) for step in range(5)]
    assert ids(iter(windows)) == [[f"s{usable.get(index, index)}" for index in step] for step in due]
    reasons = {dropped.sample_id: dropped.reason for window in windows for dropped in window.dropped}
    assert set(reasons) == {"s2", "s3", "s4", "s9"}
    assert reasons["s4"] == "damaged"
    assert "does not fit 50 tokens" in reasons["s2"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_without_a_usable_sample_the_run_stops_and_says_why(
    fake_source: Sources, encoder: Encoder, num_workers: int
) -> None:
    source = fake_source(3, long=frozenset(range(3)))
    with pytest.raises(
        ConfigError, match=r"none of 3 samples in a row is usable here; .* does not fit 50 tokens"
    ) as caught:
        list(train(source, encoder, num_workers=num_workers))
    assert len(caught.value.problems) == 1
    assert "Traceback" not in str(caught.value)


def test_a_bug_in_a_worker_is_not_taken_for_bad_data(fake_source: Sources, encoder: Encoder) -> None:
    class Broken:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Sample:
            raise KeyError("bug")

        def check(self) -> list[Any]:
            return []

    for num_workers in (0, 1):
        with pytest.raises(KeyError, match="bug"):
            list(train(Broken(), encoder, num_workers=num_workers))


def test_closing_early_ends_the_workers(fake_source: Sources, encoder: Encoder) -> None:
    windows = train(fake_source(10), encoder, num_steps=1000, num_workers=2)
    next(windows)
    assert len(multiprocessing.active_children()) == 2
    windows.close()
    assert not multiprocessing.active_children()


def test_an_exception_in_the_training_loop_ends_the_workers(fake_source: Sources, encoder: Encoder) -> None:
    def loop() -> None:
        for _ in train(fake_source(10), encoder, num_steps=1000, num_workers=2):
            raise RuntimeError("loss is not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        loop()


def test_loading_leaves_the_global_random_state_alone(fake_source: Sources, encoder: Encoder) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        list(train(fake_source(10), encoder, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_signal_to_the_whole_job_does_not_kill_the_workers(fake_source: Sources, encoder: Encoder) -> None:
    windows = train(fake_source(10), encoder, num_steps=50, num_workers=2)
    next(windows)
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(worker.pid, number)
    assert len(list(windows)) == 49


def test_pinning_keeps_what_comes_with_a_batch(
    fake_source: Sources, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[FlatBatch] = []
    monkeypatch.setattr(FlatBatch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    source = fake_source(4, unreadable=frozenset({1}))
    loaded = _MicroBatches(source, Collator(encoder, 50))[((Place(0, 50),), (Place(1, 50),))]
    assert loaded.pin_memory() == loaded
    assert pinned == [loaded.flat]
    failed = _MicroBatches(fake_source(1, long=frozenset({0})), Collator(encoder, 50))[((Place(0, 50),),)]
    assert failed.pin_memory() is failed


def test_a_split_that_leaves_a_rest_is_refused_before_anything_loads(fake_source: Sources, encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="global_batch_size"):
        train(fake_source(10), encoder, micro_batch_size=3)


def evaluate(source: Source, encoder: Encoder, **changes: Any) -> list[tuple[tuple[str, ...], tuple[bool, ...]]]:
    options = {"num_samples": 100, "rank": 0, "world_size": 1, "num_workers": 0, "pin_memory": False, **changes}
    batches = evaluation_batches(source, Collator(encoder, 50), micro_batch_size=2, **options)
    return [(item.batch.sample_ids, item.counted) for item in batches]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_goes_through_the_samples_in_order(fake_source: Sources, encoder: Encoder, num_workers: int) -> None:
    first, last = evaluate(fake_source(3), encoder, num_workers=num_workers)
    assert first == (("s0", "s1"), (True, True))
    assert last == (("s2", "s0"), (True, False))


def test_evaluation_stops_at_the_samples_asked_for(fake_source: Sources, encoder: Encoder) -> None:
    assert evaluate(fake_source(9), encoder, num_samples=2) == [(("s0", "s1"), (True, True))]


def test_every_rank_evaluates_equally_many_batches(fake_source: Sources, encoder: Encoder) -> None:
    ranks = [evaluate(fake_source(5), encoder, rank=rank, world_size=2) for rank in range(2)]
    assert [len(batches) for batches in ranks] == [2, 2]
    places = [place for batches in ranks for names, flags in batches for place in zip(names, flags, strict=True)]
    assert sorted(name for name, counts in places if counts) == ["s0", "s1", "s2", "s3", "s4"]


def test_a_replacement_does_not_count_in_an_evaluation(fake_source: Sources, encoder: Encoder) -> None:
    source = fake_source(4, unreadable=frozenset({1}))
    assert evaluate(source, encoder)[0] == (("s0", "s2"), (True, False))


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_drops_each_unusable_sample_once(fake_source: Sources, encoder: Encoder, world_size: int) -> None:
    # 1 and 2 fail in a row, so that 2 is also tried in the place of 1; 0 is repeated as padding.
    source = fake_source(5, unreadable=frozenset({0, 1}), long=frozenset({2}))
    batches = [
        item
        for rank in range(world_size)
        for item in evaluation_batches(
            source,
            Collator(encoder, 50),
            num_samples=5,
            rank=rank,
            world_size=world_size,
            micro_batch_size=4,
            num_workers=0,
            pin_memory=False,
        )
    ]
    assert sum(sum(item.counted) for item in batches) == 2
    assert [dropped.sample_id for item in batches for dropped in item.dropped] == ["s0", "s1", "s2"]


def test_check_budget_is_silent_if_any_sample_fits(fake_source: Sources, encoder: Encoder) -> None:
    assert check_budget(fake_source(4, long=frozenset({0, 1, 2})), Collator(encoder, 50)) == []
    assert check_budget(fake_source(4, unreadable=frozenset({0, 1, 2})), Collator(encoder, 50)) == []


def test_check_budget_tells_why_no_sample_can_be_read(fake_source: Sources, encoder: Encoder) -> None:
    (problem,) = check_budget(fake_source(4, unreadable=frozenset(range(4))), Collator(encoder, 50))
    assert "none of 4 samples can be read or encoded; the first one: " in str(problem)


def test_check_budget_tells_how_long_the_samples_are(fake_source: Sources, encoder: Encoder) -> None:
    (problem,) = check_budget(fake_source(20, long=frozenset(range(20))), Collator(encoder, 50))
    assert "none of 8 samples fits 50 tokens" in str(problem)
    assert "the shortest has 502" in str(problem)
    assert problem.key == "data.max_sequence_length"


# -- by length, and several in a row ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["grouped", "packed"])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (2, 1), (1, 2)])
def test_a_step_learns_from_the_same_samples_in_whatever_batches(
    fake_source: Sources, encoder: Encoder, batching: str, world_size: int, micro_batch_size: int
) -> None:
    source = fake_source(10, long=frozenset({2, 3}), unreadable=frozenset({7}))
    layout = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    expected = [sorted(step) for step in ids(train(source, encoder))]
    ranks = [ids(train(source, encoder, batching=batching, rank=rank, **layout)) for rank in range(world_size)]
    assert [sorted(name for share in step for name in share) for step in zip(*ranks, strict=True)] == expected


def test_a_damaged_sample_is_replaced_by_one_that_its_row_has_room_for(encoder: Encoder) -> None:
    class Damaged(FakeSource):
        def outline(self, index: int) -> Sample:
            return replace(self, unreadable=frozenset())[index]

    source = Damaged(10, unreadable=frozenset({0, 1}))
    windows = list(train(source, encoder, batching="packed", micro_batch_size=1, max_length=14, num_steps=5))
    due = TrainingOrder(10, seed=1, global_batch_size=4)
    # Samples 5 and 6 ask with as many letters as 0 and 1; all from 2 to 4 ask with more.
    stands_in = {0: 5, 1: 5}
    for window in windows:
        names = [name for batch in window.micro_batches for name in batch.sample_ids]
        expected = [f"s{stands_in.get(index, index)}" for index in due.indices(window.step)]
        assert sorted(names) == sorted(expected)
        assert all(batch.input_ids.shape[1] <= 14 for batch in window.micro_batches)
    assert {dropped.sample_id for window in windows for dropped in window.dropped} == {"s0", "s1"}


def test_a_packed_row_goes_without_a_damaged_sample_that_nothing_is_as_short_as(encoder: Encoder) -> None:
    class Damaged(FakeSource):
        def outline(self, index: int) -> Sample:
            return replace(self, unreadable=frozenset())[index]

    # Sample 0 alone asks with one letter.
    source = Damaged(5, unreadable=frozenset({0}))
    windows = list(train(source, encoder, batching="packed", micro_batch_size=1, max_length=14, num_steps=10))
    due = TrainingOrder(5, seed=1, global_batch_size=4)
    for window in windows:
        names = Counter(name for batch in window.micro_batches for name in batch.sample_ids)
        expected = Counter(f"s{index}" for index in due.indices(window.step) if index)
        assert not expected - names
        assert (names - expected).total() <= due.indices(window.step).count(0), "a row of its own takes another one"
        assert all(batch.input_ids.shape[1] <= 14 for batch in window.micro_batches)


def test_a_sample_of_a_mixture_is_replaced_by_one_of_its_part(fake_source: Sources, encoder: Encoder) -> None:
    mixed = MixedSource(
        {"a": fake_source(4, unreadable=frozenset({3})), "b": fake_source(4, unreadable=frozenset({3}))}
    )
    dataset = _MicroBatches(mixed, Collator(encoder, 50))
    loaded = dataset[((Place(3, 50),), (Place(7, 50),))]
    assert loaded.flat is not None
    assert loaded.flat.batch().sample_ids == ("a/s0", "b/s0")
    lost = _MicroBatches(
        MixedSource({"a": fake_source(2, unreadable=frozenset({0, 1})), "b": fake_source(4)}), Collator(encoder, 50)
    )[((Place(0, 50),),)]
    assert "none of 2 samples" in str(lost.error)
