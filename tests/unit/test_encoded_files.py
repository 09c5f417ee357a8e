"""Protects the store of encoded media: what is written is found again bit for bit, and what is damaged has a name."""

from __future__ import annotations

import errno
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from theworld_train import encoded_files
from theworld_train.config.errors import ConfigError
from theworld_train.encoded_files import (
    EncodedFiles,
    Recipe,
    ShardWriter,
    clear_partials,
    frames_digest,
    recipes_in,
    refuse_stale,
)

RECIPE = Recipe("world_encoder", {"weights": "abc", "resolution": 512, "resize": "pad"})
SINGLE = {number: frames_digest([Image.new("RGB", (4, 4), (number, 0, 0))]) for number in range(6)}


def value(number: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Entries of two shapes."""
    return torch.randn(1 + number % 2, 3, 2, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with six entries in three shards."""
    folder = RECIPE.write(tmp_path)
    for shard in range(3):
        writer = ShardWriter(folder, {"device": "cpu"})
        for number in (2 * shard, 2 * shard + 1):
            writer.add(SINGLE[number], value(number), seconds=0.5)
        writer.seal()
    return folder


# -- what is found ----------------------------------------------------------------------------------------------------


def test_entries_are_found_by_content(folder: Path):
    files = EncodedFiles(folder)
    assert len(files) == 6
    for number, digest in SINGLE.items():
        assert torch.equal(files.get(digest), value(number))
    assert torch.equal(files.find([Image.new("RGB", (4, 4), (3, 0, 0))]), value(3))
    assert files.find([Image.new("RGB", (4, 4), (3, 0, 1))]) is None
    assert files.nbytes == sum(value(number).nbytes for number in SINGLE)
    assert files.seconds == pytest.approx(3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_survive(tmp_path: Path, dtype: torch.dtype):
    writer = ShardWriter(tmp_path, {})
    writer.add(SINGLE[1], value(1, dtype).transpose(0, 1), seconds=0.0)
    writer.seal()
    found = EncodedFiles(tmp_path).get(SINGLE[1])
    assert found.dtype is dtype
    assert torch.equal(found, value(1, dtype).transpose(0, 1))


def test_workers_may_be_given_the_files(folder: Path):
    assert torch.equal(pickle.loads(pickle.dumps(EncodedFiles(folder))).get(SINGLE[4]), value(4))


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path):
    for empty in (EncodedFiles(), EncodedFiles(tmp_path / "absent")):
        assert len(empty) == empty.nbytes == 0
        assert empty.find([Image.new("RGB", (4, 4))]) is None
        assert SINGLE[0] not in empty


def test_digest_tells_pixels_sizes_and_order_apart():
    red, blue = Image.new("RGB", (2, 8), "red"), Image.new("RGB", (2, 8), "blue")
    different = [[red], [blue], [red, blue], [blue, red], [red, red], [Image.new("RGB", (8, 2), "red")]]
    assert len({frames_digest(frames) for frames in different}) == len(different)
    assert frames_digest([red.convert("RGBA")]) == frames_digest([red])


# -- shards -----------------------------------------------------------------------------------------------------------


def test_full_and_old_shards_are_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoded_files, "SHARD_BYTES", 2 * value(0).nbytes)
    writer = ShardWriter(tmp_path, {})
    writer.add(SINGLE[0], value(0), 0.0)
    assert len(EncodedFiles(tmp_path)) == 0
    writer.add(SINGLE[2], value(2), 0.0)
    assert len(EncodedFiles(tmp_path)) == 2
    monkeypatch.setattr(encoded_files, "SHARD_S", 0.0)
    writer.add(SINGLE[4], value(4), 0.0)
    assert len(EncodedFiles(tmp_path)) == 3
    writer.seal()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2, "an empty shard is none"


def test_full_disk_leaves_no_part_of_a_shard(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encoded_files, "sync", full)
    writer = ShardWriter(folder, {})
    writer.add("0" * 32, value(0), 0.0)
    with pytest.raises(ConfigError, match=r"data\.encoded: .*cannot be written: No space left on device; [\d,]+ bytes"):
        writer.seal()
    assert not list(folder.glob(".*"))
    assert len(EncodedFiles(folder)) == 6


def test_remains_of_killed_writers_go(folder: Path):
    remains = folder / ".abc.safetensors.17.partial"
    remains.write_bytes(b"half")
    assert len(EncodedFiles(folder)) == 6, "they are no shards"
    clear_partials(folder.parent)
    assert not remains.exists()


# -- damage -----------------------------------------------------------------------------------------------------------


def cut(data: bytes) -> bytes:
    return data[:-1]


def longer(data: bytes) -> bytes:
    return data + b"\0"


def headless(data: bytes) -> bytes:
    return b"\xff" * 8 + data[8:]


def torn_header(data: bytes) -> bytes:
    return data[:12] + b"\xfe" + data[13:]


@pytest.mark.parametrize("spoil", [cut, longer, headless, torn_header, lambda _: b""])
def test_damaged_shard_is_named_when_it_is_opened(folder: Path, spoil: Callable[[bytes], bytes]):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(spoil(shard.read_bytes()))
    with pytest.raises(ConfigError, match=rf"data\.encoded: .*{shard.name} is damaged.*remove the file"):
        EncodedFiles(folder)


def test_single_flipped_bit_is_found_when_the_entry_is_read(folder: Path):
    shard = sorted(folder.glob("*.safetensors"))[2]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    files = EncodedFiles(folder)
    (problem,) = files.verify()
    assert shard.name in problem.message
    readable, told = 0, []
    for digest in files.digests:
        try:
            files.get(digest)
            readable += 1
        except ConfigError as error:
            told.append(str(error))
    assert readable == 5
    assert [shard.name in text for text in told] == [True]


def test_shard_that_is_gone_is_named(folder: Path):
    files = EncodedFiles(folder)
    shard = next(folder.glob("*.safetensors"))
    shard.unlink()
    assert [shard.name in problem.message for problem in files.verify()] == [True]


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_every_value_is_in_the_key():
    changed = [{"weights": "x"}, {"resolution": 64}, {"resize": "crop"}, {"more": 1}]
    keys = {RECIPE.key, Recipe("other", RECIPE.values).key}
    keys |= {Recipe(RECIPE.kind, {**RECIPE.values, **values}).key for values in changed}
    assert len(keys) == 6


def test_recipe_of_another_value_is_stale_and_both_values_are_named(tmp_path: Path):
    RECIPE.write(tmp_path)
    Recipe(RECIPE.kind, {"weights": "far", "resolution": 64, "resize": "crop"}).write(tmp_path)
    refuse_stale(tmp_path, RECIPE)
    refuse_stale(tmp_path, Recipe("vision_tower", {"weights": "abc"}))
    other = Recipe(RECIPE.kind, {"weights": "abd", "resolution": 512, "resize": "pad"})
    with pytest.raises(ConfigError) as caught:
        refuse_stale(tmp_path, other)
    (problem,) = caught.value.problems
    assert str(problem).startswith("data.encoded: its world_encoder differs in weights: 'abc' there, 'abd' in this run")
    refuse_stale(tmp_path, other, unknown=["weights"])


def test_one_directory_keeps_several_recipes_apart(tmp_path: Path):
    other = Recipe(RECIPE.kind, {**RECIPE.values, "resolution": 64})
    assert RECIPE.write(tmp_path) != other.write(tmp_path)
    assert {recipe.key for recipe in recipes_in(tmp_path, RECIPE.kind)} == {RECIPE.key, other.key}


@pytest.mark.parametrize("spoil", ["", "{}", '{"format": 1, "kind": 3, "values": 4}'])
def test_damaged_recipe_is_named(tmp_path: Path, spoil: str):
    file = RECIPE.write(tmp_path) / "recipe.json"
    file.write_text(spoil)
    with pytest.raises(ConfigError, match=r"recipe\.json cannot be read"):
        recipes_in(tmp_path, RECIPE.kind)


def test_recipe_that_was_edited_is_not_taken(tmp_path: Path):
    file = RECIPE.write(tmp_path) / "recipe.json"
    record = json.loads(file.read_text())
    record["values"]["resolution"] = 64
    file.write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="not what its folder is named after"):
        recipes_in(tmp_path, RECIPE.kind)
