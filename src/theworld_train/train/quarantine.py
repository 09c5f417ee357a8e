"""Samples that could not be used: written down once each, and counted against a budget."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data import Dropped

QUARANTINE_FILE = "quarantine.jsonl"


class Quarantine:
    """The unusable samples of a run. All ranks see the same ones, and so end in the same step; one of them writes."""

    def __init__(self, path: Path | None = None, limit: int | None = None, *, writes: bool = False) -> None:
        """Goes on with what the run has met before.

        Args:
            path: The file; None to keep nothing.
            limit: Different samples that may be met; None if there is no limit.
            writes: Whether this rank writes them down.
        """
        self._path, self._limit, self._writes = path, limit, writes
        lines = [] if path is None or not path.is_file() else path.read_text(encoding="utf-8").splitlines()
        self._ids = {name for line in lines if (name := _id_of(line)) is not None}

    @property
    def is_full(self) -> bool:
        """Whether there are more than the budget allows."""
        return self._limit is not None and len(self._ids) > self._limit

    def take(self, dropped: Iterable[Dropped], step: int) -> None:
        """Takes in the samples of all ranks that a step has gone without.

        Args:
            dropped: The samples; those that are known already are passed over.
            step: Optimizer steps done, this one included.
        """
        new = {item.sample_id: item for item in dropped if item.sample_id not in self._ids}
        self._ids |= new.keys()
        if new and self._writes and self._path is not None:
            rows = [{"id": item.sample_id, "reason": item.reason, "step": step} for item in new.values()]
            with self._path.open("a+b") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                # A run that was killed may have left a part of a line.
                start = b"\n" if file.read() not in (b"", b"\n") else b""
                file.write(start + "".join(json.dumps(row) + "\n" for row in rows).encode())

    def check(self) -> None:
        """Ends a run whose budget is used up.

        Raises:
            ConfigError: If it is.
        """
        if self.is_full:
            message = f"{len(self._ids)} different samples could not be used, more than may"
            hint = f"mend those of {self._path}, or list it under data.exclude, or raise the number; then resume=latest"
            raise ConfigError(Problem(message, key="data.max_bad_samples", value=self._limit, hint=hint))


def _id_of(line: str) -> str | None:
    """Returns the id in a line, or None if only a part of it was written."""
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return None
