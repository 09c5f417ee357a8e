"""A folder with configs, and a way to call the command line in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from theworld_train.cli.app import app

GOOD = """\
name: good
output_dir: runs/good
trainable: {world_projector: {}}
data: {train: {source: jsonl, path: train.jsonl}}
training: {max_steps: 10}
"""
WRONG = "extends: good.yaml\nseed: x\noptimizer: {lr: -1}\n"
PIPELINE = (
    "name: chain\noutput_dir: runs/chain\nstages: [{config: good.yaml}, {config: good.yaml, overrides: {name: b}}]\n"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good run config, a wrong one and a pipeline."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("good", GOOD), ("wrong", WRONG), ("pipeline", PIPELINE)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


@pytest.fixture
def call() -> Callable[..., tuple[int, str, str]]:
    """Calls the command line and returns exit code, standard output and standard error."""

    def invoke(*arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return invoke
