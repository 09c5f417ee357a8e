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

from tests.helpers.tiny import TinyCheckpoint, write_run
from theworld_train.checkpoint_files import checkpoint_step, checkpoints
from theworld_train.launch import LAUNCHER_PID, as_rank
from theworld_train.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
#: Seconds within which all ranks have to be gone without a save.
LIMIT_S = 10
#: Seconds within which ranks have to be gone that lose another one; torchrun would kill them after 30.
NOTICED_S = 20
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
    path = write_run(tiny, tmp_path, steps=1_000_000, batch=2, workers=1)
    command = [sys.executable, "-m", "theworld_train", "launch", str(path), "--nproc", "2"]
    with (tmp_path / "log").open("wb") as log:
        launcher = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
    processes: list[int] = []
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        until(lambda: launcher.poll() is not None or (metrics.is_file() and read_metrics(metrics, "train")))
        assert launcher.poll() is None, (tmp_path / "log").read_text()[-4000:]
        processes = descendants(launcher.pid)
        assert len(processes) == 4, "two ranks with a data worker each"
        yield launcher, processes
    finally:
        for process in (launcher.pid, *processes):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        launcher.wait()


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def descendants(process: int) -> list[int]:
    """Returns the children of a process, theirs, and so on."""
    return [found for child in children(process) for found in (child, *descendants(child))]


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


@pytest.mark.distributed
def test_others_end_when_one_rank_is_killed(launched: tuple[subprocess.Popen[bytes], list[int]]):
    launcher, processes = launched
    rank = next(own for own in processes if own in children(launcher.pid))
    os.kill(rank, signal.SIGKILL)
    until(lambda: not any(map(is_alive, processes)), NOTICED_S)
    assert launcher.wait(LIMIT_S) in (1, 128 + signal.SIGKILL), "of the rank whose end was seen first"


# -- a pipeline -------------------------------------------------------------------------------------------------------


STAGE = """
import signal, sys, time
from pathlib import Path
def stop(number, _):
    Path(sys.argv[2]).write_text(str(number))
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
Path(sys.argv[1]).touch()
time.sleep(120)
"""
PIPELINE = """
import sys
from theworld_train.pipeline.process import Processes
processes = Processes()
with processes.listening():
    code = processes.call([sys.executable, *sys.argv[1:]])
    # Told to stop, it starts nothing any more.
    again = processes.call([sys.executable, *sys.argv[1:]])
sys.exit(code if again == 128 + processes.stopped_by else 99)
"""


@pytest.mark.parametrize(
    ("sent", "received", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, 75),
        (signal.SIGUSR1, signal.SIGUSR1, 75),
        (signal.SIGKILL, signal.SIGTERM, -signal.SIGKILL),
    ],
)
def test_stage_stops_with_its_pipeline(sent: signal.Signals, received: signal.Signals, code: int, tmp_path: Path):
    ready, told = tmp_path / "ready", tmp_path / "told"
    command = [sys.executable, "-c", PIPELINE, "-c", STAGE, str(ready), str(told)]
    pipeline = subprocess.Popen(command, env=ENVIRONMENT)
    until(ready.exists)
    (stage,) = children(pipeline.pid)
    pipeline.send_signal(sent)
    assert pipeline.wait(PATIENCE_S) == code
    until(lambda: not is_alive(stage))
    assert told.read_text() == str(int(received))


@pytest.mark.distributed
@pytest.mark.slow
def test_pipeline_that_is_stopped_saves_its_stage_and_goes_on(tiny: TinyCheckpoint, tmp_path: Path):
    """First it is killed, so that the stage has to see that for itself, then it is told to stop, and then it ends."""
    steps = 150
    stages = [{"config": str(write_run(tiny, tmp_path, steps=steps, batch=2, workers=1))}]
    (tmp_path / "pipeline.yaml").write_text(json.dumps({"name": "test", "output_dir": "runs", "stages": stages}))
    metrics = tmp_path / "runs/run/metrics.jsonl"
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (None, 0)):
        assert run_pipeline(tmp_path, metrics, sent) == code, (tmp_path / "log").read_text()[-4000:]
        newest = checkpoints(metrics.parent)[-1]
        assert last_step(metrics) == checkpoint_step(newest), "no step was taken after the save"
    assert [row["step"] for row in read_metrics(metrics, "train")] == list(range(1, steps + 1))


def run_pipeline(directory: Path, metrics: Path, sent: signal.Signals | None) -> int:
    """Runs a pipeline, sends it a signal after a new step if it is to get one, and returns its exit code."""
    done = last_step(metrics)
    command = [sys.executable, "-m", "theworld_train", "run", "pipeline.yaml"]
    with (directory / "log").open("wb") as log:
        pipeline = subprocess.Popen(command, cwd=directory, env=ENVIRONMENT, stdout=log, stderr=log)
    until(lambda: pipeline.poll() is not None or last_step(metrics) > done)
    assert pipeline.poll() is None, (directory / "log").read_text()[-4000:]
    stage = descendants(pipeline.pid)
    assert len(stage) == 2, "a stage and its data worker"
    if sent is not None:
        pipeline.send_signal(sent)
    code = pipeline.wait(PATIENCE_S)
    until(lambda: not any(map(is_alive, stage)), LIMIT_S)
    return code


def last_step(metrics: Path) -> int:
    """Returns the last step that a run has written down in whole."""
    text = metrics.read_text() if metrics.is_file() else ""
    steps = [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return max(steps, default=0)


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
