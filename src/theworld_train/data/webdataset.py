"""Shards as WebDataset writes them: uncompressed tar files, whose neighbouring members of one key are a sample.

The headers are read once, and a sample is then read from where it lies, in any order. Nothing is unpacked. Shards come
from elsewhere, so what they may hold is bounded, and whatever is not a plain file is refused.
"""

from __future__ import annotations

import posixpath
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.sources import WebDatasetSource, WorldFrames
from theworld_train.data.conversations import Conversations
from theworld_train.data.files import media_of
from theworld_train.data.formats import LLAVA, Adapted, CaptionFormat, Format, own_format
from theworld_train.data.rows import Later, RowError, decode_json
from theworld_train.data.source import first_problems

#: Members that are images, by the last part of their names.
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
#: Members that are clips.
VIDEOS = ("mp4", "mov", "mkv", "webm", "avi", "mpg", "mpeg")
#: Members that are read, besides images and clips; others are left alone.
TEXTS = ("txt", "json")
KINDS = IMAGES + VIDEOS + TEXTS
#: Characters of a member's name: all keys are kept in one array, each as wide as the longest.
MAX_NAME = 1024
#: Bounds of what a shard may hold: members, bytes of the file of an image and of a clip, and bytes of a text.
MAX_MEMBERS = 1_000_000
MAX_IMAGE_BYTES = 256 * 2**20
MAX_VIDEO_BYTES = 512 * 2**20
MAX_TEXT_BYTES = 16 * 2**20


def open_shards(config: WebDatasetSource, world: WorldFrames) -> Conversations:
    """Opens a shard, or a directory of shards; their clips give the frames of `world`.

    Raises:
        ConfigError: If there are none, one is damaged or compressed, or it holds what is refused.
    """
    path = Path(config.path)
    shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not shards:
        raise ConfigError(Problem("the directory holds no tar files", source=config.path))
    index = _Index()
    problems = []
    for number, shard in enumerate(shards):
        try:
            index.add(number, shard)
        except _RefusedShardError as error:
            problems.append(Problem(str(error), source=str(shard), key=error.member))
    if problems:
        raise ConfigError(first_problems(problems, config.path))
    return Conversations(ShardRows(shards, index, config.path), media_of(config, None, world), _format(config))


def _format(config: WebDatasetSource) -> Format:
    if config.format == "captions":
        return _CaptionOfMembers(CaptionFormat("image", "txt", config.questions))
    if config.format == "llava":
        return _ConversationOfMembers(LLAVA, "image", "video")
    return _ConversationOfMembers(own_format, "images", "videos")


class _RefusedShardError(ValueError):
    """Raised for a shard that cannot be used; `member` is the name of the one that is at fault."""

    def __init__(self, message: str, member: str | None = None) -> None:
        super().__init__(message)
        self.member = member


class _Index:
    """Where the members of all samples lie."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        #: Of the shard that is read: the keys that it has, and that of its last sample as it stands there.
        self._seen: set[bytes] = set()
        self._last: bytes | None = None
        #: Of each sample: its shard, and its first member.
        self.shards, self.firsts = array("l"), array("q")
        #: Of each member: where it begins, its bytes, and its kind, a position in `KINDS`.
        self.offsets, self.sizes, self.kinds = array("q"), array("q"), array("b")

    def add(self, number: int, shard: Path) -> None:
        """Adds the samples of a shard.

        Raises:
            _RefusedShardError: If it is damaged or compressed, or holds what is refused.
        """
        self._seen, self._last = set(), None
        try:
            with tarfile.open(shard, "r:") as tar:
                for count, member in enumerate(_members(tar), start=1):
                    if count > MAX_MEMBERS:
                        raise _RefusedShardError(f"more than {MAX_MEMBERS:,} members")
                    self._add_member(number, member)
                _check_end(tar)
        except _RefusedShardError:
            raise
        except OSError as error:
            raise _RefusedShardError(error.strerror or str(error)) from error
        except (tarfile.TarError, ValueError, RecursionError, OverflowError) as error:
            raise _RefusedShardError(f"not an uncompressed tar file, or damaged: {error}") from error

    def _add_member(self, number: int, member: tarfile.TarInfo) -> None:
        _check_member(member)
        folder, name = posixpath.split(member.name)
        stem, _, extension = name.partition(".")
        kind = extension.rpartition(".")[2].lower()
        if not member.isreg() or not stem or kind not in KINDS:
            return
        limit = MAX_IMAGE_BYTES if kind in IMAGES else MAX_VIDEO_BYTES if kind in VIDEOS else MAX_TEXT_BYTES
        if member.size > limit:
            raise _RefusedShardError(f"has {member.size:,} bytes, and {limit:,} are allowed", member.name)
        key = posixpath.join(folder, stem).encode(errors="backslashreplace")
        if self._last != key:
            self._last = key
            self.keys.append(self._own(key))
            self.shards.append(number)
            self.firsts.append(len(self.offsets))
        self.offsets.append(member.offset_data)
        self.sizes.append(member.size)
        self.kinds.append(KINDS.index(kind))

    def _own(self, key: bytes) -> bytes:
        """Returns a key that no other sample of the shard has: `key (2)` for the second one of a key."""
        own, number = key, 1
        while own in self._seen:
            number += 1
            own = key + f" ({number})".encode()
        self._seen.add(own)
        return own


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined] # where it would keep all of them
        yield member


def _check_member(member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise _RefusedShardError("the name leads out of the shard", member.name)
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise _RefusedShardError("is a link, a device or a sparse file, and shards hold plain files", member.name)
    if len(member.name) > MAX_NAME:
        raise _RefusedShardError(f"the name has more than {MAX_NAME:,} characters", member.name[:80] + "...")
    if member.size < 0:
        raise _RefusedShardError("has a negative size", member.name)


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuses what `tarfile` takes for the end in silence: a damaged header between two members."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise _RefusedShardError(f"damaged: no member begins at byte {tar.offset:,}, and the shard does not end there")


class ShardRows:
    """The samples of shards as rows: members that are `images` or `videos`, and `txt` and `json` if there are any."""

    def __init__(self, shards: Sequence[Path], index: _Index, name: str) -> None:
        """Args: shards: the tar files; index: where their samples lie; name: names them all in problems."""
        self.name = name
        self._shards = tuple(shards)
        # Arrays, as worker processes share them; a list of keys would be copied into each bit by bit.
        self._keys = np.array(index.keys, dtype=np.bytes_)
        self._of = np.array(index.shards, dtype=np.int32)
        self._firsts = np.array([*index.firsts, len(index.offsets)], dtype=np.int64)
        self._offsets = np.array(index.offsets, dtype=np.int64)
        self._sizes = np.array(index.sizes, dtype=np.int64)
        self._kinds = np.array(index.kinds, dtype=np.int8)

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self._of)

    def __getitem__(self, index: int) -> object:
        """Reads one sample; see `Rows`."""
        with self._shards[self._of[index]].open("rb") as file:
            return self._read(index, file, with_images=True)

    def outlines(self, indices: range) -> Iterator[object]:
        """Yields samples whose images are empty bytes; see `Rows`."""
        for number, group in groupby(indices, key=lambda index: self._of[index]):
            with self._shards[number].open("rb") as file:
                for index in group:
                    try:
                        yield self._read(index, file, with_images=False)
                    except RowError as error:
                        yield error

    def where(self, index: int) -> str:
        """Returns the path of the shard and the key of the sample."""
        return f"{self._shards[self._of[index]]}:{self._key(index)}"

    def label(self, index: int) -> str:
        """Returns the name of the shard and the key of the sample."""
        return f"{self._shards[self._of[index]].name}:{self._key(index)}"

    def _key(self, index: int) -> str:
        return bytes(self._keys[index]).decode()

    def _read(self, index: int, file: BinaryIO, with_images: bool) -> dict[str, Any]:
        row: dict[str, Any] = {"images": [], "videos": []}
        for member in range(self._firsts[index], self._firsts[index + 1]):
            kind = KINDS[self._kinds[member]]
            if kind in VIDEOS:
                row["videos"].append(Later(partial(self._bytes, index, member)))
                continue
            data = b""
            if with_images or kind in TEXTS:
                file.seek(self._offsets[member])
                data = file.read(self._sizes[member])
            if kind in IMAGES:
                row["images"].append(data)
            else:
                row[kind] = decode_json(data) if kind == "json" else _text(data)
        return row

    def _bytes(self, index: int, member: int) -> bytes:
        with self._shards[self._of[index]].open("rb") as file:
            file.seek(self._offsets[member])
            data: bytes = file.read(self._sizes[member])
        return data


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError(f"the text is not in UTF-8: {error}") from error


@dataclass(frozen=True)
class _CaptionOfMembers:
    """A sample of one image or clip and its caption."""

    adapt: CaptionFormat

    def __call__(self, row: dict[str, Any], index: int) -> Adapted:
        images, videos = row["images"], row["videos"]
        if len(images) + len(videos) != 1:
            number = len(images) + len(videos)
            problem = Problem("expected one image or clip beside the caption", key="images", value=number)
            return Adapted({}, problems=[problem])
        adapt = replace(self.adapt, medium="video" if videos else "image")
        adapted = adapt({"image": (images or videos)[0], "txt": row.get("txt")}, index)
        adapted.keys |= {"images[0]": "images", "videos[0]": "videos"}
        return adapted


@dataclass(frozen=True)
class _ConversationOfMembers:
    """A sample whose JSON is a conversation about its images and clips."""

    adapt: Format
    images: str
    videos: str

    def __call__(self, row: dict[str, Any], index: int) -> Adapted:
        if not isinstance(row.get("json"), dict):
            return Adapted({}, problems=[Problem("expected an object", key="json", value=row.get("json"))])
        return self.adapt({**row["json"], self.images: row["images"], self.videos: row["videos"]}, index)
