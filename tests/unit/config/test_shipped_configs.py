"""Protects the configs that the project ships: every one of them, however deep in its folder, is valid."""

from __future__ import annotations

from pathlib import Path

import pytest

from theworld_train.config import (
    config_kind,
    load_pipeline_config,
    load_run_config,
    load_stage_configs,
    load_sweep_config,
)
from theworld_train.sweep.opening import checked

CONFIGS = Path(__file__).parents[3] / "configs"

#: Files and folders whose name begins with an underscore are parts that others extend, and no configs of their own.
SHIPPED = sorted(
    path
    for path in CONFIGS.rglob("*.yaml")
    if not any(part.startswith("_") for part in path.relative_to(CONFIGS).parts)
)


def test_there_are_shipped_configs():
    if not any(CONFIGS.rglob("*.yaml")):
        pytest.skip("no configs are shipped yet")
    assert len(SHIPPED) > 0


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_config_is_valid(path: Path):
    kind = config_kind(path)
    if kind == "sweep":
        with checked(load_sweep_config(path), str(path)) as (found, _):
            assert found.wanted > 1
    elif kind == "pipeline":
        load_stage_configs(load_pipeline_config(path), source=str(path))
    else:
        load_run_config(path)
