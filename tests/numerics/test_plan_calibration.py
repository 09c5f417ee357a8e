"""A run is held against its plan, and the plan takes over what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from theworld_train.accounting.gpus import gpu_spec
from theworld_train.cli.app import app
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.plan.advice import Planner
from theworld_train.plan.calibration import calibrate_by, read_run
from theworld_train.plan.timing import plan_time

GPU = gpu_spec("l4")


@pytest.fixture
def run(shipped: Callable[..., RunConfig], finish: Callable[[RunConfig], Any], tmp_path: Path) -> Path:
    """The directory of a run of four steps."""
    return finish(shipped("projection", tmp_path / "run", training__max_steps=4)).directory


def test_calibrated_plan_expects_what_was_measured(run: Path):
    measured = read_run(run)
    assert len(measured.steps) == 3
    assert (measured.ranks, measured.device) == (1, "cpu")
    found = calibrate_by(measured, GPU, positions=128, supervised=2)
    planner = Planner(measured.config, 128, 2)
    setting = planner.setting("ddp", 1)
    again = plan_time(measured.config, planner.run(setting), setting, GPU, found.shares).step.seconds
    assert again.expected == pytest.approx(statistics.median(measured.steps), rel=1e-3)
    assert again.expected != pytest.approx(found.planned_seconds, rel=0.1)
    assert found.planned_peak > 0


def test_command_shows_both_and_plans_by_what_was_measured(run: Path):
    arguments = ["plan", str(run / "config.yaml"), "--gpu", "l4", "--positions", "128", "--supervised", "2"]
    result = CliRunner().invoke(app, [*arguments, "--calibrate", str(run)])
    assert result.exit_code == 0, result.output
    step = statistics.median(read_run(run).steps)
    assert f"measured on 1 x cpu: a step of {step:.3f} s" in result.output


def test_what_is_no_finished_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no finished run"):
        read_run(tmp_path)
