"""Protects `theworld-train sweep`: what it prints, its exit codes, and what it answers to wrong input."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.helpers.scripted_trial import CRASHES, WELL
from tests.helpers.sweeps import write_sweep
from theworld_train.config import load_sweep_config
from theworld_train.sweep.opening import begin
from theworld_train.sweep.study import Claim, Study

Call = Callable[..., tuple[int, str, str]]
SCRIPTS = {"schedule.warmup_steps": {"values": [WELL, CRASHES]}}


@pytest.fixture
def swept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of a trial that goes well and one that crashes; its model counts as being at hand."""
    monkeypatch.setattr("theworld_train.hub.ensure_local", lambda *_: [])
    monkeypatch.setattr("theworld_train.sweep.controller.POLL_S", 0.02)
    return write_sweep(folder, space=SCRIPTS, output_dir="sweep").relative_to(folder)


def test_a_sweep_from_its_beginning_to_its_best(swept: Path, call: Call):
    code, out, _ = call("sweep", "run", str(swept))
    assert code == 0
    assert "failed (exit code 1: RuntimeError: the point is bad)" in out
    assert "scripted: 1 complete, 1 failed of 2 trials in sweep" in out
    assert "best: trial" in out

    code, out, _ = call("sweep", "status", "sweep")
    assert code == 0
    assert "scripted: 1 complete, 1 failed of 2 trials, minimize eval/loss" in out
    assert "exit code 1: RuntimeError" in out

    code, out, _ = call("sweep", "best", "sweep", "--json")
    best = json.loads(out)
    assert (code, best["state"], best["values"]) == (0, "complete", {"schedule.warmup_steps": WELL})
    code, out, _ = call("sweep", "best", str(swept))
    assert f"theworld-train train sweep/{best['directory']}/config.yaml output_dir=ELSEWHERE" in out

    before = json.loads(call("sweep", "status", "sweep", "--json")[1])
    code, out, _ = call("sweep", "resume", "sweep", "--worker")
    assert code == 0
    assert "begins" not in out
    assert json.loads(call("sweep", "status", "sweep", "--json")[1]) == before


def test_a_sweep_is_looked_at_where_its_launcher_is_not(swept: Path, call: Call):
    assert call("sweep", "run", str(swept))[0] == 0
    frozen = Path("sweep/sweep.yaml")
    frozen.write_text(yaml.safe_dump(yaml.safe_load(frozen.read_text()) | {"launcher": ["no-such-program"]}))
    assert call("sweep", "status", "sweep")[0] == 0
    assert call("sweep", "best", "sweep")[0] == 0
    code, _, err = call("sweep", "resume", "sweep")
    assert code == 2
    assert "launcher: no such program" in err


def test_no_trial_is_taken_while_the_trials_are_looked_at(swept: Path, call: Call, monkeypatch: pytest.MonkeyPatch):
    """A look at a trial's lock shares it for a moment, in which nobody could take it."""
    found = begin(load_sweep_config(swept), str(swept))
    claim = Study(found.sweep, found.directory, found.axes, found.wanted, found.run).claim()
    assert isinstance(claim, Claim)
    claim.lock.release()
    free = []

    def is_held(_: Path) -> bool:
        with Path("sweep/.sweep.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free.append(True)
            except BlockingIOError:
                free.append(False)
        return False

    monkeypatch.setattr("theworld_train.sweep.study.is_held", is_held)
    assert call("sweep", "status", "sweep")[0] == 0
    assert call("sweep", "run", str(swept))[0] == 0
    assert free
    assert not any(free)


def rows(path: str, *kinds: str) -> None:
    turns = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "3"}]
    Path(path).write_text("".join(json.dumps({"messages": turns, "kind": kind}) + "\n" for kind in kinds))


def test_a_metric_of_a_kind_that_no_sample_is_of_is_refused(swept: Path, call: Call):
    rows("eval.jsonl", "digit", "direction")
    code, _, err = call("sweep", "run", str(swept), "metric=eval/loss/digits")
    assert code == 2
    said = " ".join(err.split())
    assert (
        "metric: reads eval/loss/digits, but no held-out sample is of the kind 'digits'; did you mean 'digit'?" in said
    )
    assert not Path("sweep").exists()
    code, out, _ = call("sweep", "run", str(swept), "metric=eval/loss/digit")
    assert code == 1
    assert "the run wrote no eval/loss/digit" in out, "it was launched"


def test_a_sweep_without_a_complete_trial_fails(swept: Path, call: Call):
    code, _, err = call("sweep", "run", str(swept), f"space={{schedule.warmup_steps: {{values: [{CRASHES}]}}}}")
    assert code == 1
    assert err == "error: no trial is complete\n"
    code, _, err = call("sweep", "best", "sweep")
    assert code == 2
    assert "no trial is complete yet" in err


def test_a_model_that_is_not_here_is_said_first(swept: Path, call: Call, monkeypatch: pytest.MonkeyPatch):
    from theworld_train.config import Problem

    monkeypatch.setattr("theworld_train.hub.ensure_local", lambda *_: [Problem("is not on this machine")])
    code, _, err = call("sweep", "run", str(swept))
    assert code == 2
    assert "is not on this machine" in err
    assert not Path("sweep").exists()


def test_what_the_plan_refuses_is_never_launched(swept: Path, call: Call, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def why_not(config: object, strategies: object, ranks: int, gpu: object) -> str:
        asked.append((strategies, ranks, gpu.name))  # type: ignore[attr-defined]
        return "the plan says that it takes 90 GiB at least"

    monkeypatch.setattr("theworld_train.plan.choice.why_not", why_not)
    code, out, _ = call("sweep", "run", str(swept), "gpu=h100-80gb")
    assert code == 1
    assert "does not fit (the plan says that it takes 90 GiB at least)" in out
    assert asked == [(("ddp",), 1, "h100-80gb")] * 2
    assert not list(Path("sweep").glob("trials/*/log.txt"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "sweep.yaml", "another.yaml"), "sweep run takes one sweep, got 2"),
        (("run", "base.yaml"), "has no space, so it is no sweep; theworld-train train base.yaml"),
        (("run", "pipeline.yaml"), "theworld-train run pipeline.yaml"),
        (("run", "."), "is a directory, expected a sweep's file; theworld-train sweep resume ."),
        (("run", "sweep.yaml", "--json"), "--json: goes with status and best, not with run"),
        (("status", ".", "--worker"), "--worker: goes with run and resume, not with status"),
        (("status", "."), "holds no sweep: there is no sweep.yaml"),
        (("status", "sweep.yaml", "trials=3"), "status: takes no overrides"),
        (("best", "nowhere"), "holds no sweep"),
        (("resume", "sweep.yaml"), "sweep holds no sweep"),
        (("trial", "sweep.yaml"), "--values: is needed for trial"),
        (("export", "sweep.yaml", "trials=3"), "takes no overrides: state them in the file"),
        (("run", "sweep.yaml", "gpu=h1000"), "gpu"),
        (("run", "sweep.yaml", "metric=eval/los"), "did you mean 'eval/loss'?"),
        (("start", "sweep.yaml"), "'start' is not one of"),
    ],
)
def test_wrong_input(swept: Path, call: Call, arguments: tuple[str, ...], said: str):
    if arguments[-1] == ".":
        swept.rename("other.yaml")
    code, _, err = call("sweep", *arguments)
    assert code == 2
    assert said in " ".join(err.split())
    assert not Path("sweep").exists()


def test_other_commands_know_a_sweep(swept: Path, call: Call):
    assert "theworld-train sweep run sweep.yaml" in call("train", "sweep.yaml")[2]
    assert "theworld-train sweep run sweep.yaml" in call("run", "sweep.yaml")[2]
    code, out, _ = call("validate", "sweep.yaml")
    assert (code, out) == (0, "ok     sweep.yaml: sweep 'scripted' of 2 trials (grid) over schedule.warmup_steps\n")
    code, _, err = call("validate", "sweep.yaml", "overrides={optimizer.lrr: 1}")
    assert code == 2
    assert "did you mean 'optimizer.lr'?" in err
    assert "space" in json.loads(call("schema", "sweep")[1])["properties"]


def test_without_optuna(swept: Path, call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call("sweep", "run", str(swept))
    assert code == 2
    assert "pip install 'theworld-train[sweep]'" in err
    assert yaml.safe_load(call("sweep", "export", str(swept))[1])["method"] == "grid"


def test_wandbs_trial_takes_this_processs_place(swept: Path, call: Call, monkeypatch: pytest.MonkeyPatch):
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execvp", lambda _file, command: commands.append(command))
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    code, _, _ = call("sweep", "trial", str(swept), "--values", '{"schedule.warmup_steps": 3}')
    assert code == 0
    ((*_, last),) = commands
    assert last == "sweep/wandb-trials/abc/config.yaml"
    assert yaml.safe_load(Path(last).read_text())["schedule"]["warmup_steps"] == 3
