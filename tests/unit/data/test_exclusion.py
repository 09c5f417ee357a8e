"""Samples that a file names and rows that are wrong are left out, and the others keep their places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import JsonlSource
from theworld_train.data import (
    Batching,
    Collator,
    ExcludedSampleError,
    ExcludingSource,
    MixedSource,
    Source,
    TrainingOrder,
    UnreadableSampleError,
    check_rows,
    open_source,
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


@pytest.fixture
def rows(write_jsonl: Callable[..., Path], chat: Callable[..., dict[str, Any]]) -> Source:
    """Seven rows, of which four are wrong: no turns, a missing image, an id that another row has, and no JSON."""
    missing = chat([{"type": "image", "path": "absent.png"}, {"type": "text", "text": "what?"}], id="unseen")
    path = write_jsonl(chat(id="a"), {"id": "b", "turns": []}, missing, chat(id="c"), chat(id="a"), "{", chat())
    return open_source(JsonlSource(source="jsonl", path=str(path)))


def test_each_wrong_row_is_known_by_its_place_its_id_and_its_reason(rows: Source, tmp_path: Path):
    check = check_rows(rows, "data.train", allowed=4)
    assert {index: name for index, (name, _) in check.wrong.items()} == {
        1: "data.jsonl:2",
        2: "unseen",
        4: "data.jsonl:5",  # and not that of the row which had it first
        5: "data.jsonl:6",
    }
    reasons = [reason for _, reason in check.wrong.values()]
    fields = ["2: messages: the row has no", "3: messages[0].content[0].path: no such file", "5: id: the id is already"]
    for reason, field in zip(reasons, [*fields, "6: not valid JSON"], strict=True):
        assert reason.startswith(f"{tmp_path}/data.jsonl:{field}")
    assert check.number == len(check.problems) == 4
    assert check.refusals(4) == check.refusals(None) == []


def test_one_wrong_row_too_many_is_refused_with_all_of_them(rows: Source):
    *problems, last = check_rows(rows, "data.train", allowed=3).refusals(3)
    assert len(problems) == 4
    assert str(last).startswith("data.max_bad_samples: 4 rows are wrong, more than may (got 3); mend them")
    assert len(check_rows(rows, "data.train", allowed=0).refusals(0)) == 4


def test_excluded_rows_may_be_wrong_and_are_not_taken_all_the_same(rows: Source):
    excluded = frozenset({"unseen", "data.jsonl:5"})
    check = check_rows(rows, "data.train", 2, excluded)
    assert check.number == len(check.problems) == 2
    assert check.refusals(2) == []
    source = ExcludingSource(rows, excluded, check.wrong)
    for index in (2, 4):
        with pytest.raises(ExcludedSampleError):
            source.outline(index)
    for index, name in ((1, "data.jsonl:2"), (5, "data.jsonl:6")):
        with pytest.raises(UnreadableSampleError) as caught:
            source[index]
        assert caught.value.sample_id == name
        assert not isinstance(caught.value, ExcludedSampleError)
    assert [source[index].id for index in (0, 3, 6)] == ["a", "c", "data.jsonl:7"]


def test_of_a_mixture_each_part_is_checked(rows: Source, fake_source: Callable[..., Any]):
    mixed = MixedSource({"digits": fake_source(10), "chats": rows})
    check = check_rows(mixed, "data.train", None)
    assert [(index, name) for index, (name, _) in check.wrong.items()] == [
        (11, "chats/data.jsonl:2"),
        (12, "chats/unseen"),
        (14, "chats/data.jsonl:5"),
        (15, "chats/data.jsonl:6"),
    ]


def test_a_source_of_wrong_rows_alone_is_refused(write_jsonl: Callable[..., Path]):
    rows = open_source(JsonlSource(source="jsonl", path=str(write_jsonl("{}", json.dumps({"messages": []})))))
    assert len(check_rows(rows, "data.train", None).refusals(None)) == 2
