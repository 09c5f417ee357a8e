"""Two machines train like one: two network namespaces with a cable between them and `accelerate launch` on each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.helpers.hosts import Host, two_hosts
from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config import dump_config, parse_run_config
from theworld_train.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 6
FILE = str(ROOT / "launch/accelerate/ddp-multi-node.yaml")


@pytest.fixture
def hosts() -> Generator[list[Host]]:
    with two_hosts() as hosts:
        yield hosts


def write_config(path: Path, tiny: TinyCheckpoint) -> None:
    values = {
        "name": path.stem,
        "output_dir": str(path.with_suffix("")),
        "precision": "fp32",
        "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": 32}},
        "trainable": {"world_projector": {}, "multi_modal_projector": {}},
        "data": {
            "train": {"source": "moving_digits", "split": "train", "samples": 32, "frames": 1, "canvas": 32},
            "num_workers": 0,
        },
        "optimizer": {"lr": 1e-3},
        "training": {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
    }
    path.write_text(dump_config(parse_run_config(values)))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_hosts_train_like_one(hosts: list[Host], tiny: TinyCheckpoint, tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    for path in (one, two):
        write_config(path, tiny)
    commands = [[sys.executable, "-m", "theworld_train", "launch", str(one), "--nproc", "2"]]
    for rank, host in enumerate(hosts):
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", FILE]
        topology = ["--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", hosts[0].address]
        commands.append(host.inside(*launch, *topology, "--module", "theworld_train", "train", str(two)))
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for command in commands
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()[-4000:]
    finally:
        for process in started:
            process.kill()
    expected, actual = (read_metrics(path.with_suffix("") / "metrics.jsonl", "train") for path in (one, two))
    assert len(expected) == STEPS
    # The same ranks do the same sums over another wire.
    for key in ("loss_hex", "train/grad_norm", "train/supervised_tokens"):
        assert [row[key] for row in actual] == [row[key] for row in expected]
