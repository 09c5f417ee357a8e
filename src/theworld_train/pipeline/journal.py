"""The journal of a pipeline: one line for each thing that has happened to a stage, never rewritten."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

JOURNAL_FILE = "journal.jsonl"
FORMAT = 1

State = Literal["running", "complete", "failed", "stopped", "skipped"]


class Journal:
    """Appends to a journal; every line is on the disk before the pipeline goes on."""

    def __init__(self, directory: Path) -> None:
        """Args: directory: the pipeline's."""
        self._path = directory / JOURNAL_FILE

    def begin(self, pipeline: str, stages: Sequence[str]) -> None:
        """Writes that a command begins to run the pipeline.

        Args:
            pipeline: Its name.
            stages: Names of all its stages, in order.
        """
        whose = {"host": socket.gethostname(), "pid": os.getpid()}
        self._append({"event": "run", "format": FORMAT, "pipeline": pipeline, "stages": list(stages), **whose})

    def attempts(self, stage: str) -> int:
        """Returns how often a stage has been launched."""
        return max((row["attempt"] for row in self._rows(stage)), default=0)

    def launched(self, stage: str) -> None:
        """Writes that a stage is launched, once more."""
        self._write(stage, "running", self.attempts(stage) + 1, None, None)

    def note(self, stage: str, state: State, reason: str | None = None, exit_code: int | None = None) -> None:
        """Writes what has become of a stage, unless its last line says the same.

        Args:
            stage: Its name.
            state: Its state now.
            reason: Why, as a sentence.
            exit_code: Of its process, where that has ended.
        """
        rows = self._rows(stage)
        if not rows or (rows[-1]["state"], rows[-1]["reason"]) != (state, reason):
            self._write(stage, state, self.attempts(stage), reason, exit_code)

    def _write(self, stage: str, state: State, attempt: int, reason: str | None, exit_code: int | None) -> None:
        facts = {"stage": stage, "state": state, "attempt": attempt, "reason": reason, "exit_code": exit_code}
        self._append({"event": "stage", **facts})

    def _rows(self, stage: str) -> list[dict[str, Any]]:
        return [row for row in read_journal(self._path.parent) if row["event"] == "stage" and row["stage"] == stage]

    def _append(self, values: dict[str, Any]) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **values})
        with self._path.open("ab+") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            # A kill in the midst of a line leaves it without its end.
            torn = end > 0 and file.read(1) != b"\n"
            file.write(f"{chr(10) * torn}{line}\n".encode())
            file.flush()
            os.fsync(file.fileno())


def read_journal(directory: Path) -> list[dict[str, Any]]:
    """Returns the lines of a pipeline's journal; one that a kill has torn is left out.

    Args:
        directory: The pipeline's.
    """
    path = directory / JOURNAL_FILE
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "event" in row:
            rows.append(row)
    return rows
