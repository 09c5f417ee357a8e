"""Samples that a file names are left out, and the others keep their places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from theworld_train.config.errors import ConfigError
from theworld_train.data import (
    Batching,
    Collator,
    ExcludedSampleError,
    ExcludingSource,
    TrainingOrder,
    UnreadableSampleError,
    read_exclusions,
    training_batches,
)


def test_files_of_ids_are_read(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"id": "s1", "reason": "damaged", "step": 3}\n\n{"id": "s2"}\n')
    (tmp_path / "b.jsonl").write_text('{"id": "s1"}\n')
    assert read_exclusions([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == {"s1", "s2"}
    assert read_exclusions([]) == frozenset()


def test_every_wrong_line_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"name": "s1"}\ns1\n{"id": "s1"}\n')
    with pytest.raises(ConfigError) as caught:
        read_exclusions([tmp_path / "a.jsonl", tmp_path / "absent.jsonl"])
    sources = [problem.source for problem in caught.value.problems]
    assert sources[:3] == [f"{tmp_path}/a.jsonl:{number}" for number in (1, 2, 3)]
    assert caught.value.problems[3].key == "data.exclude"
    assert len(caught.value.problems) == 4


def test_another_sample_takes_the_place_without_a_word(fake_source: Callable[..., Any], encoder: Any):
    def ids(source: Any) -> list[list[str]]:
        order, collator = TrainingOrder(10, seed=1, global_batch_size=4), Collator(encoder, 50)
        layout = {"rank": 0, "world_size": 1, "micro_batch_size": 4, "start_step": 0, "num_steps": 5}
        batching, place = Batching("padded", 50), {"num_workers": 0, "pin_memory": False}
        windows = list(training_batches(source, collator, order, batching, **layout, **place))
        assert not any(window.dropped for window in windows)
        return [list(window.micro_batches[0].sample_ids) for window in windows]

    whole = ids(fake_source(10))
    without = ids(ExcludingSource(fake_source(10), frozenset({"s3", "s9"})))
    stands_in = {"s3": "s4", "s9": "s0"}
    assert without == [[stands_in.get(name, name) for name in step] for step in whole]


@pytest.mark.parametrize("name", ["s3", "s9"])
def test_a_damaged_sample_is_excluded_without_a_word(fake_source: Callable[..., Any], name: str):
    source = ExcludingSource(fake_source(10, unreadable=frozenset({3, 9})), frozenset({name}))
    with pytest.raises(ExcludedSampleError):
        source[int(name[1:])]
    other = 12 - int(name[1:])
    with pytest.raises(UnreadableSampleError) as caught:
        source[other]
    assert not isinstance(caught.value, ExcludedSampleError)


def test_a_source_of_which_nothing_is_left_is_an_error(fake_source: Callable[..., Any], encoder: Any):
    source = ExcludingSource(fake_source(2), frozenset({"s0", "s1"}))
    windows = training_batches(
        source,
        Collator(encoder, 50),
        TrainingOrder(2, 0, 1),
        Batching("padded", 50),
        rank=0,
        world_size=1,
        micro_batch_size=1,
        start_step=0,
        num_steps=1,
        num_workers=0,
        pin_memory=False,
    )
    with pytest.raises(ConfigError, match="none of 2 samples in a row is usable here; all are excluded"):
        next(windows)
