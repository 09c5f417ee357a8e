"""A real sweep: twelve trials of the quickstart, two workers, a killed controller, and the best trial once more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.checkpoint_files import newest_checkpoint

ROOT = Path(__file__).parents[2]
#: Such a rate makes the loss infinite after a step, and the run ends.
ABSURD = 1.0e30


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "theworld_train", *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True)


def command(*arguments: str, cwd: Path) -> str:
    process = start(*arguments, cwd=cwd)
    out, _ = process.communicate(timeout=550)
    assert process.returncode == 0, out
    return out


def write_sweep(folder: Path, tiny: TinyCheckpoint) -> None:
    """Writes a sweep of the quickstart's first stage, shortened: half of its points cannot fit, and one crashes."""
    sizes = [{"global_batch_size": size, "micro_batch_size": size} for size in (8, 1024)]
    shared = {
        "max_steps": 6,
        "max_skipped_steps": 1,
        "gradient_checkpointing": "none",
    }
    sweep = yaml.safe_load((ROOT / "configs/sweeps/quickstart.yaml").read_text()) | {
        "config": str(ROOT / "configs/quickstart/projection.yaml"),
        "output_dir": "sweep",
        "overrides": {
            "model.base": tiny.gemma,
            "model.world.encoder": tiny.cosmos,
            "schedule.warmup_steps": 0,
            "evaluation.every_steps": 2,
            "evaluation.max_samples": 16,
            "evaluation.micro_batch_size": 8,
            "checkpoint.every_steps": 1,
            "data.num_workers": 0,
        },
        "space": {
            "trainable.world_projector.lr": {"values": [1e-3, 3e-3, 1e-2, 2e-2, 3e-2, ABSURD]},
            "training": {"values": [shared | size for size in sizes]},
        },
        "search": "grid",
        "pruner": "none",
        "warmup_steps": 0,
        "memory_gib": 2,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep, sort_keys=False))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_that_is_killed_ends_and_its_best_trial_comes_again(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    write_sweep(tmp_path, tiny)
    directory = tmp_path / "sweep"
    process = start("sweep", "run", "sweep.yaml", cwd=tmp_path)
    deadline = time.monotonic() + 300
    while not list(directory.glob("trials/*/run/step-*")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no trial has saved"
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    printed = command("sweep", "resume", "sweep", cwd=tmp_path)
    summary: dict[str, Any] = json.loads((directory / "sweep.json").read_text())
    trials = summary["trials"]
    assert Counter(trial["state"] for trial in trials) == {"complete": 5, "failed": 1, "does_not_fit": 6}, printed
    assert len({json.dumps(trial["values"]) for trial in trials}) == 12
    assert max(trial["launches"] for trial in trials) == 2, "nothing was interrupted"
    for trial in trials:
        run = directory / trial["directory"] / "run"
        if trial["state"] == "does_not_fit":
            assert "the plan says that it takes" in trial["reason"]
            assert not run.exists()
        if trial["state"] == "complete":
            steps = [row["step"] for row in rows(run) if "train/loss" in row]
            assert steps == list(range(1, 7)), "a step was lost or taken twice"
            assert trial["value"] == last(run)
        if trial["state"] == "failed":
            assert trial["values"]["trainable.world_projector.lr"] == ABSURD

    best = trials[summary["best"]]
    assert best["value"] == min(trial["value"] for trial in trials if trial["value"] is not None)
    config = directory / best["directory"] / "config.yaml"
    command("train", str(config), "output_dir=again", cwd=tmp_path)
    assert last(tmp_path / "again") == best["value"]
    assert weights(tmp_path / "again") == weights(directory / best["directory"] / "run")


@pytest.mark.slow
def test_a_sweep_of_a_pipeline(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    short = {
        "model.base": tiny.gemma,
        "model.world.encoder": tiny.cosmos,
        "training.max_steps": 2,
        "training.global_batch_size": 8,
        "training.micro_batch_size": 8,
        "schedule.warmup_steps": 0,
        "evaluation.max_samples": 8,
        "evaluation.micro_batch_size": 8,
        "data.num_workers": 0,
    }
    stages = [
        {"config": str(ROOT / f"configs/quickstart/{name}.yaml"), "overrides": short}
        for name in ("projection", "vision")
    ]
    (tmp_path / "pipeline.yaml").write_text(
        yaml.safe_dump({"name": "short", "output_dir": "runs/short", "stages": stages})
    )
    sweep = {
        "name": "chain",
        "output_dir": "sweep",
        "pipeline": "pipeline.yaml",
        "space": {"stages.projection.trainable.world_projector.lr": {"values": [1e-4, 1e-2]}},
        "search": "grid",
        "metric": "eval/loss",
        "direction": "minimize",
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    command("sweep", "run", "sweep.yaml", cwd=tmp_path)
    summary = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [trial["state"] for trial in summary["trials"]] == ["complete"] * 2
    assert len({trial["value"] for trial in summary["trials"]}) == 2
    best = summary["trials"][summary["best"]]
    directory = tmp_path / "sweep" / best["directory"]
    assert best["value"] == last(directory / "run" / "vision")
    command("run", str(directory / "config.yaml"), "output_dir=again", cwd=tmp_path)
    assert last(tmp_path / "again" / "vision") == best["value"]
    assert weights(tmp_path / "again" / "vision") == weights(directory / "run" / "vision")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(run: Path) -> float:
    return [float(row["eval/loss"]) for row in rows(run) if "eval/loss" in row][-1]


def weights(run: Path) -> str:
    newest = newest_checkpoint(run)
    assert newest is not None
    record = json.loads((newest / "components.json").read_text())
    return str(record["components"]["world_projector"]["sha256"])
