"""Encoded media as files: what an encoder has made of images and clips, kept by their content under a recipe.

`DIR/<kind>-<key>/recipe.json` states all that determines the values, and the key is its hash. Beside it lie safetensors
shards, which never change: tensors by the digest of what was encoded, and in the header a checksum of each. A shard is
written aside, synced and renamed, so that there are whole ones alone, whenever the writer dies.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from theworld_train.checkpoint_files import sync
from theworld_train.config.errors import ConfigError, Problem

RECIPE_FILE = "recipe.json"
SUFFIX = ".safetensors"
#: Version of the layout; part of every recipe.
FORMAT = 1
#: A shard is sealed when it holds so many bytes, or is so many seconds old: what a killed writer loses at most.
SHARD_BYTES = 256 * 2**20
SHARD_S = 300.0
#: Configuration key that names the directory, for errors.
KEY = "data.encoded"

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_METADATA = "__metadata__"
#: Keys of a shard's header besides the checksums.
_SECONDS, _LENGTH_BYTES = "seconds", 8


def frames_digest(frames: Sequence[Image.Image], prompt: str = "") -> str:
    """Returns a 128-bit digest of the sizes and RGB pixels of an image (one frame) or clip, as 32 hex digits.

    Args:
        frames: The frames.
        prompt: What was asked of the encoder besides, if anything.
    """
    digest = xxhash.xxh3_128()
    for frame in frames:
        rgb = frame if frame.mode == "RGB" else frame.convert("RGB")
        digest.update(f"{rgb.width}x{rgb.height};".encode())
        digest.update(rgb.tobytes())
    digest.update(prompt.encode())
    return str(digest.hexdigest())


# -- recipes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """All that determines what an encoder makes of a given picture.

    Attributes:
        kind: What is kept, such as the name of the component that makes it.
        values: JSON values by name.
    """

    kind: str
    values: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Hash of the recipe."""
        return hashlib.sha256(json.dumps(self._record(), sort_keys=True).encode()).hexdigest()[:16]

    def folder(self, directory: Path) -> Path:
        """Returns where a directory keeps the entries of this recipe."""
        return directory / f"{self.kind}-{self.key}"

    def write(self, directory: Path) -> Path:
        """Makes the recipe's folder, unless it is there, and returns it."""
        folder = self.folder(directory)
        folder.mkdir(parents=True, exist_ok=True)
        sync(directory)
        if not (folder / RECIPE_FILE).is_file():
            _write(folder / RECIPE_FILE, json.dumps(self._record(), indent=1, sort_keys=True).encode())
        return folder

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """Returns the names under which another recipe has other values, with its value and ours; None if absent."""
        pairs = {name: (other.values.get(name), self.values.get(name)) for name in {**self.values, **other.values}}
        return {name: (theirs, ours) for name, (theirs, ours) in pairs.items() if theirs != ours}

    def _record(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": self.kind, "values": dict(self.values)}


def recipes_in(directory: Path, kind: str) -> list[Recipe]:
    """Returns the recipes of a kind that a directory holds.

    Raises:
        ConfigError: If a recipe is damaged, or of another format.
    """
    found = []
    for path in sorted(directory.glob(f"{kind}-*/{RECIPE_FILE}")):
        try:
            record = json.loads(path.read_bytes())
            recipe = Recipe(record["kind"], dict(record["values"]))
            whole = recipe.folder(directory) == path.parent and record["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(Problem(f"{path} cannot be read: {error!r}", key=KEY)) from error
        if not whole:
            message = f"{path} is damaged or of another format: it is not what its folder is named after"
            raise ConfigError(Problem(message, key=KEY, hint="remove the folder"))
        found.append(recipe)
    return found


def refuse_stale(directory: Path, recipe: Recipe, unknown: Collection[str] = ()) -> None:
    """Refuses a directory that holds a kind under other recipes alone; one that does not hold it is no problem.

    Args:
        directory: That holds the recipes' folders.
        recipe: What is asked for.
        unknown: Names of values that are not known yet, and are not compared.

    Raises:
        ConfigError: With both values of each that differs, compared with the recipe that comes closest.
    """
    differing = [
        {name: pair for name, pair in recipe.differences(other).items() if name not in unknown}
        for other in recipes_in(directory, recipe.kind)
    ]
    if not differing or not all(differing):
        return
    hint = "add one for this run with `theworld-train encode CONFIG`, or set data.encoded=null"
    raise ConfigError(
        [
            Problem(f"its {recipe.kind} differs in {name}: {theirs!r} there, {ours!r} in this run", hint=hint, key=KEY)
            for name, (theirs, ours) in min(differing, key=len).items()
        ]
    )


# -- reading --------------------------------------------------------------------------------------------------------


class EncodedFiles:
    """The entries of one recipe, found by content; it may be handed to other processes, and keeps no file open."""

    def __init__(self, folder: Path | None = None) -> None:
        """Reads the headers of all shards of a folder; none has no entries.

        Raises:
            ConfigError: Naming a shard that is damaged.
        """
        self._shards = [] if folder is None else sorted(folder.glob(f"*{SUFFIX}"))
        self._forms: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self.seconds = 0.0
        """What it took to encode all entries."""
        rows = [row for number in range(len(self._shards)) for row in self._index(number)]
        rows.sort()
        self._digests = np.array([row[0] for row in rows], dtype="S32")
        self._checksums = np.array([row[1] for row in rows], dtype="S32")
        #: Of each entry: shard, first byte, byte behind the last, form.
        self._places = np.array([row[2:] for row in rows], dtype=np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        """Returns the number of entries."""
        return len(self._digests)

    def __contains__(self, digest: str) -> bool:
        """Whether there is an entry of this content."""
        return self._row(digest) is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return int((self._places[:, 2] - self._places[:, 1]).sum())

    @property
    def digests(self) -> list[str]:
        """The contents that there are entries of, in order."""
        return [digest.decode() for digest in self._digests.tolist()]

    def find(self, frames: Sequence[Image.Image], prompt: str = "") -> Tensor | None:
        """Returns what was made of an image (one frame) or clip, or None if that is not known; see `get`."""
        return self.get(frames_digest(frames, prompt)) if len(self) else None

    def get(self, digest: str) -> Tensor | None:
        """Returns the entry of a content, or None.

        Raises:
            ConfigError: If the shard is gone, or the entry is not what was written.
        """
        row = self._row(digest)
        if row is None:
            return None
        number, begin, end, form = self._places[row].tolist()
        path, data = self._shards[number], bytearray(end - begin)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(begin)
                read = file.readinto(data)
        except OSError as error:
            raise _damage(path, f"cannot be read: {error.strerror}") from error
        if read != len(data) or xxhash.xxh3_128(data).hexdigest().encode() != self._checksums[row]:
            raise _damage(path, f"is damaged: entry {digest} is not what was written")
        dtype, shape = self._forms[form]
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def verify(self) -> list[Problem]:
        """Reads every entry and returns a problem for each shard of which one is damaged."""
        found: dict[str, Problem] = {}
        for digest in self.digests:
            try:
                self.get(digest)
            except ConfigError as error:
                found.setdefault(str(self._shards[self._places[self._row(digest), 0]]), error.problems[0])
        return list(found.values())

    def forget_pages(self) -> None:
        """Asks the system to drop the shards from its page cache, so that reading them is timed as from the disk."""
        for path in self._shards if hasattr(os, "posix_fadvise") else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _row(self, digest: str) -> int | None:
        wanted = np.bytes_(digest.encode())
        row = int(np.searchsorted(self._digests, wanted))
        return row if row < len(self._digests) and self._digests[row] == wanted else None

    def _index(self, number: int) -> Iterator[tuple[str, str, int, int, int, int]]:
        """Yields digest, checksum and place of each entry of a shard."""
        path = self._shards[number]
        try:
            header, start, size = _read_header(path)
            said = header.pop(_METADATA)
            self.seconds += float(said[_SECONDS])
            last = start
            for digest, entry in header.items():
                begin, end = (start + offset for offset in entry["data_offsets"])
                dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
                if math.prod(shape) * dtype.itemsize != end - begin:
                    raise ValueError(f"entry {digest} has {end - begin} bytes for {shape} in {dtype}")
                if (dtype, shape) not in self._forms:
                    self._forms.append((dtype, shape))
                last = max(last, end)
                yield digest, said[digest], number, begin, end, self._forms.index((dtype, shape))
            if last != size:
                raise ValueError(f"{size:,} bytes, and its header says {last:,}")
        except OSError as error:
            raise _damage(path, f"cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damage(path, f"is damaged: {error}") from error


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Returns the header of a safetensors file, the byte behind it, and the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if _LENGTH_BYTES + length > size:
            raise ValueError(f"{size:,} bytes, fewer than its header has")
        return json.loads(file.read(length)), _LENGTH_BYTES + length, size


def _damage(path: Path, what: str) -> ConfigError:
    hint = "remove the file: what it held is encoded in flight, or anew by `theworld-train encode CONFIG`"
    return ConfigError(Problem(f"{path} {what}", key=KEY, hint=hint))


# -- writing --------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Collects entries of one recipe and writes them as shards."""

    def __init__(self, folder: Path, made_on: Mapping[str, str]) -> None:
        """Args: folder: of the recipe. made_on: device and versions, recorded in each shard."""
        self._folder, self._made_on = folder, made_on
        self._begin()

    def add(self, digest: str, tensor: Tensor, seconds: float) -> None:
        """Adds the entry of a content, and how long it took; a shard that is full is sealed.

        Raises:
            ConfigError: If it cannot be written; earlier shards are whole.
        """
        self._tensors[digest] = tensor.detach().cpu().contiguous()
        self._seconds += seconds
        self._held += tensor.nbytes
        if self._held >= SHARD_BYTES or time.monotonic() - self._began >= SHARD_S:
            self.seal()

    def seal(self) -> None:
        """Writes what has been collected.

        Raises:
            ConfigError: As `add` does.
        """
        if not self._tensors:
            return
        sums = {digest: xxhash.xxh3_128(_bytes(tensor)).hexdigest() for digest, tensor in self._tensors.items()}
        name = xxhash.xxh3_128("".join(sorted(sums)).encode()).hexdigest()
        said = {**self._made_on, _SECONDS: repr(self._seconds), **sums}
        _write(self._folder / f"{name}{SUFFIX}", save(self._tensors, said))
        self._begin()

    def _begin(self) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._seconds, self._held = 0.0, 0
        self._began = time.monotonic()


def clear_partials(directory: Path) -> None:
    """Removes what killed writers have left half written."""
    for partial in directory.glob("*/.*.partial"):
        partial.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.view(-1).view(torch.uint8).numpy().tobytes()


def _write(path: Path, data: bytes) -> None:
    """Writes a file that is there as a whole, and synced, or not at all.

    Raises:
        ConfigError: If the file system does not take it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        message = f"{path} cannot be written: {error.strerror}; {free:,} bytes are free"
        hint = "mend that and run it again: it goes on with what is missing"
        raise ConfigError(Problem(message, key=KEY, hint=hint)) from error
