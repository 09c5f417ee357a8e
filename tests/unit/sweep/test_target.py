"""Protects what a trial makes of a stage or pipeline: the values land where their keys say, and all is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.sweep.conftest import Check
from theworld_train.config import ConfigError, load_pipeline_config, load_run_config, load_stage_configs
from theworld_train.sweep.target import target_in


def test_a_run_states_everything(check: Check, tmp_path: Path):
    found, base = check(overrides={"training.max_steps": 3})
    base.write(tmp_path / "base")
    target = target_in(tmp_path / "base", "run")
    trial = target.resolve({"optimizer.lr": 0.5}, "t-1", "runs/t-1", "trial 1")
    trial.write(tmp_path / "trial")
    config = load_run_config(tmp_path / "trial" / "config.yaml")
    assert (config.optimizer.lr, config.training.max_steps) == (0.5, 3)
    assert (config.name, config.output_dir, config.resume) == ("t-1", "runs/t-1", "latest")
    assert "extends" not in (tmp_path / "trial" / "config.yaml").read_text()
    assert found.run.training.max_steps == 3


def test_a_pipelines_keys_go_to_their_stages(check: Check, chain: dict[str, Any], tmp_path: Path):
    space = {"stages.two.optimizer.lr": {"values": [0.5]}}
    _, base = check(**chain, space=space, overrides={"stages.one.seed": 1})
    base.write(tmp_path / "base")
    target = target_in(tmp_path / "base", "pipeline")
    assert target.stages == ("one", "two")
    trial = target.resolve({"stages.two.optimizer.lr": 0.5}, "t-1", "runs/t-1", "trial 1")
    trial.write(tmp_path / "trial")
    # The files are whole: what they were made from may go.
    for path in (tmp_path / "chain.yaml", tmp_path / "stage.yaml", *(tmp_path / "base").rglob("*.yaml")):
        path.unlink()
    pipeline = load_pipeline_config(tmp_path / "trial" / "config.yaml")
    one, two = load_stage_configs(pipeline)
    assert pipeline.output_dir == "runs/t-1"
    assert (one.name, one.seed, two.name, two.seed) == ("one", 1, "two", 7)
    assert two.optimizer.lr == 0.5 != one.optimizer.lr


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("stages.tow.optimizer.lr", "names no stage of the pipeline; did you mean 'two'?"),
        ("stages.two.optimizer.lrr", "unknown key; did you mean 'stages.two.optimizer.lr'?"),
        ("stages.two.init_from", "has a value of its own in every trial"),
        ("stages", "names no stage of the pipeline; known: one, two"),
        ("optimizer.lr", "unknown key"),
    ],
)
def test_wrong_keys_of_a_pipeline(check: Check, chain: dict[str, Any], key: str, said: str):
    with pytest.raises(ConfigError) as error:
        check(**chain, space={key: {"values": [1]}})
    assert said in str(error.value)
    with pytest.raises(ConfigError) as error:
        check(**chain, space={"stages.one.seed": {"values": [1]}}, overrides={key: 1})
    assert said in str(error.value)
    assert "sweep.yaml: overrides" in str(error.value)


def test_the_metric_is_read_from_a_stage_that_there_is(check: Check, chain: dict[str, Any]):
    space = {"stages.one.seed": {"values": [1]}}
    assert check(**chain, space=space)[0].run.name == "two"
    assert check(**chain, space=space, stage="one")[0].run.name == "one"
    with pytest.raises(ConfigError, match=r"stage: no such stage \(got 'oen'\); did you mean 'one'"):
        check(**chain, space=space, stage="oen")


def test_two_stages_of_one_name_are_refused(check: Check, chain: dict[str, Any], tmp_path: Path):
    pipeline = yaml.safe_load((tmp_path / "chain.yaml").read_text())
    pipeline["stages"][1]["overrides"]["name"] = "one"
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(pipeline))
    with pytest.raises(ConfigError, match="two stages have one name"):
        check(**chain, space={"stages.one.seed": {"values": [1]}})
