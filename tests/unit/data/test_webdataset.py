"""Shards: read from where their members lie, in any order, and nothing but plain files gets in."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.unit.data.conftest import problems_of
from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import WebDatasetSource
from theworld_train.data import Source, UnreadableSampleError, open_source

Member = tuple[str, bytes]


def picture(color: int, suffix: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (color, 0, 0)).save(buffer, format=suffix)
    return buffer.getvalue()


def shard(path: Path, members: Iterable[Member | tarfile.TarInfo], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            info.mtime = 0.5  # WebDataset's writer states fractions of a second, which take an extended header
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def samples(first: int, number: int) -> list[Member]:
    return [
        member
        for key in range(first, first + number)
        for member in (
            (f"{key:09}.jpg", picture(10 * key)),
            (f"{key:09}.json", json.dumps({"key": key}).encode()),
            (f"{key:09}.txt", f"number {key}".encode()),
        )
    ]


def read(path: Path, **fields: Any) -> Source:
    return open_source(WebDatasetSource(source="webdataset", path=str(path), **fields))


def captions(source: Source) -> list[str]:
    return [source[index].messages[1]["content"][0]["text"] for index in range(len(source))]


def test_shards_follow_each_other_by_name_and_are_read_in_any_order(tmp_path: Path) -> None:
    shard(tmp_path / "00001.tar", samples(3, 2))
    shard(tmp_path / "00000.tar", samples(0, 3))
    (tmp_path / "00000.parquet").write_bytes(b"metadata that img2dataset leaves")
    source = read(tmp_path)
    assert list(source.check()) == []
    assert captions(source) == [f"number {key}" for key in range(5)]
    for index in (4, 0, 3, 2):
        sample = source[index]
        assert sample.id == f"0000{index // 3}.tar:{index:09}"
        assert sample.messages[0]["content"][0]["image"].getpixel((0, 0)) == (10 * index, 0, 0)


@pytest.mark.parametrize("options", [{"format": tarfile.USTAR_FORMAT}, {"format": tarfile.GNU_FORMAT}, {}])
def test_each_kind_of_header(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = "a" * 90
    members = [(f"./{folder}/{'b' * 60}.{suffix}", data) for suffix, data in (("png", picture(1)), ("txt", b"one"))]
    source = read(shard(tmp_path / "a.tar", members, **options))
    assert list(source.check()) == []
    assert source[0].id == f"a.tar:./{folder}/{'b' * 60}"


def test_what_is_a_sample(tmp_path: Path) -> None:
    """Neighbours whose names agree up to the first dot; folders count, capitals of suffixes do not."""
    directory = tarfile.TarInfo("train")
    directory.type = tarfile.DIRTYPE
    members = [
        directory,
        ("train/a.b.JPG", picture(1, "JPEG")),
        ("train/a.txt", b"one"),
        ("train/a.cls", b"3"),
        ("test/a.png", picture(2)),
        ("test/a.TXT", "\ufeffzwei".encode()),
        ("notes", b"left alone"),
        (".hidden.png", b"left alone"),
    ]
    source = read(shard(tmp_path / "a.tar", members))
    assert list(source.check()) == []
    assert captions(source) == ["one", "zwei"]
    assert [source[index].id for index in (0, 1)] == ["a.tar:train/a", "a.tar:test/a"]


def test_members_that_are_not_neighbours_are_told(tmp_path: Path) -> None:
    members = [("0.png", picture(1)), ("1.png", picture(2)), ("0.txt", b"zero"), ("1.txt", b"one")]
    found = [str(problem) for problem in problems_of(read(shard(tmp_path / "a.tar", members)))]
    assert [problem.split(": ")[0].rpartition("/")[2] for problem in found] == [
        f"a.tar:{key}" for key in ("0", "1", "0 (2)", "1 (2)")
    ]


def test_no_two_samples_have_the_same_id(tmp_path: Path) -> None:
    """Keys may be those of other shards, and of samples of the same shard that are no neighbours."""
    again = [(f"0 (2).{suffix}", data) for suffix, data in (("png", picture(3)), ("txt", b"three"))]
    first, second = ([(f"{key}.png", picture(key)), (f"{key}.txt", b"one")] for key in (0, 1))
    shard(tmp_path / "a.tar", [*first, *second, *again, *first])
    shard(tmp_path / "b.tar", first)
    source = read(tmp_path)
    assert list(source.check()) == []
    assert [source[index].id for index in range(5)] == ["a.tar:0", "a.tar:1", "a.tar:0 (2)", "a.tar:0 (3)", "b.tar:0"]


def test_conversations_about_several_images(tmp_path: Path) -> None:
    content = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "Which?"}]
    row = {
        "id": "mine",
        "kind": "two",
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}],
    }
    members = [("0.left.png", picture(1)), ("0.right.png", picture(2)), ("0.json", json.dumps(row).encode())]
    source = read(shard(tmp_path / "a.tar", members), format="conversations")
    assert list(source.check()) == []
    assert (source[0].id, source[0].kind) == ("mine", "two")
    assert [part["image"].getpixel((0, 0))[0] for part in source[0].messages[0]["content"][:2]] == [2, 1]


def test_paths_in_conversations_are_refused(tmp_path: Path) -> None:
    content = [{"type": "image"}, {"type": "video", "path": "/etc/hostname"}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
    members = [("0.png", picture(1)), ("0.json", json.dumps(row).encode())]
    source = read(shard(tmp_path / "a.tar", members), format="conversations")
    (problem,) = problems_of(source)
    assert "messages[0].content[1].path: paths have no meaning" in str(problem)
    with pytest.raises(UnreadableSampleError, match="paths have no meaning"):
        source[0]


def test_a_damaged_image_names_the_sample(tmp_path: Path) -> None:
    source = read(shard(tmp_path / "a.tar", [("0.jpg", picture(1)[:30]), ("0.txt", b"zero")]))
    assert list(source.check()) == []
    with pytest.raises(UnreadableSampleError, match=r"a\.tar:0: images"):
        source[0]


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    return info


REFUSED = {
    "an absolute name": (("/etc/0.png", picture(1)), "/etc/0.png: the name leads out of the shard"),
    "a name with dots": (("a/../../0.png", picture(1)), "a/../../0.png: the name leads out of the shard"),
    "a name without end": (
        ("n" * 2000 + ".png", picture(1)),
        f"{'n' * 80}...: the name has more than 1,024 characters",
    ),
    "a symbolic link": (special("0.png", tarfile.SYMTYPE, "/etc/hostname"), "0.png: is a link, a device"),
    "a hard link": (special("0.png", tarfile.LNKTYPE, "1.png"), "0.png: is a link, a device"),
    "a character device": (special("0.png", tarfile.CHRTYPE), "0.png: is a link, a device"),
    "a block device": (special("0.png", tarfile.BLKTYPE), "0.png: is a link, a device"),
    "a pipe": (special("0.png", tarfile.FIFOTYPE), "0.png: is a link, a device"),
    "a sparse file": (special("0.png", tarfile.GNUTYPE_SPARSE), "0.png: is a link, a device"),
}


@pytest.mark.parametrize(("member", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_plain_file_within_the_shard_is_refused(
    tmp_path: Path, member: Member | tarfile.TarInfo, expected: str
) -> None:
    path = shard(tmp_path / "a.tar", [*samples(0, 1), member, *samples(2, 1)], format=tarfile.GNU_FORMAT)
    with pytest.raises(ConfigError, match=r"a\.tar") as caught:
        read(path)
    assert f"{path}: {expected}" in str(caught.value)


def test_every_refused_shard_is_listed(tmp_path: Path) -> None:
    for number in range(3):
        shard(tmp_path / f"{number}.tar", [("/0.png", b"")] if number else samples(0, 1))
    with pytest.raises(ConfigError) as caught:
        read(tmp_path)
    assert [Path(str(problem.source)).name for problem in caught.value.problems] == ["1.tar", "2.tar"]


def test_members_and_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "a.tar", samples(0, 2))
    assert len(read(path)) == 2
    for bound, value, expected in (
        ("MAX_MEMBERS", 5, "more than 5 members"),
        ("MAX_TEXT_BYTES", 7, r"000000000\.json: has 10 bytes, and 7 are allowed"),
        ("MAX_IMAGE_BYTES", 40, r"000000000\.jpg: has \d+ bytes, and 40 are allowed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"theworld_train.data.webdataset.{bound}", value)
            with pytest.raises(ConfigError, match=expected):
                read(path)


def test_a_size_that_the_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("0.txt")
    info.size = 10**9
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 512)
    with pytest.raises(ConfigError, match=r"a\.tar"):
        read(path)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    """They cannot be read in any order, and a small one can hold a large one."""
    path = shard(tmp_path / "plain.tar", samples(0, 1))
    packed = tmp_path / "a.tar"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ConfigError, match=r"a\.tar: not an uncompressed tar file"):
        read(packed)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_a_truncated_shard_is_refused(tmp_path: Path, share: float) -> None:
    path = shard(tmp_path / "a.tar", samples(0, 3))
    size = len(path.read_bytes().rstrip(b"\0"))
    path.write_bytes(path.read_bytes()[: int(size * share)])
    with pytest.raises(ConfigError, match=r"a\.tar: .*damaged"):
        read(path)


def test_a_damaged_header_between_members_is_no_end(tmp_path: Path) -> None:
    """Python's reader takes it for the end of the shard, and the samples after it would be missing in silence."""
    path = shard(tmp_path / "a.tar", samples(0, 3), format=tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    place = data.index(b"000000001.jpg")
    data[place + 150] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"damaged: no member begins at byte {place:,}"):
        read(path)


def test_a_shard_that_has_gone_missing_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", samples(0, 3))
    source = read(path)
    path.unlink()
    (finding,) = source.check()
    assert finding.index is None
    assert f"{path}: cannot be read: " in str(finding.problems[0])
    for load in (source.__getitem__, source.outline):
        with pytest.raises(UnreadableSampleError, match=rf"a\.tar:000000002: cannot be read: .*{path}"):
            load(2)


@pytest.mark.parametrize("content", [b"", b"no tar at all", b"\0" * 10240])
def test_what_is_no_shard_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.tar"):
        read(path)


def test_random_damage_ends_in_an_error_or_a_sample(tmp_path: Path) -> None:
    import random

    path = shard(tmp_path / "a.tar", samples(0, 3))
    whole = path.read_bytes()
    draw = random.Random(0)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(len(whole.rstrip(b"\0")))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            source = read(path)
            problems = problems_of(source)
            for index in range(len(source)):
                assert source[index].messages or problems
        except (ConfigError, UnreadableSampleError):
            continue


def test_a_directory_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the directory holds no tar files"):
        read(tmp_path)
