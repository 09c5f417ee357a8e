"""Protects `theworld-train profile`: what it writes and prints, two runs in one table, its answers to mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint
from theworld_train.memory import picture

Call = Callable[..., tuple[int, str, str]]
SHORT = ("--warmup", "0", "--steps", "1")


@pytest.fixture
def pair(tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Configs of two runs, the second without a world path."""
    monkeypatch.chdir(tmp_path)
    first: dict[str, Any] = {
        "name": "projection",
        "output_dir": "run",
        "precision": "fp32",
        "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION}},
        "trainable": {"world_projector": {}},
        "data": {"train": {"source": "moving_digits", "split": "train", "samples": 8}},
        "training": {"max_steps": 4, "global_batch_size": 2, "micro_batch_size": 2},
        "schedule": {"warmup_steps": 1},
    }
    second = first | {"name": "gemma-only", "trainable": {"language_model": {}}}
    second["model"] = {"base": tiny.gemma, "world": {"enabled": False}}
    for config in (first, second):
        (tmp_path / f"{config['name']}.yaml").write_text(yaml.safe_dump(config))
    return "projection.yaml", "gemma-only.yaml"


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that loads a model."""
    from theworld_train.assemble import steps

    monkeypatch.setattr(steps, "load_model", lambda *_, **__: pytest.fail("a model is loaded"))


@pytest.fixture
def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has matplotlib not be installed."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.mark.usefixtures("without_picture")
def test_a_profile_is_written_where_it_is_said_and_replaced_only_by_force(call: Call, pair: tuple[str, str]):
    code, out, err = call("profile", pair[0], *SHORT)
    assert code == 0, err
    directory = Path("runs/profiles/projection")
    files = {path.name for path in directory.iterdir()}
    assert files == {"report.json", "report.md", "memory.json", "trace.json.gz", "tensorboard"}
    assert (directory / "report.md").read_text() in out
    assert "no memory.png: it needs matplotlib" in err
    for heading in ("Time by component", "Operations", "Memory", "Parameters", "Loss"):
        assert f"## {heading}" in out
    written = (directory / "report.json").stat().st_mtime_ns

    code, _, err = call("profile", pair[0], *SHORT)
    assert code == 2
    assert "replace it with --force" in err
    assert (directory / "report.json").stat().st_mtime_ns == written

    code, _, err = call("profile", pair[0], *SHORT, "--force")
    assert code == 0, err
    assert (directory / "report.json").stat().st_mtime_ns > written
    assert [path.name for path in directory.parent.iterdir()] == ["projection"]  # nothing is left beside it


def test_a_picture_is_drawn(call: Call, pair: tuple[str, str]):
    pytest.importorskip("matplotlib")
    code, _, err = call("profile", pair[0], *SHORT, "--output", "here")
    assert code == 0, err
    assert Path("here/memory.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_come_as_one_table(call: Call, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    commands: list[list[str]] = []

    def run_here(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        code, _, err = call(*command[3:])
        assert code == 0, err
        return SimpleNamespace(returncode=code)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run_here)
        patch.setattr(picture, "draw", lambda *_: None)
        code, out, _ = call("profile", *pair[:1], "seed=3", "--compare", pair[1], *SHORT, "--output", "both")
    assert code == 0
    assert [command[:3] for command in commands] == [[sys.executable, "-m", "theworld_train"]] * 2
    assert all("seed=3" in command for command in commands)
    first, second = (json.loads(Path(f"both/{name}/report.json").read_text()) for name in ("projection", "gemma-only"))
    rows = {row["name"]: row for row in json.loads(Path("both/comparison.json").read_text())["rows"]}
    assert Path("both/comparison.md").read_text() in out
    assert out.splitlines()[0].split("|")[2:4] == [f"{'projection':>11} ", f"{'gemma-only':>11} "]
    steps = [report["step"]["seconds"] for report in (first, second)]
    assert rows["step"] == {"name": "step", "unit": "s", "values": steps, "ratio": steps[1] / steps[0]}
    assert rows["trainable"]["values"] == [report["parameters"]["trainable"] for report in (first, second)]
    assert rows["peak of tensors"]["values"] == [report["memory"]["measured"]["bytes"] for report in (first, second)]
    assert rows["loss of the last step"]["values"] == [report["losses"][-1]["loss"] for report in (first, second)]
    assert rows["time of world_encoder"]["values"][1] is None
    assert rows["time of language_model"]["ratio"] > 0


@pytest.mark.slow
def test_two_runs_have_processes_of_their_own(pair: tuple[str, str], tmp_path: Path):
    command = [sys.executable, "-m", "theworld_train", "profile", pair[0], "--compare", pair[1], *SHORT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| trainable" in done.stdout
    assert (tmp_path / "runs/profiles/projection-and-gemma-only/comparison.md").is_file()


@pytest.mark.usefixtures("no_model", "pair")
@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["absent.yaml"], "absent.yaml"),
        (["projection.yaml", "--steps", "0"], "--steps"),
        (["projection.yaml", "--warmup", "-1"], "--warmup"),
        (["projection.yaml", "--steps", "2"], "the run has 4 steps, and the profile takes 7 of them"),
        (["projection.yaml", "--compare", "./projection.yaml"], "is the config that it would be compared with"),
        (["projection.yaml", "--compare", "absent.yaml"], "absent.yaml"),
        (["projection.yaml", "gemma-only.yaml"], "profile takes one config, got 2"),
        (["projection.yaml", "--output", "projection.yaml/x"], "--output: cannot be written to: Not a directory"),
        (["projection.yaml", "--output", ".", "--force"], "exists already and holds no profile"),
        (["projection.yaml", "model.base=nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_answered_before_a_model_loads(
    call: Call, pair: tuple[str, str], arguments: list[str], answer: str
):
    code, _, err = call("profile", *arguments)
    assert code == 2
    assert answer in " ".join(err.split())
    assert not [path for path in Path.cwd().rglob("*") if path.name.endswith(".partial")]


@pytest.mark.usefixtures("no_model")
def test_several_ranks_are_refused(call: Call, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("profile", pair[0])
    assert code == 2
    assert "a profile has one process" in err
