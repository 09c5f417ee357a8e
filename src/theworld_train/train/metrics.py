"""Where a run's numbers go: a JSONL file always, trackers and a progress display besides."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from theworld_train.accounting.gpus import Range
from theworld_train.config.errors import Problem

GIB = 2**30
#: Steps of a process that say little of the others: kernels are chosen, memory is taken, the optimizer's state is made.
WARM_UP_STEPS = 2


class MetricsFile:
    """`metrics.jsonl`: a line for each event, flushed as it is written."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Opens the file; lines of steps that a resumed run takes again are removed first.

        Args:
            path: The file.
            first_step: Optimizer steps done already.
        """
        if path.exists():
            _replace(path, [line for line in path.read_text().splitlines() if _is_before(line, first_step)])
        self._path = path
        self._file = path.open("a")

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one event of a step."""
        self._file.write(json.dumps({"event": event, "step": step, **values}) + "\n")
        self._file.flush()

    def forget(self, event: str, step: int) -> None:
        """Removes an event of a step that is about to be measured again."""
        self._file.close()
        rows = [json.loads(line) for line in self._path.read_text().splitlines()]
        kept = [row for row in rows if (row["event"], row["step"]) != (event, step)]
        _replace(self._path, map(json.dumps, kept))
        self._file = self._path.open("a")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _replace(path: Path, lines: Iterable[str]) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(f"{line}\n" for line in lines))
    os.replace(temporary, path)


def _is_before(line: str, first_step: int) -> bool:
    """Whether a line belongs to a step that stays; a torn last line does not."""
    try:
        return int(json.loads(line)["step"]) <= first_step
    except (ValueError, KeyError):
        return False


def read_metrics(path: Path, *events: str) -> list[dict[str, Any]]:
    """Returns the events of some kinds from a metrics file, in their order."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["event"] in events]


@dataclass(frozen=True)
class Resources:
    """What a process of a run has really taken in its steps.

    Attributes:
        peak_bytes: Most bytes that a rank has held: tensors on a GPU; on a CPU, what the process has grown by.
        step_s: Median seconds of a step, without the first ones and without waiting for data; None if there were none.
        ranks: Their number.
        device: What they computed on, such as `NVIDIA H100 80GB HBM3` or `cpu`.
        positions: Tokens of the longest micro-batch, padding included.
        supervised: Supervised tokens of the micro-batch that had most, for each of its samples.
        data_wait: Share of the time of steps that the main rank has waited for data, without the first ones; None if
            there were none.
    """

    peak_bytes: int
    step_s: float | None
    ranks: int
    device: str
    positions: int
    supervised: int
    data_wait: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What a plan says of a run.

    Attributes:
        peak_bytes: Most bytes that a rank holds in tensors.
        step_s: Seconds of a step; None where no time is planned, as on a CPU.
    """

    peak_bytes: int
    step_s: Range | None


def resources_row(taken: Resources, forecast: Forecast | None) -> dict[str, float | int | str]:
    """Returns what was taken and what was planned as a row of the metrics file."""
    row: dict[str, float | int | str] = {
        "ranks": taken.ranks,
        "device": taken.device,
        "positions": taken.positions,
        "supervised": taken.supervised,
        "memory/peak_bytes": taken.peak_bytes,
    }
    if taken.step_s is not None:
        row["time/step_s"] = taken.step_s
    if taken.data_wait is not None:
        row["time/data_wait_share"] = taken.data_wait
    if forecast is None:
        return row
    row["memory/planned_bytes"] = forecast.peak_bytes
    row["memory/measured_over_planned"] = taken.peak_bytes / forecast.peak_bytes
    if forecast.step_s is not None:
        row |= {f"time/planned_step_s/{case}": value for case, value in forecast.step_s._asdict().items()}
        if taken.step_s is not None:
            row["time/measured_over_planned"] = taken.step_s / forecast.step_s.expected
    return row


def resources_line(taken: Resources, forecast: Forecast) -> str:
    """Says what was taken and what was planned: `peak 1.74 GiB, 1.70 planned (+2%); step 0.52 s, 0.40-0.70 planned`."""
    off = taken.peak_bytes / forecast.peak_bytes - 1
    whole = "the process grew by" if taken.device == "cpu" else "peak"
    planned = "planned for tensors" if taken.device == "cpu" else "planned"
    line = f"{whole} {taken.peak_bytes / GIB:.2f} GiB, {forecast.peak_bytes / GIB:.2f} {planned} ({off:+.0%})"
    if taken.step_s is None:
        return line
    line += f"; step {taken.step_s:.2f} s"
    if forecast.step_s is not None:
        line += f", {forecast.step_s.best:.2f}-{forecast.step_s.worst:.2f} planned"
    if taken.data_wait is not None:
        line += f"; {taken.data_wait:.1%} of the time waiting for data"
    return line


def missing_trackers(trackers: Sequence[str]) -> list[Problem]:
    """Returns a problem for each tracker whose package is not installed, so that it is told before a model loads."""
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
