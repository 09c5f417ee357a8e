"""The metrics file holds each step once, whatever ended the run before."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from theworld_train.train.metrics import (
    Forecast,
    MetricsFile,
    ProgressDisplay,
    Resources,
    missing_trackers,
    read_metrics,
    resources_line,
    resources_row,
)


def write(path: Path, first_step: int, steps: range) -> None:
    metrics = MetricsFile(path, first_step)
    for step in steps:
        metrics.write("train", step, {"loss": float(step)})
    metrics.close()


def steps(path: Path, event: str = "train") -> list[int]:
    return [row["step"] for row in read_metrics(path, event)]


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path: Path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write("train", 1, {"loss": 2.5})
    metrics.write("eval", 1, {"accuracy": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl", "train") == [{"event": "train", "step": 1, "loss": 2.5}]
    assert steps(tmp_path / "metrics.jsonl", "eval") == [1]
    metrics.close()


def test_steps_that_are_taken_again_are_removed_first(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 9))
    write(path, 5, range(6, 11))
    assert steps(path) == list(range(1, 11))


def test_a_torn_last_line_is_removed(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 4))
    for torn in ('{"event": "train", "step": 4, "lo', '{"event": "train"', "\0\0\0"):
        with path.open("a") as file:
            file.write(torn)
        write(path, 3, range(0))
        assert steps(path) == [1, 2, 3]
    write(path, 3, range(4, 6))
    assert steps(path) == [1, 2, 3, 4, 5]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_run_from_the_start_leaves_nothing_of_the_one_before(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 4))
    write(path, 0, range(1, 2))
    assert steps(path) == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_progress_is_plain_lines_without_a_terminal():
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, width=200), "stage", first_step=4, max_steps=40)
    for step in range(5, 41):
        display.update(step, loss=1.25, rate=1e-3, tokens_per_s=1234.5)
    display.say("held out: [100%]")
    display.close()
    first, last, said = out.getvalue().splitlines()
    assert "step 5/40" in first
    assert "loss 1.2500" in first
    assert "1.00e-03" in first
    assert "step 40/40" in last
    assert "0 s left" in last
    assert said == "held out: [100%]"


def test_progress_is_a_bar_on_a_terminal():
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, width=200, force_terminal=True), "stage", first_step=0, max_steps=2)
    display.update(1, loss=1.25, rate=1e-3, tokens_per_s=1234.5)
    display.close()
    assert "1/2" in out.getvalue()


def test_tracker_whose_package_is_missing_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("theworld_train.train.metrics.find_spec", lambda name: None if name == "wandb" else object())
    (problem,) = missing_trackers(("tensorboard", "wandb"))
    assert (problem.key, problem.value) == ("tracking.trackers", "wandb")
    assert problem.hint == "pip install 'theworld-train[wandb]'"


def test_waiting_for_data_is_told_beside_the_step():
    taken = Resources(2**30, step_s=0.5, ranks=1, device="gpu", positions=8, supervised=1, data_wait=0.0123)
    assert resources_line(taken, Forecast(2**30, None)).endswith("; step 0.50 s; 1.2% of the time waiting for data")
    assert resources_row(taken, None)["time/data_wait_share"] == 0.0123
