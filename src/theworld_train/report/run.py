"""What a run has left on disk, and the sections of a report that it fills."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theworld_train.checkpoint_files import checkpoints
from theworld_train.report.files import flat, part, read_json, read_lines, read_yaml
from theworld_train.report.words import number, whole

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.yaml"
RESULT_FILE = "result.json"
EVALUATION_FILE = "evaluation.json"
QUARANTINE_FILE = "quarantine.jsonl"
RECORD_FILE = "run.json"
LEDGER_FILE = "ledger.json"

#: Step and value, one after the other.
Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class RunRecord:
    """What a run directory holds, as far as it is whole.

    Attributes:
        directory: The run directory.
        name: Name of the run.
        config: The resolved config as plain data, empty if it is missing.
        steps: Rows of the optimizer steps in their order, one for each.
        evals: Rows of the held-out measurements.
        starts: Rows of the launches.
        resources: What was taken beside what was planned, or None.
        result: `result.json`, if the run is complete.
        ledger: The parameter ledger, or None.
        record: `run.json`, or None.
        evaluation: `evaluation.json`, or None.
        quarantine: The samples that could not be used.
        saved: Steps of the checkpoints.
        remarks: What was damaged and left out.
    """

    directory: Path
    name: str
    config: Mapping[str, Any]
    steps: tuple[dict[str, Any], ...]
    evals: tuple[dict[str, Any], ...]
    starts: tuple[dict[str, Any], ...]
    resources: dict[str, Any] | None
    result: dict[str, Any] | None
    ledger: dict[str, Any] | None
    record: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    quarantine: tuple[dict[str, Any], ...]
    saved: tuple[int, ...]
    remarks: tuple[str, ...]

    @property
    def last_step(self) -> int:
        """Optimizer steps that have been recorded."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def max_steps(self) -> int | None:
        """Optimizer steps that the run is to take, if its config counts in steps or it is complete."""
        done = None if self.result is None else whole(self.result, "steps")
        return whole(flat(self.config), "training.max_steps") if done is None else done

    def curve(self, key: str) -> Points:
        """Returns a metric of the optimizer steps as points; a value that is not finite stays one that is not."""
        return curve(self.steps, key)


def curve(rows: tuple[dict[str, Any], ...], key: str) -> Points:
    """Returns step and value of the rows that hold a number under a key."""
    return tuple((float(row["step"]), value) for row in rows if (value := number(row, key)) is not None)


def is_run(directory: Path) -> bool:
    """Whether a directory is that of a run: it holds the run's config or metrics."""
    return (directory / METRICS_FILE).is_file() or (directory / CONFIG_FILE).is_file()


def read_run(directory: Path) -> RunRecord:
    """Reads a run directory; what is missing or damaged is left out, and what is damaged is said."""
    remarks: list[str] = []
    lines = read_lines(directory / METRICS_FILE)
    remarks += lines.remarks(METRICS_FILE)
    quarantine = read_lines(directory / QUARANTINE_FILE)
    remarks += quarantine.remarks(QUARANTINE_FILE)
    rows = [row for row in lines.rows if _has_step(row)]
    if len(rows) < len(lines.rows):
        remarks.append(f"{len(lines.rows) - len(rows)} of the lines of {METRICS_FILE} name no step; they are left out.")
    saved = checkpoints(directory)
    record = read_json(directory / RECORD_FILE, remarks)
    ledger = read_json(saved[-1] / LEDGER_FILE, remarks) if saved else None
    config = read_yaml(directory / CONFIG_FILE, remarks) or part(record, "config")
    return RunRecord(
        directory=directory,
        name=str(config.get("name") or directory.resolve().name),
        config=config,
        steps=_of_event(rows, "train"),
        evals=_of_event(rows, "eval"),
        starts=tuple(row for row in rows if row.get("event") == "start"),
        resources=next((row for row in reversed(rows) if row.get("event") == "resources"), None),
        result=read_json(directory / RESULT_FILE, remarks),
        ledger=ledger or part(record, "ledger") or None,
        record=record,
        evaluation=read_json(directory / EVALUATION_FILE, remarks),
        quarantine=quarantine.rows,
        saved=tuple(int(path.name.removeprefix("step-")) for path in saved),
        remarks=tuple(remarks),
    )


def _has_step(row: Mapping[str, Any]) -> bool:
    step = number(row, "step")
    return step is not None and math.isfinite(step)


def _of_event(rows: list[dict[str, Any]], event: str) -> tuple[dict[str, Any], ...]:
    """Returns the rows of an event in the order of steps; of a step that was taken twice, the later one."""
    last = {int(row["step"]): row for row in rows if row.get("event") == event}
    return tuple(last[step] for step in sorted(last))
