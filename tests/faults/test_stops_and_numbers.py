"""Signals, and numbers that go wrong: all ranks do the same, and nothing of the run is lost or spoilt."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.conftest import Case, Launch

pytestmark = pytest.mark.distributed

TRAINING = {"global_batch_size": 4, "micro_batch_size": 2}
EVERY = {"every_steps": 1, "keep_last": 20}
BACKGROUND = EVERY | {"background": True}
#: To the last rank alone: the others learn of it in the exchange that begins a step.
TWICE = {"rank": -1, "signals": ["SIGTERM", "SIGTERM", "SIGUSR1"]}
AGAIN: dict[str, Any] = {"resume": "latest"}

CASES = [
    Case("straight", "straight", {"checkpoint": EVERY}),
    Case("stopped", "stopped", {}, {"signal": TWICE | {"steps": [4]}}),
    Case("stopped-resumed", "stopped", AGAIN),
    Case("early", "early", {}, {"signal": TWICE | {"steps": [1]}}),
    Case("early-resumed", "early", AGAIN),
    Case("saving", "saving", {"checkpoint": {"every_steps": 2}}, {"signal": TWICE | {"rank": 0, "saves": [2]}}),
    Case(
        "nan",
        "nan",
        {"training": TRAINING | {"max_steps": 6}, "checkpoint": EVERY},
        {"loss": {"rank": -1, "steps": [1, 3, 4], "factor": "nan"}},
    ),
    Case(
        "always-nan",
        "always-nan",
        {"checkpoint": EVERY},
        {"loss": {"rank": -1, "steps": [2, 3, 4, 5], "factor": "inf"}},
    ),
    Case(
        "spike",
        "spike",
        {"training": TRAINING | {"max_steps": 11}},
        {"loss": {"rank": -1, "steps": [10], "factor": "100"}},
    ),
    Case("background", "background", {"checkpoint": BACKGROUND}, {"overtaken": [1, 2, 3, 4, 5]}),
    Case(
        "background-stopped",
        "background-stopped",
        {"checkpoint": BACKGROUND | {"every_steps": 3}},
        {"signal": TWICE | {"steps": [4]}},
    ),
    Case("background-resumed", "background-stopped", AGAIN | {"checkpoint": BACKGROUND}),
    Case("last", "last", {}),
]
#: Ranks that share what they hold have to agree on what they skip.
STRATEGIES = ("zero1", "zero2", "zero3", "fsdp2")
SHARED = [
    Case(
        f"nan-{strategy}",
        f"nan-{strategy}",
        {"training": TRAINING | {"max_steps": 6}, "checkpoint": EVERY, "runtime": {"strategy": strategy}},
        {"loss": {"rank": -1, "steps": [1, 3, 4], "factor": "nan"}},
    )
    for strategy in STRATEGIES
]


@pytest.fixture(scope="module", params=[1, 2])
def told(
    request: pytest.FixtureRequest, launch: Callable[..., Launch], tmp_path_factory: pytest.TempPathFactory
) -> Launch:
    cases = CASES if request.param == 1 else CASES[:-1] + SHARED + CASES[-1:]
    return launch(tmp_path_factory.mktemp(f"ranks-{request.param}"), request.param, cases)


def test_sound_runs_before_and_after_end_well(told: Launch):
    for case in ("straight", "stopped-resumed", "early-resumed", "last"):
        assert {tuple(ended) for ended in told.ended(case)} == {("", "")}
    assert not any(row["train/skipped"] or "suspects" in row for row in told.rows("straight"))


def test_signal_to_one_rank_saves_and_stops_all(told: Launch):
    assert {tuple(ended) for ended in told.ended("stopped")} == {("StoppedError", "stopped by a signal after step 3")}
    assert told.ids("stopped") == {step: told.ids("straight")[step] for step in (1, 2, 3)}


def test_stopped_run_goes_on_bit_for_bit(told: Launch):
    assert told.steps("stopped") == ["step-3", "step-6"]
    assert list(told.ids("stopped-resumed")) == [4, 5, 6]
    assert told.tensors("stopped", 3) == told.tensors("straight", 3)
    assert told.tensors("stopped", 6) == told.tensors("straight", 6)
    assert told.rows("stopped") == told.rows("straight")


def test_checkpoint_is_of_its_step_though_training_goes_on(told: Launch):
    assert {tuple(ended) for ended in told.ended("background")} == {("", "")}
    for step in range(1, 7):
        assert told.tensors("background", step) == told.tensors("straight", step), step
    assert told.rows("background") == told.rows("straight")


def test_stop_waits_for_the_checkpoint_that_is_being_written(told: Launch):
    (ended,) = {tuple(ended) for ended in told.ended("background-stopped")}
    assert ended == ("StoppedError", "stopped by a signal after step 3")
    assert told.tensors("background-stopped", 3) == told.tensors("straight", 3)
    assert told.tensors("background-stopped", 6) == told.tensors("straight", 6), "of the run that came after it"


def test_signal_before_the_first_step_leaves_no_checkpoint(told: Launch):
    assert {tuple(ended) for ended in told.ended("early")} == {("StoppedError", "stopped by a signal after step 0")}
    assert told.steps("early") == ["step-6"], "written by the run that came after it"
    assert told.tensors("early", 6) == told.tensors("straight", 6)


def test_signal_during_a_save_leaves_that_checkpoint(told: Launch):
    assert {tuple(ended) for ended in told.ended("saving")} == {("StoppedError", "stopped by a signal after step 2")}
    assert told.steps("saving") == ["step-2"]


@pytest.mark.parametrize("case", ["nan", *(case.name for case in SHARED)])
def test_step_without_a_finite_gradient_is_skipped_by_all_ranks(case: str, told: Launch):
    if len(told.reports) == 1 and case != "nan":
        pytest.skip("a single process holds everything, whatever the strategy")
    assert {tuple(ended) for ended in told.ended(case)} == {("", "")}
    rows = told.rows(case)
    assert [row["train/skipped"] for row in rows] == [1, 0, 1, 1, 0, 0]
    assert [math.isfinite(row["train/grad_norm"]) for row in rows] == [False, True, False, False, True, True]
    assert math.isnan(rows[2]["train/loss"]), "the raw value is there"
    assert sorted(rows[2]["suspects"]) == sorted(told.ids(case)[3])
    held = [told.tensors(case, step) for step in range(1, 7)]
    for step, name in ((3, "world_projector.safetensors"), (4, "optimizer.safetensors")):
        assert held[step - 1][name] == held[step - 2][name]
    assert held[4]["world_projector.safetensors"] != held[3]["world_projector.safetensors"]


def test_gradients_that_stay_wrong_end_the_run(told: Launch):
    for kind, text in told.ended("always-nan"):
        assert kind == "ConfigError"
        assert "3 steps in a row had a gradient that is not finite, the last one step 4 with the samples" in text
        assert all(name in text for name in told.ids("always-nan")[4])
    assert told.steps("always-nan") == ["step-1", "step-2", "step-3"]


def test_loss_that_stands_out_is_flagged_in_its_step(told: Launch):
    flagged = {row["step"]: row["suspects"] for row in told.rows("spike") if "suspects" in row}
    assert list(flagged) == [10]
    assert sorted(flagged[10]) == sorted(told.ids("spike")[10])
    assert told.rows("spike")[9]["train/skipped"] == 0
