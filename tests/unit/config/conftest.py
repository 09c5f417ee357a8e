"""Small run configs that the tests of loading start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from theworld_train.config import ConfigError, Problem, load_run_config

BASE = """\
name: base
output_dir: runs/base
trainable:
  world_projector: {lr: 1e-4}
  vision_tower: {}
expect_trainable: 1000
data:
  train: {source: jsonl, path: train.jsonl}
training: {max_steps: 10}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory that holds `base.yaml`, so that sources are short names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[..., str]:
    """Writes a file and returns its name; what it extends is `base.yaml` unless the text says otherwise."""

    def write_file(text: str, name: str = "child.yaml", extends: str | None = "base.yaml") -> str:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((f"extends: {extends}\n" if extends else "") + text)
        return name

    return write_file


@pytest.fixture
def problems_of() -> Callable[..., list[Problem]]:
    """Returns the problems of a config that must not load."""

    def collect(path: str, *overrides: str) -> list[Problem]:
        with pytest.raises(ConfigError) as caught:
            load_run_config(path, overrides)
        return list(caught.value.problems)

    return collect


@pytest.fixture
def the_problem_of(problems_of: Callable[..., list[Problem]]) -> Callable[..., Problem]:
    """Returns the only problem of a config that must not load."""

    def collect(path: str, *overrides: str) -> Problem:
        problems = problems_of(path, *overrides)
        assert len(problems) == 1, "\n".join(map(str, problems))
        return problems[0]

    return collect
