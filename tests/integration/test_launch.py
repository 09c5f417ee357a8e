"""`accelerate launch` with the files that ship runs the trainer's own engines, and a file that contradicts stops it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny import TinyCheckpoint, write_run
from theworld_train.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 2


@pytest.fixture
def config(tiny: TinyCheckpoint, tmp_path: Path) -> Path:
    """The config of a short run under FSDP2."""
    return write_run(tiny, tmp_path, steps=STEPS, batch=4, runtime={"strategy": "fsdp2"})


def accelerate(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(ROOT / "launch/accelerate/fsdp2.yaml"), "--num_processes", "2"]
    command += ["--main_process_port", "0", "--module", "theworld_train", "train", str(config), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        command, env=environment, cwd=config.parent, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.distributed
@pytest.mark.slow
def test_file_of_the_same_strategy_trains(config: Path):
    result = accelerate(config)
    assert result.returncode == 0, result.stderr[-4000:]
    steps = read_metrics(config.parent / "run/metrics.jsonl", "train")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert "2 rank(s)" in result.stdout


@pytest.mark.distributed
def test_file_of_another_strategy_is_refused_before_anything_is_read(config: Path):
    result = accelerate(config, "runtime.strategy=ddp")
    assert result.returncode != 0
    assert "FSDP_VERSION: '2' contradicts runtime.strategy: 'ddp' of the run config" in result.stderr
    assert len(re.findall("contradicts", result.stderr)) == 1, "one rank of a machine reports"
    assert not (config.parent / "run").exists()
