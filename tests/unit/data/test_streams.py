"""Streams of row groups: the same rows as a copy gives, each group read once, in an order that needs no cursor."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from PIL import Image

from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import HubSource, ParquetSource
from theworld_train.data import Source, UnreadableSampleError, open_source, streams
from theworld_train.data.arrow import OWN_COLUMNS, parquet_rows
from theworld_train.data.order import SHUFFLED_GROUPS, Groups, TrainingOrder, permutation
from theworld_train.data.streams import StreamedRows

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Caches are where the test is, and the hub is offline, as HF_HUB_OFFLINE=1 makes it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def picture(color: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (color, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def row(number: int) -> dict[str, Any]:
    question = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": f"number {number}"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": [{"bytes": picture(5 * number), "path": None}], "score": 0.5}


def write(path: Path, first: int, number: int, group: int = 3) -> Path:
    """Writes rows in groups of so many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list([row(first + index) for index in range(number)]).to_parquet(path, batch_size=group)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of 13 and 8 rows in groups of three and of four."""
    write(tmp_path / "rows" / "a.parquet", 0, 13)
    write(tmp_path / "rows" / "b.parquet", 13, 8, group=4)
    return tmp_path / "rows"


def streamed(folder: Path) -> StreamedRows:
    shards = sorted(folder.glob("*.parquet"))
    return StreamedRows(str(folder), shards, [shard.name for shard in shards], OWN_COLUMNS)


def read(folder: Path, **fields: Any) -> Source:
    return open_source(ParquetSource(source="parquet", path=str(folder), streaming=True, **fields))


def test_a_stream_has_the_rows_of_a_copy(folder: Path) -> None:
    rows, copy = streamed(folder), parquet_rows(folder, OWN_COLUMNS)
    assert len(rows) == len(copy) == 21
    for index in (20, 0, 7, 12, 13, 1):
        assert rows[index] == copy[index]
        assert (rows.where(index), rows.label(index)) == (copy.where(index), copy.label(index))
    assert rows.where(13) == f"{folder}/b.parquet[0]"
    assert list(rows.outlines(range(4, 18))) == list(copy.outlines(range(4, 18)))


def test_outlines_read_no_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def table(self: StreamedRows, group: int, columns: list[str]) -> pa.Table:
        asked.extend(columns)
        return original(self, group, columns)

    original = StreamedRows._table
    monkeypatch.setattr(StreamedRows, "_table", table)
    assert list(read(folder).check()) == []
    assert {name.split(".")[0] for name in asked} == {"messages", "images"}
    assert not [name for name in asked if name.endswith("bytes") or name == "images"]


def test_single_outlines_read_a_group_once_while_it_is_among_the_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths, ledgers and gates ask for one outline after the other."""
    rows = streamed(folder)
    groups: list[int] = []
    original = StreamedRows._table

    def table(self: StreamedRows, group: int, columns: list[str]) -> pa.Table:
        groups.append(group)
        return original(self, group, columns)

    monkeypatch.setattr(StreamedRows, "_table", table)
    for index in TrainingOrder(len(rows), 5, 21, rows.groups).indices(1):
        assert list(rows.outlines(range(index, index + 1)))
    assert sorted(groups) == list(range(len(rows.groups.sizes)))
    assert len(rows._read_outlined) == SHUFFLED_GROUPS
    assert not rows._read, "no image was read"
    assert pickle.loads(pickle.dumps(rows))._read_outlined == {}, "workers begin with none"


def damage(shard: Path, group: int) -> None:
    """Overwrites the pages of a row group; the footer stays whole."""
    columns = pq.read_metadata(shard).row_group(group)
    data = bytearray(shard.read_bytes())
    for column in (columns.column(number) for number in range(columns.num_columns)):
        first = column.dictionary_page_offset or column.data_page_offset
        data[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    shard.write_bytes(data)


def test_a_damaged_group_is_named_for_each_of_its_rows_and_for_no_other(folder: Path) -> None:
    source = read(folder)
    damage(folder / "a.parquet", 1)
    found = list(source.check())
    assert [finding.index for finding in found] == [3, 4, 5]
    for finding in found:
        (problem,) = finding.problems
        assert f"a.parquet[{finding.index}]: cannot be read: row group 1 of {folder}/a.parquet: " in str(problem)
    for load in (source.__getitem__, source.outline):
        with pytest.raises(UnreadableSampleError, match=rf"row group 1 of {folder}/a\.parquet: "):
            load(4)
        assert load(6).messages


def test_a_shard_that_has_gone_missing_is_named(folder: Path) -> None:
    source = read(folder)
    (folder / "b.parquet").unlink()
    assert [finding.index for finding in source.check()] == list(range(13, 21))
    for load in (source.__getitem__, source.outline):
        with pytest.raises(UnreadableSampleError, match=rf"row group 1 of {folder}/b\.parquet: "):
            load(20)


def test_in_an_epoch_of_training_each_group_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = streamed(folder)
    groups: list[int] = []
    original = StreamedRows._table

    def table(self: StreamedRows, group: int, columns: list[str]) -> pa.Table:
        groups.append(group)
        return original(self, group, columns)

    monkeypatch.setattr(StreamedRows, "_table", table)
    order = TrainingOrder(len(rows), 5, 21, rows.groups)
    answers = [rows[index]["messages"][1]["content"][0]["text"] for index in order.indices(1)]  # type: ignore[index]
    assert sorted(answers) == sorted(f"number {index}" for index in range(21))
    assert sorted(groups) == list(range(len(rows.groups.sizes)))
    assert groups != sorted(groups)
    assert len(rows._read) == SHUFFLED_GROUPS
    assert pickle.loads(pickle.dumps(rows))._read == {}, "workers begin with none"


def test_the_order_takes_groups_in_turn_and_shuffles_four_at_a_time() -> None:
    sizes = np.array([3, 1, 5, 2, 4, 3, 6, 2, 1, 3])
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    seen = set()
    for epoch in range(20):
        order = permutation(30, 7, epoch, Groups(sizes))
        assert sorted(order) == list(range(30))
        together, start = [], 0
        while start < 30:
            block = sorted(set(group_of[order[start:]].tolist()), key=group_of[order[start:]].tolist().index)
            taken = set(group_of[order[start : start + 1]].tolist())
            while len(taken) < min(SHUFFLED_GROUPS, len(block)) or start + sizes[list(taken)].sum() > 30:
                taken = set(block[: len(taken) + 1])
            size = int(sizes[list(taken)].sum())
            assert set(group_of[order[start : start + size]].tolist()) == taken, "no other group comes in between"
            together.append(frozenset(taken))
            start += size
        seen.add(tuple(together))
        assert [len(block) for block in together] == [4, 4, 2]
    assert len(seen) > 10, "and in another turn in each epoch"


def test_the_order_of_a_stream_is_pinned() -> None:
    assert permutation(8, 0, 0, Groups(np.array([3, 2, 3]))).tolist() == [2, 4, 5, 6, 0, 3, 1, 7]


def test_shards_that_are_not_alike_are_refused_with_all_that_is_wrong(folder: Path) -> None:
    pq.write_table(pa.table({"messages": ["x"], "id": [1]}), folder / "c.parquet")
    pq.write_table(pa.table({"text": ["x"]}), folder / "d.parquet")
    (folder / "e.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError) as caught:
        read(folder)
    lines = [str(problem) for problem in caught.value.problems]
    assert any(line.startswith(f"{folder}/c.parquet: messages: the column is string, and ") for line in lines)
    assert any(line.startswith(f"{folder}/d.parquet: the shard has no column 'messages'") for line in lines)
    assert any(line.startswith(f"{folder}/e.parquet: not a Parquet file") for line in lines)


def test_groups_that_fill_the_memory_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_GROUP_BYTES", 100)
    with pytest.raises(ConfigError, match=r"a\.parquet: a row group has [\d,]+ bytes, and 100 are allowed in a stream"):
        read(folder)


def test_rows_whose_images_have_no_bytes_are_told_when_they_are_read(folder: Path) -> None:
    rows = [row(0), {**row(1), "images": [{"bytes": None, "path": "gone.png"}]}]
    Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    source = read(folder / "a.parquet")
    assert list(source.check()) == [], "the bytes are not looked for"
    with pytest.raises(UnreadableSampleError, match=r"gone\.png"):
        source[1]


# -- datasets of the hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A directory as the hub has it, of two splits."""
    write(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", 0, 5)
    write(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", 5, 4)
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", 9, 2)
    return tmp_path / "set"


def hub(name: object, **fields: Any) -> HubSource:
    return HubSource(source="hub", id=str(name), streaming=True, **fields)


def test_a_directory_is_read_by_its_splits(repository: Path) -> None:
    source = open_source(hub(repository))
    assert len(source) == 9
    assert list(source.check()) == []
    assert source[5].id == f"{repository}/data/train-00001-of-00002.parquet[0]"
    assert source[5].messages[1]["content"][0]["text"] == "number 5"
    assert len(open_source(hub(repository, split="test"))) == 2


@pytest.mark.parametrize("split", ["validation", "train[:10%]"])
def test_a_split_that_is_not_there_or_a_part_of_one_is_refused(repository: Path, split: str) -> None:
    with pytest.raises(ConfigError, match=r"there is none; its splits: .*train.*; a stream has no slices"):
        open_source(hub(repository, split=split))


def test_what_is_no_stream_is_refused(tmp_path: Path) -> None:
    Dataset.from_list([row(0)]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"save_to_disk wrote is no stream; remove streaming"):
        open_source(hub(tmp_path / "saved"))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(ConfigError, match=r"read from Parquet files, and the split has train\.jsonl; remove streaming"):
        open_source(hub(tmp_path / "lines"))


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_repository_in_the_local_cache_is_read_offline(repository: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "datasets--someone--pictures"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots").mkdir()
    repository.rename(cached / "snapshots" / COMMIT)
    source = open_source(hub("someone/pictures"))
    assert (len(source), source[0].id) == (9, "someone/pictures/data/train-00000-of-00002.parquet[0]")
    with pytest.raises(ConfigError, match=r"nor a dataset whose Parquet files are in the local cache.*fetch CONFIG"):
        open_source(hub("someone/else"))
