"""Protects the settings of sweeps: what is contradictory is refused in plain words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from theworld_train.config import ConfigError, config_kind, load_sweep_config
from theworld_train.sweep.opening import checked

ROOT = Path(__file__).parents[3]

GOOD: dict[str, Any] = {
    "name": "good",
    "output_dir": "runs/sweep",
    "config": "base.yaml",
    "space": {"optimizer.lr": {"min": 1e-4, "max": 1e-2, "log": True}},
    "search": "random",
    "trials": 3,
    "metric": "eval/loss",
    "direction": "minimize",
}
RANGE = {"min": 0.1, "max": 0.5}


def loaded(write: Callable[..., str], **changes: Any):
    return load_sweep_config(write(yaml.safe_dump({**GOOD, **changes}), "sweep.yaml", extends=None))


def test_what_is_varied_is_found_beside_the_file(write: Callable[..., str], folder: Path):
    sweep = loaded(write)
    assert sweep.config == str(folder / "base.yaml")
    assert sweep.kind == "run"
    assert config_kind("sweep.yaml") == "sweep"
    assert loaded(write, config=None, pipeline="chain.yaml").kind == "pipeline"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": None}, "exactly one of config and pipeline"),
        ({"pipeline": "chain.yaml"}, "exactly one of config and pipeline"),
        ({"stage": "full"}, "stage names a stage of a pipeline"),
        ({"config": None, "pipeline": "chain.yaml", "launcher": ["srun"]}, "a pipeline launches its stages itself"),
        ({"gpu": "h100-80gb", "memory_gib": 80}, "set gpu or memory_gib"),
        ({"storage": "postgresql://me:hunter2@host/studies"}, "storage: this looks like a secret"),
        ({"trials": None}, "search: random needs trials"),
        ({"warmup_steps": 3}, "warmup_steps is for pruner: median"),
        ({"overrides": {"optimizer.lr": 1}}, "optimizer.lr is varied in space and held by overrides"),
        ({"search": "grid"}, "a grid needs values, or a step: optimizer.lr has neither"),
        ({"space": {}}, "space"),
        ({"search": "bayes"}, "grid, random, tpe"),
        ({"space": {"optimizer.lr": {}}}, "expected values: [...], or min and max"),
        ({"space": {"optimizer.lr": {"values": [1, 1]}}}, "stated twice"),
        ({"space": {"optimizer.lr": {"values": [1], "min": 0}}}, "values are a list already"),
        ({"space": {"optimizer.lr": {"min": 2, "max": 1}}}, "min 2 is above max 1"),
        ({"space": {"optimizer.lr": {"min": 0, "max": 1, "log": True}}}, "log needs min > 0"),
        ({"space": {"optimizer.lr": {**RANGE, "log": True, "step": 0.1}}}, "not both"),
        ({"space": {"optimizer.lr": {"min": 0, "max": float("inf")}}}, "finite"),
        ({"workers": {"count": 2, "gpus": [[0]]}}, "2 workers, but 1 sets"),
        ({"workers": {"count": 2, "gpus": [[0, 1], [1, 2]]}}, "one GPU to several workers"),
        ({"workers": {"gpus": [[0]], "processes": 2}}, "leave processes out"),
    ],
)
def test_contradictions_are_refused(write: Callable[..., str], changes: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as error:
        loaded(write, **changes)
    assert said in str(error.value)
    assert "sweep.yaml" in str(error.value)


def test_the_documented_sweep_is_right(tmp_path: Path):
    text = (ROOT / "docs" / "sweeps.md").read_text()
    whole, workers = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    sweep = yaml.safe_load(whole) | yaml.safe_load(workers)
    assert sweep["config"].startswith("../")
    sweep["config"] = str((ROOT / "configs" / "sweeps" / sweep["config"]).resolve())
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    with checked(load_sweep_config(path), "sweep.yaml") as (found, _):
        assert found.wanted == 40
