"""Signals reach every rank, nothing outlives the launcher, and its exit code tells how a run has ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config import dump_config, parse_run_config
from theworld_train.launch import LAUNCHER_PID, as_rank

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
#: Seconds within which all ranks have to be gone without a save.
LIMIT_S = 10
#: Seconds after which a process that should have come or gone counts as never doing so.
PATIENCE_S = 120

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc, and the kernel to end orphans")


def until(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> float:
    """Waits for a condition and returns the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, f"still not so after {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - started


# -- exit codes, by ranks that do nothing else ------------------------------------------------------------------------

DRIVER = """
import json, sys
from theworld_train.launch import LaunchCommand, run
codes = {}
for case in sys.argv[2:]:
    arguments = ("--standalone", "--nproc-per-node=2", "--signals-to-handle=SIGTERM,SIGUSR1", "--monitor-interval=0.05",
                 "--module", "tests.faults.stub_rank", case, sys.argv[1])
    codes[case] = run(LaunchCommand(arguments, {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2"}, 2))
print(json.dumps(codes))
"""
CODES = {
    "finish": 0,
    "wrong": 2,
    "killed": 128 + signal.SIGKILL,
    "stop itself": 75,
    "save": 75,
    "one saves": 128 + signal.SIGUSR1,
    "too slow": 128 + signal.SIGUSR1,
}


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The launcher's exit code for each case; one process launches them all, as importing torch takes longest."""
    ready = str(tmp_path_factory.mktemp("ready"))
    command = [sys.executable, "-c", DRIVER, ready, *CODES]
    result = subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, int] = json.loads(result.stdout)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("case", CODES)
def test_exit_code_tells_how_the_run_has_ended(codes: dict[str, int], case: str):
    assert codes[case] == CODES[case]


# -- a real run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(tiny: TinyCheckpoint, tmp_path: Path) -> Generator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A launcher whose two ranks, and their data workers, are training; and the process ids of all of these."""
    config = parse_run_config(
        {
            "name": "endless",
            "output_dir": str(tmp_path / "run"),
            "precision": "fp32",
            "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": 32}},
            "trainable": {"world_projector": {}},
            "data": {
                "train": {"source": "moving_digits", "split": "train", "samples": 64, "frames": 1, "canvas": 32},
                "num_workers": 1,
            },
            "training": {"max_steps": 1_000_000, "global_batch_size": 2, "micro_batch_size": 1},
        }
    )
    path = tmp_path / "endless.yaml"
    path.write_text(dump_config(config))
    command = [sys.executable, "-m", "theworld_train", "launch", str(path), "--nproc", "2"]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
    processes: list[int] = []
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        until(lambda: launcher.poll() is not None or (metrics.is_file() and metrics.stat().st_size))
        assert launcher.poll() is None, (tmp_path / "log").read_text()[-4000:]
        processes = descendants(launcher.pid)
        assert len(processes) == 4, "two ranks with a data worker each"
        yield launcher, processes
    finally:
        for process in (launcher.pid, *processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.wait()


def descendants(process: int) -> list[int]:
    """Returns the children of a process, theirs, and so on."""
    children = (Path(f"/proc/{process}/task/{process}/children")).read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.distributed
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_behind(launched: tuple[subprocess.Popen[bytes], list[int]], sent: signal.Signals):
    launcher, processes = launched
    launcher.send_signal(sent)
    until(lambda: not any(map(is_alive, processes)), LIMIT_S)
    code = launcher.wait(LIMIT_S)
    # A run that is asked to stop saves first, and says so.
    assert code == (-sent if sent == signal.SIGKILL else 75)


# -- a rank without its launcher --------------------------------------------------------------------------------------


def test_rank_whose_launcher_is_gone_does_not_begin(monkeypatch: pytest.MonkeyPatch):
    code = "from theworld_train.launch import as_rank\nwith as_rank():\n    print('begun')"
    environment = {**ENVIRONMENT, LAUNCHER_PID: "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    assert "begun" not in result.stdout
    assert "the launcher, process 1, has ended" in result.stderr
    monkeypatch.delenv(LAUNCHER_PID, raising=False)
    with as_rank():
        pass  # no launcher, nothing to end with
