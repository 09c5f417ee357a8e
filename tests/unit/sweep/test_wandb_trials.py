"""Protects sweeps that wandb searches: its own code fills our command, and a trial freezes what it gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.sweep.conftest import Check
from theworld_train.config import ConfigError, load_run_config
from theworld_train.sweep.target import target_in
from theworld_train.sweep.wandb_trials import definition, prepare_trial

SPACE: dict[str, Any] = {
    "optimizer.lr": {"min": 1e-4, "max": 1e-2, "log": True},
    "optimizer.eps": {"min": 0.1, "max": 0.5, "step": 0.1},
    "schedule.warmup_steps": {"min": 5, "max": 40, "step": 10},  # a multiple of 10 is none of its values
    "seed": {"min": 0, "max": 9},
    "training.gradient_clip_norm": {"min": 0.5, "max": 2},
    "optimizer.betas": {"values": [[0.9, 0.95], [0.9, 0.999]]},
}
GIVEN: dict[str, Any] = {
    "optimizer.lr": 0.003,
    "optimizer.eps": 0.2,
    "schedule.warmup_steps": 25.0,  # as wandb gives a whole number of some ranges
    "seed": 4,
    "training.gradient_clip_norm": 1.5,
    "optimizer.betas": [0.9, 0.999],
}


def test_the_definition_states_the_search(check: Check):
    found, _ = check(space=SPACE, search="tpe", trials=20, pruner="hyperband", direction="maximize")
    sweep = yaml.safe_load(definition(found, "sweep.yaml"))
    assert sweep["method"] == "bayes"
    assert sweep["metric"] == {"name": "eval/loss", "goal": "maximize"}
    assert sweep["run_cap"] == 20
    assert sweep["early_terminate"] == {"type": "hyperband", "min_iter": 1}
    assert sweep["parameters"] == {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "optimizer.eps": {"values": [0.1, 0.2, 0.3, 0.4, 0.5]},
        "schedule.warmup_steps": {"values": [5, 15, 25, 35]},
        "seed": {"distribution": "int_uniform", "min": 0, "max": 9},
        "training.gradient_clip_norm": {"distribution": "uniform", "min": 0.5, "max": 2.0},
        "optimizer.betas": {"values": [[0.9, 0.95], [0.9, 0.999]]},
    }


def test_wandbs_agent_fills_the_command(check: Check):
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    found, _ = check(space=SPACE, search="random", trials=2)
    sweep = yaml.safe_load(definition(found, "sweep.yaml"))
    macros = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in GIVEN.items()}})
    macros["program"] = [sweep["program"]]
    command = [
        word
        for part in utils.create_sweep_command(sweep["command"])
        for word in (macros[part[2:-1]] if part.startswith("${") else [part])
    ]
    assert command[:-1] == ["theworld-train", "sweep", "trial", "sweep.yaml", "--values"]
    assert json.loads(command[-1]) == GIVEN


def test_a_trial_is_frozen_with_the_values_that_it_is_given(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    found, base = check(space=SPACE, search="random", trials=2)
    base.write(tmp_path / "base")
    path = prepare_trial(replace(found, target=target_in(tmp_path / "base", "run")), json.dumps(GIVEN))
    assert path == tmp_path / "sweep" / "wandb-trials" / "abc123" / "config.yaml"
    config = load_run_config(path)
    assert config.optimizer.lr == 0.003
    assert config.schedule.warmup_steps == 25
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.name == "scripted-abc123"
    assert (config.tracking.trackers, config.tracking.wandb_mode) == (("wandb",), "online")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr=3", "--values: expected a JSON object of dotted keys"),
        (json.dumps({**GIVEN, "optimizer.lrr": 1}), "optimizer.lrr: is not varied by the sweep"),
        (json.dumps({"optimizer.lr": 0.1}), "seed: has no value"),
        (json.dumps({**GIVEN, "seed": 1.5}), "seed: expected a whole number"),
    ],
)
def test_wrong_values_are_refused(check: Check, tmp_path: Path, text: str, said: str):
    found, base = check(space=SPACE, search="random", trials=2)
    base.write(tmp_path / "base")
    with pytest.raises(ConfigError) as error:
        prepare_trial(replace(found, target=target_in(tmp_path / "base", "run")), text)
    assert said in str(error.value)
    assert not (found.directory / "wandb-trials").exists()
