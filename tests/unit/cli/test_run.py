"""Protects `run`: its dry run shows everything and changes nothing, and wrong words are refused first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.tiny import TinyCheckpoint, write_run

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def pipeline(tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two stages on the tiny model: one process with a gate, then two with a strategy that the plan chooses."""
    monkeypatch.chdir(tmp_path)
    path = str(write_run(tiny, tmp_path, steps=8, batch=4))
    second = {"name": "second", "runtime.strategy": "auto", "trainable": {"multi_modal_projector": {"lr": 0.001}}}
    stages = [
        {"config": path, "advance_when": {"steps": 5}, "on_failure": {"retry": 2}},
        {"config": path, "overrides": second, "launcher": ["theworld-train", "launch", "--nproc", "2"]},
    ]
    (tmp_path / "pipeline.yaml").write_text(json.dumps({"name": "p", "output_dir": "runs", "stages": stages}))
    return "pipeline.yaml"


def test_dry_run_shows_ledger_plan_gates_and_commands_and_writes_nothing(pipeline: str, call: Call, tmp_path: Path):
    code, out, _ = call("run", pipeline, "--dry-run", "--gpu", "h100-80gb")
    assert code == 0
    assert "world_projector" in out
    assert "trainable share" in out
    words = " ".join(out.split())
    assert "run 1 one process" in words
    assert "second 2 ddp (auto)" in words
    assert words.count(" fits ") == 2
    assert "together" in words
    assert "stage 1/2 run: would start from the bases" in out
    assert "ends before its last step by advance_when.steps=5" in out
    assert "is started again up to 2 times if it fails" in out
    assert "-m theworld_train train" in out
    assert "stage 2/2 second: would start from the newest checkpoint in runs/run" in out
    assert "$ theworld-train launch --nproc 2 " in out
    assert "init_from=runs/run" in out
    assert not (tmp_path / "runs").exists()


def test_dry_run_of_some_stages_shows_these_alone(pipeline: str, call: Call):
    _, out, _ = call("run", pipeline, "--dry-run", "--until", "run")
    assert "stage 1/2 run" in out
    assert "stage 2/2" not in out
    assert "name the GPU" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--from", "secnod"), "--from: no stage is called so (got 'secnod'); did you mean 'second'?"),
        (("--from", "second"), "runs/run holds no checkpoint"),
        (("--gpu", "h100-80gb"), "--gpu: goes with --dry-run"),
        (("--dry-run", "--gpu", "h10"), "--gpu: "),
        (("on_failure.retry=-1",), "on_failure.retry"),
        (("on_failure.retries=1",), "did you mean 'on_failure.retry'"),
    ],
)
def test_wrong_words_are_refused(pipeline: str, call: Call, words: tuple[str, ...], said: str):
    code, _, err = call("run", pipeline, *words)
    assert code == 2
    assert said in " ".join(err.split())
