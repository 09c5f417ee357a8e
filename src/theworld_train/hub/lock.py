"""The lock file: the commits that models and datasets are pinned to."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from huggingface_hub.constants import DEFAULT_REVISION
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from theworld_train.config.errors import ConfigError, Problem

LOCK_FILE = "theworld.lock.json"
FETCH_HINT = "run `theworld-train fetch CONFIG` once where the network is reachable"

_COMMIT = r"^[0-9a-f]{40}$"

Kind = Literal["model", "dataset"]
Commit = Annotated[str, Field(pattern=_COMMIT)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LockedModel(_Record):
    """A repository of weights: the revision that configs ask for, the commit that it is, and its files' sizes."""

    revision: str
    commit: Commit
    files: dict[str, int]


class LockedDataset(_Record):
    """A dataset: the revision that configs ask for, the commit that it is, and what was fetched of it.

    That is configurations, and of one that is streamed its files with their sizes.
    """

    revision: str
    commit: Commit
    configs: tuple[str | None, ...] = (None,)
    files: dict[str, int] = {}


class Lock(_Record):
    """What `fetch` has fetched, by id."""

    version: Literal[1] = 1
    created_by: str = ""
    models: dict[str, LockedModel] = {}
    datasets: dict[str, LockedDataset] = {}

    def entry(self, kind: Kind, name: str) -> LockedModel | LockedDataset | None:
        """Returns what is recorded of a repository, or None."""
        return self.models.get(name) if kind == "model" else self.datasets.get(name)


def read_lock(path: str | os.PathLike[str]) -> Lock:
    """Reads a lock file.

    Args:
        path: The file.

    Returns:
        The lock; an empty one if there is no such file.

    Raises:
        ConfigError: If the file is no lock.
    """
    try:
        return Lock.model_validate_json(Path(path).read_bytes())
    except FileNotFoundError:
        return Lock()
    except OSError as error:
        raise ConfigError(Problem(f"cannot be read: {error.strerror}", source=os.fspath(path))) from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or None
        hint = "delete it and run `theworld-train fetch CONFIG` again"
        message = f"not a lock file that this version reads: {first['msg']}"
        raise ConfigError(Problem(message, source=os.fspath(path), key=key, hint=hint)) from None


def write_lock(path: str | os.PathLike[str], lock: Lock) -> None:
    """Writes a lock file in one piece: a reader finds the old one or the new one.

    Raises:
        ConfigError: If it cannot be written.
    """
    from theworld_train import __version__

    values = lock.model_dump(mode="json") | {"created_by": f"theworld-train {__version__}"}
    values |= {kind: dict(sorted(values[kind].items())) for kind in ("models", "datasets")}
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            json.dump(values, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise ConfigError(Problem(f"cannot be written: {error.strerror}", source=os.fspath(path))) from None


def pinned_revision(lock: Lock, name: str, requested: str | None, kind: Kind = "model") -> str | None:
    """Returns the commit that a run is to use.

    Args:
        lock: The lock.
        name: Id of the repository.
        requested: Revision that the config states; None is `main`.
        kind: Whether it holds weights or a dataset.

    Returns:
        The config's revision if that is a full commit, else what the lock says, or None if it says nothing.

    Raises:
        ConfigError: If config and lock contradict each other.
    """
    entry = lock.entry(kind, name)
    if entry is None:
        return requested if is_commit(requested) else None
    agree = requested == entry.commit if is_commit(requested) else wanted(requested) == entry.revision
    if not agree:
        message = (
            f"the config asks for revision {wanted(requested)!r} of {name}, but the lock holds {entry.revision!r}, "
            f"which is commit {entry.commit}"
        )
        hint = "change the config, or lock what it asks for: `theworld-train fetch CONFIG`"
        raise ConfigError(Problem(message, hint=hint))
    return entry.commit


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a full commit rather than the name of a branch or a tag."""
    return revision is not None and re.fullmatch(_COMMIT, revision) is not None


def wanted(revision: str | None) -> str:
    """Returns the revision that a config asks for, which is `main` if it states none."""
    return revision or DEFAULT_REVISION
