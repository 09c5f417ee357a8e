"""A run is held against its plan, and the plan takes over what was measured."""

from __future__ import annotations

import io
import json
import os
import signal
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from theworld_train.accounting.gpus import gpu_spec
from theworld_train.assemble.run import train
from theworld_train.cli.app import app
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.plan.advice import Planner
from theworld_train.plan.calibration import MeasuredRun, calibrate_by, predict, read_run
from theworld_train.plan.timing import plan_time
from theworld_train.train.metrics import Resources, read_metrics

GPU = gpu_spec("l4")


@pytest.fixture
def config(shipped: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    """A run of six steps."""
    return shipped("projection", tmp_path / "run", training__max_steps=6, checkpoint__every_steps=3)


@pytest.fixture
def run(config: RunConfig) -> Path:
    """The directory of a run that was held against its plan."""
    train(config, Console(file=io.StringIO()), predict)
    return Path(config.output_dir)


def on_gpu(run: Path, device: str = "NVIDIA L4") -> MeasuredRun:
    """Has a run be measured on a GPU, and returns it."""
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"cpu"', json.dumps(device)))
    return read_run(run)


def test_a_run_writes_what_it_took_beside_what_was_planned(config: RunConfig):
    shown = io.StringIO()
    result = train(config, Console(file=shown, width=200), predict)
    (row,) = read_metrics(Path(config.output_dir) / "metrics.jsonl", "resources")
    taken = result.resources
    assert taken is not None
    assert row["memory/peak_bytes"] == taken.peak_bytes
    assert row["memory/measured_over_planned"] == taken.peak_bytes / row["memory/planned_bytes"]
    planned = Planner(config, taken.positions, taken.supervised, "cpu")
    assert row["memory/planned_bytes"] == planned.need(planned.setting("ddp", 1)).peak.total
    rows = read_metrics(Path(config.output_dir) / "metrics.jsonl", "train")
    settled = [step["time/step_s"] - step["time/data_wait_s"] for step in rows[2:]]
    assert row["time/step_s"] == pytest.approx(statistics.median(settled))
    assert "time/planned_step_s/expected" not in row, "no time is planned for a CPU"
    assert f"projection: the process grew by {taken.peak_bytes / 2**30:.2f} GiB" in shown.getvalue()


def test_a_plan_that_fails_does_not_fail_the_run(config: RunConfig):
    def fail(*_: Any) -> Any:
        raise ValueError("no such thing")

    shown = io.StringIO()
    train(config, Console(file=shown, width=200), fail)
    assert (Path(config.output_dir) / "result.json").exists()
    assert "no plan to hold this run against: ValueError: no such thing" in shown.getvalue()
    (row,) = read_metrics(Path(config.output_dir) / "metrics.jsonl", "resources")
    assert "memory/planned_bytes" not in row


def test_a_signal_breaks_the_plan_off_and_not_the_run(config: RunConfig):
    def wait(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not heard")

    shown = io.StringIO()
    train(config, Console(file=shown, width=200), wait)
    assert "no plan to hold this run against: StoppedError" in shown.getvalue()
    (row,) = read_metrics(Path(config.output_dir) / "metrics.jsonl", "resources")
    assert "memory/planned_bytes" not in row
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_gpu_has_its_time_planned(config: RunConfig):
    taken = Resources(peak_bytes=1, step_s=1.0, ranks=1, device="NVIDIA L4", positions=128, supervised=2)
    seconds = predict(config, taken).step_s
    assert seconds is not None
    assert seconds.worst > seconds.best > 0
    assert predict(config, replace(taken, device="NVIDIA Abacus")).step_s is None


def test_calibrated_plan_expects_what_was_measured(run: Path):
    measured = on_gpu(run)
    assert len(measured.steps) == 4
    found = calibrate_by(measured, GPU)
    planner = Planner(measured.config, measured.taken.positions, measured.taken.supervised)
    setting = planner.setting("ddp", 1)
    again = plan_time(measured.config, planner.run(setting), setting, GPU, found.shares).step.seconds
    assert again.expected == pytest.approx(statistics.median(measured.steps), rel=1e-3)
    assert again.expected != pytest.approx(found.planned_seconds, rel=0.1)
    assert found.planned_peak > 0


def test_each_start_warms_up(run: Path):
    rows = (run / "metrics.jsonl").read_text().splitlines()
    started = json.dumps({"event": "start", "step": 3, "ranks": 1, "device": "cpu"})
    (run / "metrics.jsonl").write_text("\n".join([*rows[:4], started, *rows[4:]]))
    times = [row["time/step_s"] - row["time/data_wait_s"] for row in read_metrics(run / "metrics.jsonl", "train")]
    assert read_run(run).steps == (times[2], times[5])
    elsewhere = json.dumps({"event": "start", "step": 0, "ranks": 8, "device": "cpu"})
    (run / "metrics.jsonl").write_text("\n".join([elsewhere, *rows[1:4], started, *rows[4:]]))
    assert read_run(run).steps == (times[5],), "steps on other ranks say nothing of these"


def test_command_shows_both_and_plans_by_what_was_measured(run: Path):
    step = statistics.median(on_gpu(run).steps)
    result = CliRunner().invoke(app, ["plan", str(run / "config.yaml"), "--gpu", "l4", "--calibrate", str(run)])
    assert result.exit_code == 0, result.output
    assert f"measured on 1 x NVIDIA L4: a step of {step:.3f} s" in result.output


def test_a_run_on_something_else_is_refused(run: Path):
    with pytest.raises(ConfigError, match="was measured on cpu, which says nothing of a plan for L4"):
        calibrate_by(read_run(run), GPU)
    with pytest.raises(ConfigError, match=r"on NVIDIA H200, .* for L4.*--gpu h200-141gb"):
        calibrate_by(on_gpu(run, "NVIDIA H200"), GPU)


def test_what_is_no_finished_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no finished run"):
        read_run(tmp_path)
