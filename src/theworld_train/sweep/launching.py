"""One launch of a trial: its process, what it prints, and what its end means."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from theworld_train.train.stopping import SAVED_AND_STOPPED, end_with_parent

State = Literal[
    "running",
    "interrupted",
    "complete",
    "pruned",
    "does_not_fit",
    "out_of_memory",
    "timed_out",
    "invalid",
    "failed",
]
#: How a launch has ended that nothing else is known of; `interrupted` is no result, the trial goes on later.
Ending = Literal["exited", "interrupted", "out_of_memory", "failed"]

#: Seconds that a trial has to save after SIGTERM.
GRACE_S = 600
#: Bytes at the end of a log that are looked at, and lines of it that are kept.
LOG_TAIL_BYTES = 1 << 16
LOG_TAIL_LINES = 10
#: Signals that somebody sends to stop a process; a trial that one ends has not failed.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|can't allocate memory|Cannot allocate memory"
    r"|std::bad_alloc|^MemoryError\b",
    re.MULTILINE,
)
_SAYING = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*|^error: .*", re.MULTILINE)


@dataclass
class Launch:
    """A process that runs a trial.

    Attributes:
        process: The process.
        log: Where it prints.
        log_start: Length of the log before it.
        started: When it began, by the monotonic clock.
        asked: Why it has been told to stop, if it has.
    """

    process: subprocess.Popen[bytes]
    log: Path
    log_start: int
    started: float = field(default_factory=time.monotonic)
    asked: Literal["pruned", "timed_out", "interrupted"] | None = None
    _deadline: float = float("inf")

    def stop(self, why: Literal["pruned", "timed_out", "interrupted"]) -> None:
        """Has it save and end at the next step; it is killed if it has not after `GRACE_S`."""
        if self.asked is None:
            self.asked = why
            self._deadline = time.monotonic() + GRACE_S
            self.process.terminate()

    def poll(self) -> int | None:
        """Returns its exit code, negative if by a signal, or None while it runs."""
        if time.monotonic() > self._deadline:
            self.kill()
        return self.process.poll()

    def kill(self) -> None:
        """Kills it and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self.started

    def tail(self) -> list[str]:
        """Returns the last lines that it has printed."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self.log_start, size - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
        # A progress bar rewrites its line.
        return [line.rpartition("\r")[2].rstrip() for line in text.split("\n") if line.strip()]


def start(command: Sequence[str], environment: Mapping[str, str], log: Path, lock: IO[str]) -> Launch:
    """Starts a trial's process.

    It is a group of its own, so that Ctrl-C reaches it through its controller alone. When the controller ends in
    whatever way, the kernel sends it SIGTERM (Linux), on which it saves and ends.

    Args:
        command: What to run.
        environment: Its variables.
        log: Takes what it prints, after what is there.
        lock: The trial's lock, which it inherits.
    """
    own = os.getpid()

    def begin() -> None:
        end_with_parent(signal.SIGTERM)
        if os.getppid() != own:
            os._exit(1)

    with log.open("ab") as output:
        size = output.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
            preexec_fn=begin,
        )
    return Launch(process, log, size)


def ending(returncode: int, tail: Sequence[str]) -> tuple[Ending, str | None]:
    """Returns what the end of a process means, and why it came.

    Args:
        returncode: Its exit code, negative if by a signal.
        tail: The last lines that it has printed.
    """
    code = exit_code(returncode)
    if code == 0:
        return "exited", None
    if code == SAVED_AND_STOPPED or any(code == 128 + number for number in STOPPING):
        return "interrupted", f"stopped by a signal (exit code {code})"
    text = "\n".join(tail)
    said = [match[0] for match in _SAYING.finditer(text)]
    if found := _OUT_OF_MEMORY.search(text):
        lines = [line for line in text.splitlines() if _OUT_OF_MEMORY.search(line)]
        return "out_of_memory", (lines[-1] if lines else found[0]).strip()[:300]
    if code == 128 + signal.SIGKILL:
        return "failed", "killed (exit code 137), often for a lack of host memory"
    last = said[-1] if said else tail[-1] if tail else "it printed nothing"
    return "failed", f"exit code {code}: {last.strip()[:300]}"


def exit_code(returncode: int) -> int:
    """Returns a process's exit code as a shell tells it: 128 + the signal that has ended it."""
    return returncode if returncode >= 0 else 128 - returncode
