"""The metric of a sweep: whether a run writes it, and its values as a run goes on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from theworld_train.config.errors import Problem, did_you_mean
from theworld_train.config.gates import reads_answers
from theworld_train.config.schema import RunConfig

METRICS_FILE = "metrics.jsonl"
#: Metrics of a step, of the whole held-out data, and for each kind of question (decision 15).
STEP_METRICS = (
    "train/loss",
    "train/grad_norm",
    "train/supervised_tokens",
    "train/tokens",
    "time/tokens_per_s",
    "train/padding_share",
    "train/trimmed",
    "train/skipped",
    "time/step_s",
    "time/data_wait_s",
)
EVAL_METRICS = ("eval/loss", "eval/predicted", "eval/exact", "eval/normalized", "eval/correct", "eval/dropped")
EVAL_FAMILIES = (
    "eval/loss/",
    "eval/predicted/",
    "eval/exact/",
    "eval/normalized/",
    "eval/correct/",
)
_ANSWERS = "evaluation.max_new_tokens"
#: Most values of a metric of steps that a trial reports on its way.
MOST_REPORTED = 100


def metric_problem(metric: str, config: RunConfig, varied: Collection[str] = ()) -> Problem | None:
    """Says why a run never writes a metric, if it does not.

    Args:
        metric: The metric.
        config: The run, without what is varied.
        varied: Dotted keys of the run that are varied.
    """
    if metric in STEP_METRICS:
        return None
    known = metric in EVAL_METRICS or any(metric.startswith(family) and metric != family for family in EVAL_FAMILIES)
    if not known:
        hint = did_you_mean(metric, (*STEP_METRICS, *EVAL_METRICS, *EVAL_FAMILIES))
        return Problem(f"{config.name} writes no such metric", key="metric", value=metric, hint=hint)
    if config.data.eval is None:
        message = f"{config.name} never measures it, as it has no data.eval"
        return Problem(message, key="metric", value=metric, hint="state data.eval, or take train/loss")
    generates = config.evaluation.max_new_tokens is not None or {"evaluation", _ANSWERS} & {*varied}
    if reads_answers(metric) and not generates:
        message = f"{config.name} never measures it, as it generates no answers"
        return Problem(message, key="metric", value=metric, hint=f"set {_ANSWERS}")
    return None


def report_interval(metric: str, config: RunConfig) -> int:
    """Returns how many steps lie at least between two values that are reported on the way."""
    if metric not in STEP_METRICS:
        return 1
    return max(1, (config.training.max_steps or 100 * MOST_REPORTED) // MOST_REPORTED)


@dataclass
class MetricReader:
    """Follows a metric in a file that a run is writing.

    Attributes:
        path: The file; it need not exist yet.
        metric: Name of the metric.
        last: The newest value, with its step.
    """

    path: Path
    metric: str
    last: tuple[int, float] | None = None
    _offset: int = 0
    _identity: tuple[int, int] = field(default=(0, 0))

    def new(self) -> list[tuple[int, float]]:
        """Returns the steps and values that have been written since the last call.

        A run that goes on writes the file anew, without the steps that it takes again; it is then read from its start.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._offset:
                self._identity, self._offset, self.last = identity, 0, None
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        found = [point for line in whole.splitlines() if (point := _point(line, self.metric))]
        if found:
            self.last = found[-1]
        return found


def _point(line: bytes, metric: str) -> tuple[int, float] | None:
    try:
        row: dict[str, Any] = json.loads(line)
        return int(row["step"]), float(row[metric])
    except (ValueError, KeyError, TypeError):
        return None


def metrics_in(path: Path) -> list[str]:
    """Returns the names of all numbers in a metrics file."""
    names: dict[str, None] = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        names |= {key: None for key, value in row.items() if "/" in key and isinstance(value, int | float)}
    return list(names)


def final_value(reader: MetricReader) -> tuple[float | None, str | None]:
    """Returns the value that a complete run has come to, or why it has none."""
    reader.new()
    if reader.last is None:
        names = metrics_in(reader.path)
        hint = did_you_mean(reader.metric, names)
        return None, f"the run wrote no {reader.metric}" + (f"; {hint}" if hint else "")
    value = reader.last[1]
    return (value, None) if math.isfinite(value) else (None, f"{reader.metric} is {value:g} at step {reader.last[0]}")
