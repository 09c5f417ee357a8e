"""Sweeps whose trials are scripted, and a controller in a process of its own.

Usage: `python -m tests.helpers.sweeps SWEEP WORKERS`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.helpers import scripted_trial
from theworld_train.config import load_sweep_config
from theworld_train.config.schema import RunConfig
from theworld_train.sweep.controller import Controller, Worker
from theworld_train.sweep.opening import begin
from theworld_train.sweep.study import Study

BASE: dict[str, Any] = {
    "name": "base",
    "output_dir": "runs/base",
    "trainable": {"world_projector": {}},
    "data": {"train": {"source": "jsonl", "path": "train.jsonl"}, "eval": {"source": "jsonl", "path": "eval.jsonl"}},
    "training": {"max_steps": scripted_trial.STEPS},
    "schedule": {"warmup_steps": scripted_trial.WELL},
    "evaluation": {"every_steps": 1},
}
#: Launches scripted trials; it makes nothing of words after it.
LAUNCHER = (sys.executable, scripted_trial.__file__)
#: A rate that `fits` says cannot fit.
TOO_LARGE = 0.9
#: One that `fits` fails at.
NO_PLAN = 0.8


def write_sweep(folder: Path, **settings: Any) -> Path:
    """Writes `base.yaml` and a sweep of it whose trials are scripted, and returns the sweep's path."""
    sweep: dict[str, Any] = {
        "name": "scripted",
        "output_dir": str(folder / "sweep"),
        "config": "base.yaml",
        "space": {"optimizer.lr": {"values": [0.1, 0.3]}},
        "search": "grid",
        "metric": "eval/loss",
        "direction": "minimize",
        "launcher": [*LAUNCHER, "--nproc=1"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({**sweep, **settings}, sort_keys=False))
    return path


def fits(run: RunConfig, processes: int) -> str | None:
    """Says that a rate takes too much memory, in the place of the plan, unless eight processes divide it."""
    if run.optimizer.lr == NO_PLAN:
        raise NotImplementedError("no plan of it")
    return "it takes 90 GiB, and the GPU has 79" if run.optimizer.lr == TOO_LARGE and processes < 8 else None


def controller_of(path: Path, workers: Sequence[Worker], said: list[str] | None = None) -> Controller:
    """Begins a sweep, or goes on with it, in this process."""
    found = begin(load_sweep_config(path), str(path))
    study = Study(found.sweep, found.directory, found.axes, found.wanted, found.run)
    return Controller(found.sweep, study, found.target, workers, (said if said is not None else []).append, fits)


if __name__ == "__main__":
    controller_of(Path(sys.argv[1]), [Worker(None, 1)] * int(sys.argv[2])).run()
