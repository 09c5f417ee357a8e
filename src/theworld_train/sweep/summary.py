"""What a sweep has come to, as plain values: `sweep.json`."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from optuna.trial import FrozenTrial

from theworld_train.config.sweep import Dimension, SweepConfig
from theworld_train.sweep.launching import State
from theworld_train.sweep.lock import sweep_lock
from theworld_train.sweep.study import EXIT_CODE, LAUNCHES, LOG_TAIL, REASON, Study
from theworld_train.sweep.target import BASE, CONFIG_FILE, TRIALS

FORMAT = 1
SUMMARY_FILE = "sweep.json"

Row = dict[str, Any]


def summarise(sweep: SweepConfig, study: Study) -> Row:
    """Returns all that is known of a sweep, ready for JSON; the caller holds its lock."""
    best = study.best()
    return {
        "format": FORMAT,
        "name": sweep.name,
        "kind": sweep.kind,
        "base": f"{BASE}/{CONFIG_FILE}",
        "search": sweep.search,
        "seed": sweep.seed,
        "metric": sweep.metric,
        "stage": sweep.stage,
        "direction": sweep.direction,
        "pruner": sweep.pruner,
        "trials_wanted": study.wanted,
        "space": {key: _dimension(dimension) for key, dimension in sweep.space.items()},
        "trials": [_trial(trial, study) for trial in study.trials()],
        "best": None if best is None else best.number,
        "importance": study.importance(),
    }


def summary_of(sweep: SweepConfig, study: Study) -> Row:
    """Returns all that is known of a sweep while nobody takes a trial: a look at its lock would be in the way."""
    study.importance()  # kept from here on: it takes a while, and others wait for the lock
    with sweep_lock(study.directory):
        return summarise(sweep, study)


def write_summary(summary: Row, directory: Path) -> None:
    """Replaces `sweep.json`."""
    partial = directory / f".{SUMMARY_FILE}.{os.getpid()}.partial"
    partial.write_text(json.dumps(summary, indent=1, allow_nan=False))
    partial.replace(directory / SUMMARY_FILE)


def counts(trials: Sequence[Mapping[str, Any]]) -> str:
    """Returns how many trials there are in each state, such as `9 complete, 2 pruned, 1 failed`."""
    states = Counter(trial["state"] for trial in trials)
    return ", ".join(f"{states[state]} {words(state)}" for state in get_args(State) if states[state]) or "none"


def words(state: str) -> str:
    """Returns a state as people are told it, such as `does not fit`."""
    return state.replace("_", " ")


def _dimension(dimension: Dimension) -> Row:
    if dimension.values is not None:
        return {"values": list(dimension.values)}
    return {"min": dimension.min, "max": dimension.max, "log": dimension.log, "step": dimension.step}


def _trial(trial: FrozenTrial, study: Study) -> Row:
    state, attributes = study.state_of(trial), trial.user_attrs
    started, ended = trial.datetime_start, trial.datetime_complete
    return {
        "number": trial.number,
        "state": state,
        "reason": attributes.get(REASON),
        "value": trial.value if state == "complete" else None,
        "values": study.values_of(trial.params),
        "intermediate": [
            [step, value if math.isfinite(value) else None] for step, value in sorted(trial.intermediate_values.items())
        ],
        "directory": f"{TRIALS}/{trial.number:04d}",
        "exit_code": attributes.get(EXIT_CODE),
        "log_tail": attributes.get(LOG_TAIL, []),
        "launches": attributes.get(LAUNCHES, 0),
        "started": _time(started),
        "ended": _time(ended),
        "seconds": None if started is None or ended is None else (ended - started).total_seconds(),
    }


def _time(moment: datetime | None) -> str | None:
    """Returns a time of Optuna's, which is local and says so nowhere, with its offset."""
    return None if moment is None else moment.astimezone().isoformat(timespec="milliseconds")
