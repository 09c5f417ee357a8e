"""Sweeps of a small run config and of a pipeline of two stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.sweeps import BASE, write_sweep
from theworld_train.config import load_sweep_config
from theworld_train.sweep.opening import Checked, checked
from theworld_train.sweep.target import Resolved

Check = Callable[..., tuple[Checked, Resolved]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Writes a sweep with some settings and checks it."""
    monkeypatch.chdir(tmp_path)

    def check(**settings: Any) -> tuple[Checked, Resolved]:
        path = write_sweep(tmp_path, **settings)
        with checked(load_sweep_config(path), "sweep.yaml") as found:
            return found

    return check


@pytest.fixture
def chain(tmp_path: Path) -> dict[str, Any]:
    """Writes a pipeline of the stages `one` and `two`; returns the settings of a sweep of it."""
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(BASE))
    stages = [{"config": "stage.yaml", "overrides": {"name": name, "seed": 7}} for name in ("one", "two")]
    pipeline = {"name": "chain", "output_dir": "runs/chain", "stages": stages}
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(pipeline))
    return {"config": None, "pipeline": "chain.yaml", "launcher": []}
