"""Where a run's numbers go: a JSONL file always, trackers and a progress display besides."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from theworld_train.config.errors import Problem


class MetricsFile:
    """`metrics.jsonl`: a line for each event, flushed as it is written."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Opens the file; lines of steps that a resumed run takes again are removed first.

        Args:
            path: The file.
            first_step: Optimizer steps done already.
        """
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _is_before(line, first_step)]
            temporary = path.with_suffix(".partial")
            temporary.write_text("".join(f"{line}\n" for line in kept))
            os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one event of a step."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _is_before(line: str, first_step: int) -> bool:
    """Whether a line belongs to a step that stays; a torn last line does not."""
    try:
        return int(json.loads(line)["step"]) <= first_step
    except (ValueError, KeyError):
        return False


def read_metrics(path: Path, event: str) -> list[dict[str, Any]]:
    """Returns the events of one kind from a metrics file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["event"] == event]


def missing_trackers(trackers: Sequence[str]) -> list[Problem]:
    """Returns a problem for each tracker whose package is not installed; Accelerate would leave it out silently."""
    return [
        Problem(
            f"needs the package '{name}', which is not installed",
            key="tracking.trackers",
            value=name,
            hint=f"pip install 'theworld-train[{name}]'",
        )
        for name in trackers
        if find_spec(name) is None
    ]


class ProgressDisplay:
    """A progress bar on a terminal, and a plain line now and then elsewhere."""

    #: Seconds between plain lines.
    PLAIN_INTERVAL_S = 10.0

    def __init__(self, console: Console, name: str, first_step: int, max_steps: int) -> None:
        """Args: console: where to write. name: of the run. first_step: steps done. max_steps: steps in all."""
        self._console = console
        self._name = name
        self._max_steps = max_steps
        self._first_step = first_step
        self._started = time.monotonic()
        self._last_line = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(name, total=max_steps, completed=first_step, text="")
            self._bar.start()

    def update(self, step: int, *, loss: float, rate: float, tokens_per_s: float) -> None:
        """Shows the state after an optimizer step."""
        text = f"loss {loss:.4f}  rate {rate:.2e}  {tokens_per_s:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._last_line >= self.PLAIN_INTERVAL_S or step in (self._first_step + 1, self._max_steps):
            self._last_line = now
            left = (now - self._started) / max(1, step - self._first_step) * (self._max_steps - step)
            self._console.print(
                f"{self._name}  step {step}/{self._max_steps}  {text}  {left:.0f} s left", highlight=False
            )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.stop()
