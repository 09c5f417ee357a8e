"""Heartbeats, and the end of a run whose ranks wait for each other in vain: a report says where each of them is."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

#: Of a run directory; holds `rank-R.json` and, once the run is stuck, `rank-R.LAUNCH.stacks`.
HEARTBEATS = "heartbeat"
#: Exit code of ranks that have waited in vain; sysexits.h calls it a service that is unavailable.
STUCK = 69
#: Seconds between two looks at the clock, or a tenth of the limit if that is less.
INTERVAL_S = 1.0
#: Collectives give up by themselves so many seconds after the limit, so that the report comes first.
REPORT_S = 30
#: How many times the limit the model may take to load.
LOADING_PATIENCE = 3
#: Seconds that the other ranks have to write their stacks once one of them has noticed.
COLLECT_S = 3.0
#: Seconds after which a rank that has noticed ends, whatever the file system does.
LAST_S = 10.0


def clear_heartbeats(directory: Path) -> None:
    """Removes what an earlier process of the run has left; one rank calls it before any of them begins to beat."""
    shutil.rmtree(directory / HEARTBEATS, ignore_errors=True)


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        phase: What it does, in a word or two.
        step: The optimizer step that this belongs to.
        sample_ids: The rank's own samples of the step.
        patience: How many times the usual limit it may take to move on.
        since: When it last moved, in seconds of a clock that nobody sets.
        time: The same by the calendar.
    """

    phase: str
    step: int
    sample_ids: tuple[str, ...]
    patience: float
    since: float = field(default_factory=time.monotonic)
    time: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


class Watchdog:
    """Writes where this rank is, and ends the process if it stays there for too long.

    A thread does both, since the main thread of a rank that waits in a collective is in native code. It writes at most
    once in an interval, so that steps never wait for the file system.
    """

    def __init__(self, directory: Path, rank: int, world_size: int, limit_s: float, launch: str = "") -> None:
        """Begins with the loading of the model.

        Args:
            directory: Of the run, which all ranks see.
            rank: This process's rank.
            world_size: Number of ranks; a single one waits for nobody, and only writes.
            limit_s: Seconds without a beat after which the run is stuck.
            launch: Tells this launch from others: a rank of an earlier one may wake and write its stacks after all.
        """
        self._directory, self._folder = directory, directory / HEARTBEATS
        self._rank, self._world_size, self._limit_s, self._launch = rank, world_size, limit_s, launch
        self._interval_s = min(INTERVAL_S, limit_s / 10)
        self._own = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._written: Place | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.enter("loading", 0, patience=LOADING_PATIENCE)

    def enter(self, phase: str, step: int, sample_ids: Sequence[str] = (), patience: float = 1.0) -> None:
        """Says what this rank does from now on.

        Args:
            phase: In a word or two.
            step: The optimizer step that it belongs to.
            sample_ids: This rank's samples of the step.
            patience: How many times the usual limit it may take until the next beat.
        """
        self._place = Place(phase, step, tuple(sample_ids), patience)

    def beat(self) -> None:
        """Says that this rank has moved on within what it does."""
        here = self._place
        self._place = Place(here.phase, here.step, here.sample_ids, here.patience)

    def __enter__(self) -> Watchdog:
        """Starts the thread."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the thread; the last heartbeat stays."""
        self._done.set()
        self._thread.join(COLLECT_S)  # unless the file system holds it: then it ends with the process

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._done.wait(self._interval_s):
            here = self._place
            late = time.monotonic() - here.since > self._limit_s * here.patience
            if self._world_size > 1 and (late or self._noticed()):
                self._end()
            self._write(here)

    def _write(self, here: Place) -> None:
        if here is self._written:
            return
        shown = {key: getattr(here, key) for key in ("phase", "step", "sample_ids", "time")}
        with suppress(OSError):  # a full disk must not end a run that saves nothing at the moment
            _replace(self._folder / f"rank-{self._rank}.json", json.dumps(self._own | shown))
            self._written = here

    def _noticed(self) -> list[int]:
        """Returns the ranks of this launch that have written their stacks, as far as the file system answers."""
        with suppress(OSError):
            written = self._folder.glob(f"rank-*.{self._launch}.stacks")
            return sorted(int(path.name.split(".")[0].removeprefix("rank-")) for path in written)
        return []

    def _stacks_file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.{self._launch}.stacks"

    def _end(self) -> None:
        last = threading.Timer(LAST_S, os._exit, (STUCK,))  # should the file system be what holds the run
        last.daemon = True
        last.start()
        try:
            self._write(self._place)
            _replace(self._stacks_file(self._rank), _stacks())
            deadline = time.monotonic() + COLLECT_S
            while len(self._noticed()) < self._world_size and time.monotonic() < deadline:
                time.sleep(0.05)
            if self._rank == min(self._noticed()):
                self._report()
            else:  # a launcher ends all ranks with the first that ends, the one that writes the report too
                deadline = time.monotonic() + COLLECT_S
                while not self._report_file().is_file() and time.monotonic() < deadline:
                    time.sleep(0.05)
        finally:
            last.cancel()
            os._exit(STUCK)

    def _report(self) -> None:
        noticed = self._noticed()
        lines = [
            f"The run is stuck: a rank has not moved within runtime.timeout_s ({self._limit_s:g} s), so all ranks end; "
            "resume=latest goes on from the newest checkpoint."
        ]
        for rank in range(self._world_size):
            lines.append(f"rank {rank}: {_described(self._folder / f'rank-{rank}.json')}")
            if rank not in noticed:
                lines[-1] += " -- says nothing any more: stopped, killed or cut off; this was its last heartbeat"
        for rank in noticed:
            lines += [f"\n== stacks of rank {rank}", self._stacks_file(rank).read_text()]
        report = "\n".join(lines)
        print(report, file=sys.stderr, flush=True)
        _replace(self._report_file(), report)

    def _report_file(self) -> Path:
        return self._directory / f"stuck-step-{self._place.step}.txt"


def _described(path: Path) -> str:
    """Renders a heartbeat."""
    try:
        beat = json.loads(path.read_text())
    except (OSError, ValueError):
        return "has left no heartbeat"
    samples = f", samples {', '.join(beat['sample_ids'])}" if beat["sample_ids"] else ""
    return (
        f"{beat['phase']}, step {beat['step']}, last moved at {beat['time']} "
        f"(process {beat['pid']} on {beat['host']}){samples}"
    )


def _stacks() -> str:
    """Returns what every thread of this process does, the main thread first and this one left out."""
    frames, main, own = sys._current_frames(), threading.main_thread().ident, threading.get_ident()
    threads = sorted(threading.enumerate(), key=lambda thread: thread.ident != main)
    return "\n".join(
        f"thread {thread.name}\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in threads
        if thread.ident != own and thread.ident in frames
    )


def _replace(path: Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
