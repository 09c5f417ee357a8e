"""Protects the space of a sweep: its keys exist, its values fit them, and all of it is said before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.sweep.conftest import Check
from theworld_train.config import ConfigError
from theworld_train.sweep.space import Axis, grid_size


def refusal(check: Check, space: dict[str, Any], **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        check(space=space, **settings)
    return str(error.value)


def test_a_grid_lists_its_ranges(check: Check):
    found, _ = check(
        space={
            "optimizer.lr": {"min": 0.1, "max": 0.4, "step": 0.1},
            "schedule.warmup_steps": {"min": 0, "max": 5, "step": 2},
            "deterministic": {"values": [True, False]},
        }
    )
    assert [axis.choices for axis in found.axes] == [(0.1, 0.2, 0.3, 0.4), (0, 2, 4), (True, False)]
    assert grid_size(found.axes) == found.wanted == 24


def test_a_range_of_a_whole_key_draws_whole_numbers(check: Check):
    found, _ = check(space={"seed": {"min": 1, "max": 100, "log": True}}, search="random", trials=2)
    (axis,) = found.axes
    assert axis.whole
    assert axis.log
    assert isinstance(axis.value_of(3.0), int)


def test_values_of_any_kind_come_back_as_they_are():
    values = ("a", 1, True, 1.0, None, ["x"], {"kind": "y"})
    axis = Axis("key", values)
    back = [axis.value_of(label) for label in axis.labels]
    assert back == list(values)
    assert [type(value) for value in back] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"optimizer.lrr": {"values": [1]}}, "optimizer.lrr: unknown key; did you mean 'optimizer.lr'?"),
        ({"output_dir": {"values": ["a"]}}, "output_dir: has a value of its own in every trial"),
        ({"precision": {"min": 1, "max": 2, "step": 1}}, "precision: takes one of"),
        ({"seed": {"min": 0.5, "max": 2, "step": 1}}, "seed: takes whole numbers, and min is none"),
        ({"optimizer.lr": {"min": 0.1, "max": 9000, "step": 0.1}}, "a grid takes at most 1,000"),
        ({"optimizer.lr": {"values": [0.1, -1]}}, "optimizer.lr: expected a number"),
        ({"data.train": {"values": [{"source": "nowhere"}]}}, "data.train.source"),
    ],
)
def test_wrong_keys_and_values_are_named(check: Check, space: dict[str, Any], said: str):
    text = refusal(check, space)
    assert said in text
    assert text.startswith("sweep.yaml: space: ")


def test_every_wrong_key_is_said_at_once(check: Check):
    text = refusal(check, {"optimizer.lrr": {"values": [1]}, "trainable.lm_head.lr": {"values": [1]}})
    assert len(text.splitlines()) == 2


def test_values_that_only_go_wrong_together_are_found(check: Check):
    space = {"training.max_steps": {"values": [5, None]}, "training.epochs": {"values": [None, 1]}}
    assert "max_steps" in refusal(check, space)


def test_of_many_points_each_key_is_tried_alone(check: Check):
    space = {f"optimizer.{key}": {"values": [index / 100 for index in range(1, 18)]} for key in ("lr", "eps")}
    found, _ = check(space=space)
    assert found.wanted == 17**2
    space["optimizer.lr"]["values"][7] = -1
    assert "optimizer.lr" in refusal(check, space)


def test_a_metric_has_to_be_one_that_the_run_writes(check: Check):
    lr = {"optimizer.lr": {"values": [1]}}
    assert "metric: base writes no such metric (got 'eval/los'); did you mean 'eval/loss'?" in refusal(
        check, lr, metric="eval/los"
    )
    assert "it has no data.eval" in refusal(check, lr, overrides={"data.eval": None})
    assert check(space=lr, overrides={"data.eval": None}, metric="train/loss")


def test_a_metric_of_answers_needs_them_generated(check: Check, chain: dict[str, Any]):
    lr, longest = {"optimizer.lr": {"values": [1, 2]}}, {"evaluation.max_new_tokens": {"values": [2, 4]}}
    said = "metric: base never measures it, as it generates no answers (got 'eval/correct/digit')"
    assert said in refusal(check, lr, metric="eval/correct/digit")
    assert check(space=longest, metric="eval/correct/digit")
    assert check(space=lr, metric="eval/correct/digit", overrides={"evaluation.max_new_tokens": 4})
    of_stage = {"stages.one.evaluation.max_new_tokens": {"values": [2, 4]}}
    assert check(space=of_stage, metric="eval/exact", stage="one", **chain)
    assert "two never measures it" in refusal(check, of_stage, metric="eval/exact", stage="two", **chain)


def test_a_grid_has_no_more_trials_than_points(check: Check):
    assert "trials: the grid has 2 points (got 3)" in refusal(check, {"optimizer.lr": {"values": [1, 2]}}, trials=3)
    assert "launcher: no such program" in refusal(check, {"seed": {"values": [1]}}, launcher=["no-such-program"])
