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
    """The unusable samples of a run. All ranks meet the same ones, and so end in the same step; one of them writes."""

    def __init__(self, path: Path | None = None, limit: int | None = None) -> None:
        """Begins to count; earlier launches of the run have written what they have met.

        Args:
            path: The file, on the rank that writes; None on the others, or to keep nothing.
            limit: Different samples that a launch may meet; None if there is no limit.
        """
        self._path, self._limit = path, limit
        self._met: set[str] = set()
        lines = [] if path is None or not path.is_file() else path.read_text(encoding="utf-8").splitlines()
        self._written = {name for line in lines if (name := _id_of(line)) is not None}

    @property
    def is_full(self) -> bool:
        """Whether there are more than the budget allows."""
        return self._limit is not None and len(self._met) > self._limit

    def take(self, dropped: Iterable[Dropped], step: int) -> None:
        """Takes in the samples of all ranks that a step has gone without.

        Args:
            dropped: The samples; those that the config asks to drop are passed over.
            step: Optimizer steps done, this one included.
        """
        unusable = {item.sample_id: item.reason for item in dropped if not item.asked_for}
        self._met |= unusable.keys()
        new = {name: reason for name, reason in unusable.items() if name not in self._written}
        if new and self._path is not None:
            rows = [{"id": name, "reason": reason, "step": step} for name, reason in new.items()]
            with self._path.open("a+b") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                # A run that was killed may have left a part of a line.
                start = b"\n" if file.read() not in (b"", b"\n") else b""
                file.write(start + "".join(json.dumps(row) + "\n" for row in rows).encode())
            self._written |= new.keys()

    def check(self) -> None:
        """Ends a run whose budget is used up.

        Raises:
            ConfigError: If it is.
        """
        if self.is_full:
            message = f"{len(self._met)} different samples could not be used, more than may"
            hint = (
                f"{QUARANTINE_FILE} of the run names them: mend them, or list the file under data.exclude (and "
                "data.exclude under allow_changed), or raise the number; then resume=latest"
            )
            raise ConfigError(Problem(message, key="data.max_bad_samples", value=self._limit, hint=hint))


def _id_of(line: str) -> str | None:
    """Returns the id in a line, or None if only a part of it was written."""
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError, TypeError):
        return None
