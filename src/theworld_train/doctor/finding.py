"""What an examination says: one line for each thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "bad"]
STATES: tuple[State, ...] = ("ok", "warn", "bad")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at, such as `torch` or `/dev/shm`.
        state: `ok`; `warn` where a run may work or only some runs fail; `bad` where one will fail.
        text: What was found.
        advice: What to do about it; None if nothing is to be done.
    """

    check: str
    state: State
    text: str
    advice: str | None = None


def worst(findings: list[Finding]) -> State:
    """Returns the worst state of several findings."""
    return max((finding.state for finding in findings), key=STATES.index, default="ok")


def gib(size: int) -> str:
    """Writes a number of bytes in GiB."""
    return f"{size / 2**30:.1f} GiB"
