"""A sweep whose controllers are killed: it goes on, and no trial is lost, run twice or run by two at once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.scripted_trial import CRASHES, STEPS, WELL, value_at
from tests.helpers.sweeps import TOO_LARGE, controller_of, write_sweep
from theworld_train.sweep.controller import Worker

RATES = [0.1, 0.2, 0.3, 0.4, 0.5]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def twelve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid of twelve points; half of them crash, and those of one rate cannot fit."""
    monkeypatch.setenv("SCRIPTED_STEP_S", "0.1")
    monkeypatch.setenv("SCRIPTED_SAVE_S", "0.5")
    space = {
        "optimizer.lr": {"values": [*RATES, TOO_LARGE]},
        "schedule.warmup_steps": {"values": [WELL, CRASHES]},
    }
    return write_sweep(tmp_path, space=space, overrides={"seed": 3})


def start(path: Path, workers: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.helpers.sweeps", str(path), str(workers)], cwd=ROOT)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def steps_taken(directory: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in directory.glob("trials/*/run/metrics.jsonl"))


def check_all_twelve(directory: Path) -> None:
    """Makes sure that every point has its result, and that every step was taken once."""
    summary = json.loads((directory / "sweep.json").read_text())
    trials = summary["trials"]
    points = Counter(json.dumps(trial["values"], sort_keys=True) for trial in trials)
    assert len(trials) == len(points) == 12
    # A crash wins over nothing: what cannot fit is not launched, and neither point is tried again.
    assert Counter(trial["state"] for trial in trials) == {"complete": 5, "failed": 5, "does_not_fit": 2}
    for trial in trials:
        rate, script = trial["values"]["optimizer.lr"], trial["values"]["schedule.warmup_steps"]
        run = directory / trial["directory"] / "run"
        assert not (run / "run-twice").exists()
        if rate == TOO_LARGE:
            assert (trial["state"], trial["launches"]) == ("does_not_fit", 0)
            assert trial["reason"] == "it takes 90 GiB, and the GPU has 79"
            assert not run.exists()
        elif script == CRASHES:
            assert (trial["state"], trial["exit_code"]) == ("failed", 1)
            assert trial["reason"] == "exit code 1: RuntimeError: the point is bad"
            assert trial["log_tail"][-1] == "RuntimeError: the point is bad"
        else:
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
            assert trial["value"] == value_at(STEPS, rate, 3)
            assert (trial["state"], trial["exit_code"]) == ("complete", 0)
    best = trials[summary["best"]]
    assert best["values"] == {"optimizer.lr": 0.3, "schedule.warmup_steps": WELL}


def test_killed_controllers_lose_nothing_and_run_nothing_twice(twelve: Path):
    directory = twelve.parent / "sweep"
    draw = random.Random(os.getpid())
    process, least = start(twelve, workers=2), draw.randint(1, 5)
    wait_for(lambda: steps_taken(directory) >= least)
    process.kill()
    process.wait()
    # Two more, as the tasks of a job array; one of them is killed too, and the other ends the sweep alone.
    before = steps_taken(directory)
    one, other = start(twelve, workers=1), start(twelve, workers=1)
    wait_for(lambda: steps_taken(directory) > before or other.poll() is not None)
    one.kill()
    one.wait()
    assert other.wait(120) == 0
    check_all_twelve(directory)
    launches = Counter(trial["launches"] for trial in json.loads((directory / "sweep.json").read_text())["trials"])
    assert sum(count for number, count in launches.items() if number > 1) >= 1, "nothing was interrupted"
    # Run again, it has nothing to do.
    text = (directory / "sweep.json").read_text()
    assert controller_of(twelve, [Worker(None, 1)]).run() is None
    assert json.loads((directory / "sweep.json").read_text()) == json.loads(text)


def test_a_signal_has_trials_save_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCRIPTED_STEP_S", "0.3")
    path = write_sweep(tmp_path, space={"seed": {"values": [1, 2]}})
    directory = tmp_path / "sweep"
    process = start(path, workers=2)
    wait_for(lambda: len(list(directory.glob("trials/*/run/metrics.jsonl"))) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    trials = json.loads((directory / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in trials] == ["interrupted", "interrupted"]
    assert 2 <= steps_taken(directory) < 2 * STEPS
    controller_of(path, [Worker(None, 1)] * 2).run()
    trials = json.loads((directory / "sweep.json").read_text())["trials"]
    assert [(trial["state"], trial["launches"]) for trial in trials] == [("complete", 2)] * 2
    assert steps_taken(directory) == 2 * STEPS
