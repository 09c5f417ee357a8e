"""`theworld-train train`: what its exit code says."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.assemble import run
from theworld_train.cli.app import app
from theworld_train.config import dump_config, parse_run_config
from theworld_train.train.stopping import StoppedError


def test_run_that_a_signal_has_stopped_is_a_temporary_failure(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_args: object) -> None:
        raise StoppedError(7)

    values = {
        "name": "run",
        "output_dir": str(tmp_path / "run"),
        "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": 32}},
        "trainable": {"world_projector": {}},
        "data": {"train": {"source": "moving_digits", "split": "train", "samples": 4}},
        "training": {"max_steps": 1},
    }
    (tmp_path / "run.yaml").write_text(dump_config(parse_run_config(values)))
    monkeypatch.setattr(run, "train", stop)
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert result.exit_code == 75
    assert "run: stopped by a signal after step 7; resume=latest goes on from there" in result.output
