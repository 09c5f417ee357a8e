"""Runs on the tiny model that are broken on purpose, in one or two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.checkpoint_files import file_sha256, verify_checkpoint
from theworld_train.config import dump_config, parse_run_config
from theworld_train.model.digest import base_digests
from theworld_train.train.checkpoint import Base, CheckpointWriter, RunRecord, Snapshot, random_state
from theworld_train.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
#: Checkpoints that stay of those that `save` writes.
KEPT = 2
#: Writes the checkpoint of a step into a run directory.
Save = Callable[..., Path]
WORKER = Path(__file__).with_name("worker_faults.py")


@dataclass(frozen=True)
class Case:
    """A run, and what breaks it.

    Attributes:
        name: Of the case.
        run: Name of the run, which several cases may continue.
        sections: What its config says besides.
        faults: See `worker_faults.py`.
    """

    name: str
    run: str
    sections: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Launch:
    """What has become of the cases of a launch.

    Attributes:
        root: Holds the run directories.
        reports: Of each rank: how each case ended, and its samples by step.
    """

    root: Path
    reports: list[dict[str, Any]]

    def ended(self, case: str) -> list[list[str]]:
        """How a case ended on each rank: the exception's name and text, both empty if there was none."""
        return [report[case]["ended"] for report in self.reports]

    def ids(self, case: str) -> dict[int, list[str]]:
        """The samples of each step, of all ranks."""
        return {
            int(step): [name for report in self.reports for name in report[case]["ids"][step]]
            for step in self.reports[0][case]["ids"]
        }

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The metrics of a run's steps, without times."""
        rows = read_metrics(self.root / run / "metrics.jsonl", "train")
        return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]

    def steps(self, run: str) -> list[str]:
        """The checkpoints of a run by name, whole or not, and whatever else is hidden in its directory."""
        return sorted(path.name for pattern in ("step-*", ".step-*") for path in (self.root / run).glob(pattern))

    def tensors(self, run: str, step: int) -> dict[str, str]:
        """Hashes of the weights, optimizer and random states of a checkpoint, which has to be whole."""
        checkpoint = self.root / run / f"step-{step}"
        verify_checkpoint(checkpoint)
        return {path.name: file_sha256(path) for path in (*checkpoint.glob("*.safetensors"), checkpoint / "state.json")}


@pytest.fixture(scope="session")
def launch(tiny: TinyCheckpoint) -> Callable[[Path, int, list[Case]], Launch]:
    """Runs cases one after the other in one process group, so that one that hangs fails them all."""

    def run(root: Path, processes: int, cases: list[Case]) -> Launch:
        for case in cases:
            config = parse_run_config(settings(tiny, root / case.run) | {"name": case.run} | case.sections)
            (root / f"{case.name}.yaml").write_text(dump_config(config))
            (root / f"{case.name}.json").write_text(json.dumps(case.faults))
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        paths = [str(root / f"{case.name}.yaml") for case in cases]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
        command += [str(WORKER), str(root), *paths]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr[-4000:]
        return Launch(root, [json.loads((root / f"rank-{rank}.json").read_text()) for rank in range(processes)])

    return run


@pytest.fixture(scope="session")
def save(tiny: TinyCheckpoint) -> Save:
    """Writes checkpoints as a run does, without one."""
    model = tiny.theworld()
    record = RunRecord(
        run_name="test",
        config_yaml="name: test\n",
        model=model,
        processor=tiny.processor(),
        base=Base(tiny.gemma, None),
        encoder=Base(tiny.cosmos, None),
        init_from=None,
        trained=("world_projector",),
        initialised=(),
        base_digests=base_digests(model),
        ledger={},
    )

    def write(directory: Path, step: int, side: int = 512) -> Path:
        values = torch.full((side, side), float(step))
        snapshot = Snapshot({"world_projector": {"weight": values}}, {}, {"weight::exp_avg": values})
        return CheckpointWriter(directory, KEPT, record, {}).write(step, snapshot, [random_state()])

    return write


def settings(tiny: TinyCheckpoint, directory: Path, steps: int = 6) -> dict[str, Any]:
    """Returns a run of a few steps; dropout-free, so that two processes compute what one does."""
    return {
        "name": "run",
        "output_dir": str(directory),
        "precision": "fp32",
        "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": 32}},
        "trainable": {"world_projector": {"lr": 1e-3}},
        "data": {"train": {"source": "moving_digits", "split": "train", "samples": 14}, "num_workers": 0},
        "training": {"max_steps": steps, "global_batch_size": 4, "micro_batch_size": 2},
    }
