"""The quickstart from the command line, shortened: four stages, each a process, then the ablations and a question."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from theworld_train.config.schema import ABLATIONS

ROOT = Path(__file__).parents[2]
STAGES = ("projection", "vision", "language", "full")


def command(*arguments: str, cwd: Path) -> str:
    """Runs the command line as a user does, and returns what it prints."""
    environment = {**os.environ, "COLUMNS": "160", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [sys.executable, "-m", "theworld_train", *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, f"{arguments}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which the shortened pipeline has run."""
    directory = tmp_path_factory.mktemp("quickstart")
    command("tiny", "runs/tiny", cwd=directory)
    pipeline = yaml.safe_load((ROOT / "configs" / "pipelines" / "quickstart.yaml").read_text())
    for stage, name in zip(pipeline["stages"], STAGES, strict=True):
        assert stage["config"].endswith(f"{name}.yaml")
        stage["config"] = str(ROOT / "configs" / "quickstart" / f"{name}.yaml")
        stage["overrides"] = {
            "training.max_steps": 4,
            "training.global_batch_size": 8,
            "training.micro_batch_size": 4,
            "schedule.warmup_steps": 2,
            "evaluation.max_samples": 16,
            "evaluation.micro_batch_size": 8,
            "evaluation.max_new_tokens": 2,
            "evaluation.metrics": {"digit": "numeric"},
            "data.num_workers": 0,
        }
    (directory / "short.yaml").write_text(yaml.safe_dump(pipeline))
    (directory / "printed.txt").write_text(command("run", "short.yaml", cwd=directory))
    return directory


def test_every_stage_trains_and_is_summarised(workplace: Path) -> None:
    summary = json.loads((workplace / "runs/quickstart/summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == list(STAGES)
    for stage in summary["stages"]:
        assert stage["steps"] == 4
        counts = {kind: group["samples"] for kind, group in stage["eval"]["kinds"].items()}
        assert counts == {"digit": 8, "direction": 8}
        assert stage["eval"]["total"]["correct"]["count"] == 16
        assert set(stage["ablations"]) == (set(ABLATIONS) if stage["name"] in ("projection", "full") else set())
    printed = (workplace / "printed.txt").read_text()
    assert "share of held-out answers correct, by stage" in printed
    assert "share of held-out answers correct, with parts taken away (95% intervals)" in printed


def test_measured_checkpoint_equals_the_run_that_wrote_it(workplace: Path) -> None:
    stages = json.loads((workplace / "runs/quickstart/summary.json").read_text())["stages"]
    measured = [stage for stage in stages if stage["ablations"]]
    assert [stage["name"] for stage in measured] == ["projection", "full"]
    for stage in measured:
        again, whole = stage["ablations"]["as_trained"], stage["eval"]
        assert again["total"]["loss"]["value"] == pytest.approx(whole["total"]["loss"]["value"], rel=1e-6)
        assert [answer["answer"] for answer in again["answers"]] == [answer["answer"] for answer in whole["answers"]]
    full = json.loads((workplace / "runs/quickstart/full/evaluation.json").read_text())
    step = workplace / "runs/quickstart/full/step-4"
    assert full["format"] == 1
    assert (full["run"], full["max_new_tokens"], full["confidence"]) == ("full", 2, 0.95)
    assert full["metrics"] == {"digit": {"metric": "numeric"}, "direction": {"metric": "exact"}}
    digest = hashlib.sha256((step / "manifest.json").read_bytes()).hexdigest()
    assert (full["checkpoint"]["step"], full["checkpoint"]["manifest_sha256"]) == (4, digest)


def test_tower_trained_in_stage_two_stays_in_every_later_checkpoint(workplace: Path) -> None:
    def saved(stage: str) -> dict[str, dict[str, str]]:
        record = json.loads((workplace / f"runs/quickstart/{stage}/step-4/components.json").read_text())
        return record["components"]

    assert set(saved("projection")) == {"world_projector"}
    assert saved("language")["vision_tower"]["sha256"] == saved("vision")["vision_tower"]["sha256"]
    assert saved("language")["vision_tower"]["trained_by"] == "vision"
    assert set(saved("full")) == {
        "world_projector",
        "vision_tower",
        "multi_modal_projector",
        "language_model",
        "world_encoder",
    }


def test_running_again_runs_nothing_again(workplace: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (workplace / "runs/quickstart").rglob("*.safetensors")}
    assert "complete already" in command("run", "short.yaml", cwd=workplace)
    assert before == {path: path.stat().st_mtime_ns for path in (workplace / "runs/quickstart").rglob("*.safetensors")}


def test_checkpoint_answers_a_question(workplace: Path) -> None:
    from theworld_train.config.sources import MovingDigitsSource
    from theworld_train.data.moving_digits import MovingDigits

    sample = MovingDigits(MovingDigitsSource(source="moving_digits", split="eval", samples=2))[0]
    folder = workplace / "clip"
    folder.mkdir()
    for number, frame in enumerate(sample.messages[0]["content"][0]["video"]):
        frame.save(folder / f"{number}.png")
    question = ["--video", str(folder), "--prompt", "Which way does it move?", "--max-new-tokens", "3"]
    command("generate", "runs/quickstart/full", *question, cwd=workplace)
