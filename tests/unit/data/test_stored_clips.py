"""Clips that lie inside shards and tables: read as files are, by the same rule for their frames."""

from __future__ import annotations

import errno
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from tests.unit.data.conftest import problems_of
from tests.unit.data.test_video import numbers, write_video
from theworld_train.batch import Blank, Encoder
from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import HubSource, JsonlSource, ParquetSource, WebDatasetSource
from theworld_train.data import Source, UnreadableSampleError, open_source, webdataset

OWN = [
    {"role": "user", "content": [{"type": "video", "text": None}, {"type": "text", "text": "What next?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "It falls."}]},
]
CHAT = [{"from": "human", "value": "<video>\nWhat next?"}, {"from": "gpt", "value": "It falls."}]


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An MP4 of thirteen frames, ten a second."""
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4", 13).read_bytes()


def shard(path: Path, **members: bytes) -> Path:
    with tarfile.open(path / "00000.tar", "w") as tar:
        for suffix, data in members.items():
            member = tarfile.TarInfo(f"0.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def table(path: Path, **fields: Any) -> Path:
    (path / "data").mkdir()
    Dataset.from_list([fields]).to_parquet(path / "data" / "train-00000.parquet")
    return path


def captions(path: Path, video: bytes, **rules: Any) -> Source:
    path = shard(path, mp4=video, txt=b"It falls.")
    return open_source(WebDatasetSource(source="webdataset", path=str(path), questions=("What next?",), **rules))


def conversations(path: Path, video: bytes, **rules: Any) -> Source:
    path = shard(path, mp4=video, json=json.dumps({"messages": OWN}).encode())
    return open_source(WebDatasetSource(source="webdataset", path=str(path), format="conversations", **rules))


def llava(path: Path, video: bytes, **rules: Any) -> Source:
    path = shard(path, json=json.dumps({"conversations": CHAT}).encode(), mp4=video)
    return open_source(WebDatasetSource(source="webdataset", path=str(path), format="llava", **rules))


def parquet(path: Path, video: bytes, **rules: Any) -> Source:
    path = table(path, messages=OWN, videos=[{"bytes": video, "path": None}]) / "data"
    return open_source(ParquetSource(source="parquet", path=str(path), **rules))


def stream(path: Path, video: bytes, **rules: Any) -> Source:
    path = table(path, messages=OWN, videos=[{"bytes": video, "path": "a.mp4"}])
    return open_source(HubSource(source="hub", id=str(path), streaming=True, **rules))


def hub_chat(path: Path, video: bytes, **rules: Any) -> Source:
    Dataset.from_list([{"conversations": CHAT, "videos": [video]}]).save_to_disk(path / "saved")
    return open_source(HubSource(source="hub", id=str(path / "saved"), format="sharegpt", **rules))


Open = Callable[..., Source]
KINDS = [captions, conversations, llava, parquet, stream, hub_chat]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_clip_is_read_as_a_file_is(kind: Open, video: bytes, tmp_path: Path, encoder: Encoder) -> None:
    source = kind(tmp_path, video, max_video_frames=5)
    assert list(source.check()) == []
    user, assistant = source[0].messages
    clip, text = user["content"]
    assert numbers(clip["video"]) == [0, 3, 6, 9, 12]
    assert (text["text"], assistant["content"][0]["text"]) == ("What next?", "It falls.")
    outline = source.outline(0)
    assert outline.messages[0]["content"][0]["video"] == Blank(5)
    assert encoder.encode(outline.messages).input_ids.tolist() == encoder.encode(source[0].messages).input_ids.tolist()
    assert numbers(pickle.loads(pickle.dumps(source))[0].messages[0]["content"][0]["video"]) == [0, 3, 6, 9, 12]


@pytest.mark.parametrize("kind", [captions, stream], ids=lambda kind: kind.__name__)
def test_frames_are_taken_by_time_if_so_asked(kind: Open, video: bytes, tmp_path: Path) -> None:
    source = kind(tmp_path, video, max_video_frames=5, window_s=0.4)
    assert numbers(source[0].messages[0]["content"][0]["video"]) == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("kind", [llava, stream], ids=lambda kind: kind.__name__)
def test_unless_set_otherwise_only_the_last_frame_is_taken(kind: Open, video: bytes, tmp_path: Path) -> None:
    assert numbers(kind(tmp_path, video)[0].messages[0]["content"][0]["video"]) == [12]


@pytest.mark.parametrize(("kind", "key"), [(captions, "videos"), (llava, r"video\[0\]"), (parquet, r"videos\[0\]")])
def test_a_damaged_clip_names_sample_and_field(kind: Open, key: str, video: bytes, tmp_path: Path) -> None:
    source = kind(tmp_path, b"no video" + video[8:900])
    assert list(source.check()) == [], "no clip is opened by the check"
    for load in (source.__getitem__, source.outline):
        with pytest.raises(UnreadableSampleError, match=rf"{key}: not a video in a known format, or damaged"):
            load(0)


@pytest.mark.parametrize("method", ["__getitem__", "outline"])
def test_a_clip_that_the_disk_does_not_give_names_sample_and_field(
    method: str, video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: webdataset.ShardRows, index: int, member: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    source = captions(tmp_path, video)
    monkeypatch.setattr(webdataset.ShardRows, "_bytes", fails)
    with pytest.raises(UnreadableSampleError, match=r"^00000\.tar:0: videos: cannot be read: .*Input/output error"):
        getattr(source, method)(0)


def test_a_clip_that_fills_the_memory_is_refused(video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "MAX_VIDEO_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"0\.mp4: has [\d,]+ bytes, and 1,000 are allowed"):
        captions(tmp_path, video)


def test_an_image_and_a_clip_are_two_media_for_one_caption(video: bytes, tmp_path: Path) -> None:
    shard(tmp_path, mp4=video, png=b"x", txt=b"It falls.")
    source = open_source(WebDatasetSource(source="webdataset", path=str(tmp_path)))
    (problem,) = problems_of(source)
    assert "images: expected one image or clip beside the caption (got 2)" in str(problem)


def test_clips_of_a_row_are_used_and_named_like_its_images(tmp_path: Path, video: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    (tmp_path / "a.mp4").write_bytes(video)
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}], "videos": ["a.mp4"]}
        for content in (
            [{"type": "video"}],
            [{"type": "video", "index": 0}],
            [{"type": "video", "index": 1}],
            [{"type": "video", "index": 0, "path": "a.mp4"}],
            "what?",
        )
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(JsonlSource(source="jsonl", path=str(path), max_video_frames=5))
    assert [str(problem).split(": ", 1)[1].split(";")[0] for problem in problems_of(source)] == [
        "messages[0].content[0]: the part asks for video 1 of the row, whose 'videos' holds 1",
        "messages[0].content[0]: a video part has one of 'path', 'frames' and 'index'",
        "videos: videos listed but unused: 0",
    ]
    assert [numbers(source[index].messages[0]["content"][0]["video"]) for index in (0, 1)] == [[0, 3, 6, 9, 12]] * 2
