"""Sweeps that wandb searches: its definition of one, and a trial with the values that it has chosen."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.sweep.opening import Checked
from theworld_train.sweep.space import Axis
from theworld_train.sweep.target import CONFIG_FILE, STAGES

#: What wandb calls the ways to search; its own Bayesian search takes the place of TPE.
METHODS = {"grid": "grid", "random": "random", "tpe": "bayes"}
DIRECTORY = "wandb-trials"


def definition(found: Checked, path: str) -> str:
    """Returns a sweep as `wandb sweep` takes it.

    Its agent starts one process for each trial, outside of any launcher, and gives it all values as one JSON argument.
    That process writes them into the config of one launch, whose ranks therefore read the same.

    Args:
        found: The sweep.
        path: Its file, as the agents will read it.
    """
    sweep = found.sweep
    document: dict[str, Any] = {
        "name": sweep.name,
        "project": found.run.tracking.project,
        "method": METHODS[sweep.search],
        "metric": {"name": sweep.metric, "goal": sweep.direction},
        "run_cap": found.wanted,
        "parameters": {axis.key: _parameter(axis) for axis in found.axes},
        "program": "theworld-train",
        "command": ["${program}", "sweep", "trial", path, "--values", "${args_json}"],
    }
    if sweep.pruner == "hyperband":
        document["early_terminate"] = {"type": "hyperband", "min_iter": found.run.evaluation.every_steps or 1}
    return yaml.safe_dump(document, sort_keys=False, width=4096)


def _parameter(axis: Axis) -> dict[str, Any]:
    if axis.choices is not None:
        # As JSON has them: YAML's safe dumper knows no tuples.
        return {"values": json.loads(json.dumps(axis.choices))}
    if axis.step is not None:
        return {"values": list(axis.stepped())}  # wandb would round to multiples of the step, wherever the range begins
    low, high = axis.corners()
    if axis.log:
        return {"distribution": "q_log_uniform_values" if axis.whole else "log_uniform_values", "min": low, "max": high}
    return {"distribution": "int_uniform" if axis.whole else "uniform", "min": low, "max": high}


def prepare_trial(found: Checked, text: str) -> Path:
    """Writes the config of a trial with values that wandb has chosen.

    The run takes its id from the agent (`WANDB_RUN_ID`), which has to be online to know of it.

    Args:
        found: The sweep.
        text: The values by dotted key, as JSON.

    Returns:
        The config to launch.

    Raises:
        ConfigError: If the values are not those of the sweep's space, or make no config.
    """
    values = _values(found.axes, text)
    name = os.environ.get("WANDB_RUN_ID", "trial")
    directory = found.directory / DIRECTORY / name
    # Of a pipeline, wandb looks at the stage of the metric.
    prefix = "" if found.target.stages is None else f"{STAGES}.{found.run.name}."
    trackers = found.run.tracking.trackers
    tracking = {
        f"{prefix}tracking.trackers": [*trackers, *(() if "wandb" in trackers else ("wandb",))],
        f"{prefix}tracking.wandb_mode": "online",
    }
    label = f"{found.sweep.name[:58]}-{name}"[:64]
    found.target.resolve({**tracking, **values}, label, str(directory / "run"), "--values").write(directory)
    return directory / CONFIG_FILE


def _values(axes: Sequence[Axis], text: str) -> dict[str, object]:
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        message = 'expected a JSON object of dotted keys, such as {"optimizer.lr": 1e-3}'
        raise ConfigError(Problem(message, key="--values", value=text))
    by_key = {axis.key: axis for axis in axes}
    problems = [
        Problem("is not varied by the sweep", key=key, source="--values", hint=did_you_mean(key, list(by_key)))
        for key in given
        if key not in by_key
    ]
    problems += [Problem("has no value", key=key, source="--values") for key in by_key if key not in given]
    if problems:
        raise ConfigError(problems)
    return {key: _typed(by_key[key], value) for key, value in given.items()}


def _typed(axis: Axis, value: object) -> object:
    """Returns a value as the key takes it: wandb gives whole numbers of a quantised range as floats."""
    if axis.whole and isinstance(value, float) and value.is_integer():
        return int(value)
    return value
