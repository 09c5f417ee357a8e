"""The link between two hosts goes down: for a moment, which the run survives, and for longer, which ends it on both."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import ROOT, settings
from tests.helpers.hosts import Host, two_hosts
from tests.helpers.tiny import TinyCheckpoint
from theworld_train.checkpoint_files import checkpoints, verify_checkpoint
from theworld_train.config import dump_config, parse_run_config
from theworld_train.train.metrics import read_metrics
from theworld_train.train.watchdog import STUCK

#: Seconds without a step after which the hosts give up, and those that the link is down for a moment.
TIMEOUT_S, MOMENT_S = 10, 3
#: Of the run; and the steps after which the link goes down for a moment, and for good.
STEPS, MOMENT_AT, END_AT = 100, 5, 45
#: Seconds after which what should have happened counts as never doing so.
PATIENCE_S = 150

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture
def hosts() -> Generator[list[Host]]:
    with two_hosts() as hosts:
        yield hosts


def write_config(path: Path, tiny: TinyCheckpoint) -> Path:
    values = settings(tiny, path.with_suffix(""), STEPS) | {"name": path.stem, "resume": "latest"}
    values["data"]["train"] |= {"frames": 1, "canvas": 32}
    values |= {"checkpoint": {"every_steps": 20}, "runtime": {"timeout_s": TIMEOUT_S}}
    path.write_text(dump_config(parse_run_config(values)))
    return path


def start(path: Path, topology: list[str], host: Host | None = None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "theworld_train", "launch", str(path), *topology]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    with path.with_suffix(f".{host.name if host else 'one'}.log").open("ab") as log:
        return subprocess.Popen(host.inside(*command) if host else command, env=environment, stdout=log, stderr=log)


def start_on(hosts: list[Host], path: Path) -> list[subprocess.Popen[bytes]]:
    meeting = ["--nproc", "1", "--nnodes", "2", "--rdzv-endpoint", f"{hosts[0].address}:29500"]
    return [start(path, [*meeting, "--node-rank", str(number)], host) for number, host in enumerate(hosts)]


def wait_for(path: Path, steps: int, launched: list[subprocess.Popen[bytes]]) -> None:
    """Waits until a run has taken so many steps."""
    metrics, deadline = path.with_suffix("") / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= steps):
        assert [process.poll() for process in launched] == [None, None]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def timeless(path: Path) -> list[dict[str, Any]]:
    rows = read_metrics(path.with_suffix("") / "metrics.jsonl", "train")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def test_run_survives_a_moment_and_is_restarted_after_longer(hosts: list[Host], tiny: TinyCheckpoint, tmp_path: Path):
    path, twin = (write_config(tmp_path / f"{name}.yaml", tiny) for name in ("run", "twin"))
    launched = start_on(hosts, path)
    try:
        wait_for(path, MOMENT_AT, launched)
        hosts[1].link(hosts[1].device, "down")
        time.sleep(MOMENT_S)
        hosts[1].link(hosts[1].device, "up")
        wait_for(path, END_AT, launched)
        hosts[1].link(hosts[1].device, "down")
        assert [process.wait(PATIENCE_S) for process in launched] == [STUCK, STUCK]
        assert list((tmp_path / "run").glob("stuck-step-*.txt"))
        assert not (tmp_path / "run" / "result.json").exists()
        newest = checkpoints(tmp_path / "run")[-1]
        verify_checkpoint(newest)
        hosts[1].link(hosts[1].device, "up")
        launched = [*start_on(hosts, path), start(twin, ["--nproc", "2"])]
        assert [process.wait(PATIENCE_S) for process in launched] == [0, 0, 0]
    finally:
        for process in launched:
            process.kill()
            process.wait()
    assert timeless(path) == timeless(twin)
    assert len(timeless(path)) == STEPS
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-80", "step-100"]
