"""Checkpoints as directories of files: which there are, in which format, from what, and whether they are whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theworld_train.config.errors import ConfigError

MANIFEST_FILE = "manifest.json"
#: Names the bases and the files of the components.
COMPONENTS_FILE = "components.json"
STATE_FILE = "state.json"
#: Of all three. A checkpoint of any other format is refused.
FORMAT = 3
#: Key of the manifest that holds the digest of all else in it.
SEAL = "sha256"

_STEP = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run took its first weights from.

    Attributes:
        path: Where it was.
        manifest_sha256: Hash of its manifest, and thereby of everything in it.
    """

    path: str
    manifest_sha256: str


class DamagedCheckpointError(ConfigError):
    """Files of a checkpoint are missing or not what was saved."""


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checkpoints(directory: Path) -> list[Path]:
    """Returns the sealed checkpoints of a run directory in the order of their steps."""
    found = [path for path in directory.glob("step-*") if _STEP.match(path.name) and (path / MANIFEST_FILE).is_file()]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Returns the step of a checkpoint from its name."""
    match = _STEP.match(path.name)
    assert match, f"{path} is no checkpoint"
    return int(match.group(1))


def resolve_checkpoint(path: Path) -> Path:
    """Returns the checkpoint itself, given it or its run's directory.

    Raises:
        ConfigError: If there is none.
    """
    found = newest_checkpoint(path)
    if found is None:
        raise ConfigError(
            f"{path} is no checkpoint: it holds neither {MANIFEST_FILE} nor a step-N directory that is complete"
        )
    return found


def newest_checkpoint(path: Path) -> Path | None:
    """Returns the checkpoint itself, given it or its run's directory, or None if there is none."""
    if (path / MANIFEST_FILE).is_file():
        return path
    return next(reversed(checkpoints(path)), None)


def origin_of(checkpoint: Path) -> Origin:
    """Returns what a run records that starts from a checkpoint."""
    return Origin(str(checkpoint.resolve()), file_sha256(checkpoint / MANIFEST_FILE))


def recorded_origin(record: dict[str, Any]) -> Origin | None:
    """Returns the origin that a `components.json` states; None if the run started from its bases."""
    return None if record["init_from"] is None else Origin(**record["init_from"])


def read_record(path: Path) -> dict[str, Any]:
    """Reads one of the JSON files of a checkpoint that state a format.

    Raises:
        DamagedCheckpointError: If it is missing or damaged.
        ConfigError: If it is of another format.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        found = record["format"]
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error!r}") from error
    if found != FORMAT:
        raise ConfigError(
            f"{path} is of format {found!r}, but this version of theworld-train reads format {FORMAT}; "
            "use the version that wrote it"
        )
    return record


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Returns the SHA-256 of what a manifest says, but for the seal itself."""
    said = {key: value for key, value in manifest.items() if key != SEAL}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Compares a checkpoint's manifest with its seal and every file with the manifest, and returns the manifest.

    Raises:
        DamagedCheckpointError: Naming the file that is missing or has changed.
        ConfigError: If it is of another format.
    """
    manifest_path = path / MANIFEST_FILE
    if not manifest_path.is_file():
        raise DamagedCheckpointError(f"{path} is no complete checkpoint: it has no {MANIFEST_FILE}")
    manifest = read_record(manifest_path)
    if manifest.get(SEAL) != manifest_digest(manifest):
        raise DamagedCheckpointError(f"{manifest_path} is damaged: it does not agree with its own SHA-256")
    try:
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{manifest_path} is damaged: {error!r}") from error
    for name, saved in files.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpointError(f"{file} is missing")
        found = (file.stat().st_size, file_sha256(file))
        if found != saved:
            raise DamagedCheckpointError(
                f"{file} is not what was saved: {found[0]:,} bytes with SHA-256 {found[1]}, "
                f"but {MANIFEST_FILE} says {saved[0]:,} bytes with {saved[1]}"
            )
    return manifest


def verify_components(directory: Path, names: set[str]) -> None:
    """Compares the files of components with the hashes in `components.json`.

    Args:
        directory: The checkpoint.
        names: The components that are about to be read; the checkpoint need not hold all of them.

    Raises:
        ConfigError: Naming the file that is missing or has changed.
    """
    for name, entry in read_record(directory / COMPONENTS_FILE)["components"].items():
        file = directory / entry["file"]
        if name not in names:
            continue
        if not file.is_file():
            raise ConfigError(f"{file} is missing")
        if file_sha256(file) != entry["sha256"]:
            raise ConfigError(f"{file} is not what was saved: its hash differs from {COMPONENTS_FILE}")
