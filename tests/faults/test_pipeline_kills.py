"""A pipeline that is killed at any moment and run again ends with the same weights as one that is not, bit for bit."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from tests.helpers.tiny import TinyCheckpoint, write_run
from theworld_train.assemble import run as assembled
from theworld_train.checkpoint_files import file_sha256, newest_checkpoint, verify_checkpoint
from theworld_train.config import load_pipeline_config, load_run_config
from theworld_train.config.pipeline import PipelineConfig
from theworld_train.pipeline.journal import Journal
from theworld_train.pipeline.process import Processes
from theworld_train.pipeline.runner import run_pipeline
from theworld_train.train.checkpoint import CheckpointWriter
from theworld_train.train.metrics import MetricsFile, read_metrics
from theworld_train.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
#: Times that a pipeline is killed before it is left alone.
KILLS = 5
QUICKSTART = ("projection", "vision", "language", "full")


class Killed(BaseException):
    """Ends a pipeline in the midst of something; nothing in the code expects it."""


def weights(stage: Path) -> dict[str, Any]:
    """Returns what a stage's last checkpoint holds: hashes of weights and optimizer, random states, memory of gates."""
    newest = newest_checkpoint(stage)
    assert newest is not None
    verify_checkpoint(newest)
    state = json.loads((newest / "state.json").read_text())
    for rank in state["rng"]:
        del rank["python"]  # no seed is set for it, and nothing draws from it: it differs from process to process
    return {path.name: file_sha256(path) for path in newest.glob("*.safetensors")} | {"state": state}


def outcome(stage: Path) -> dict[str, Any]:
    """Returns what a run has come to, without what differs from time to time."""
    result: dict[str, Any] = json.loads((stage / "result.json").read_text())
    return result


# -- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tiny: TinyCheckpoint, tmp_path: Path) -> Callable[..., PipelineConfig]:
    """Writes a pipeline of two stages: the first ends by a plateau after 6 of 9 steps, the second after 4."""

    def write(name: str, **gate: Any) -> PipelineConfig:
        data = {"source": "moving_digits", "frames": 1, "canvas": 32}
        sections = {
            "data": {
                "train": {**data, "split": "train", "samples": 64},
                "eval": {**data, "split": "eval", "samples": 4},
                "num_workers": 0,
            },
            "evaluation": {"every_steps": 2},
            "checkpoint": {"every_steps": 3, "keep_last": 1},
        }
        path = write_run(tiny, tmp_path, steps=9, batch=2, **sections)
        plateau = {"metric": "eval/loss", "mode": "min", "patience": 2, "min_delta": 1e6}
        trainable = {"world_projector": {"lr": 1e-4}, "multi_modal_projector": {"lr": 1e-3}}
        second = {"name": "second", "trainable": trainable, "training.max_steps": 4}
        stages = [
            {"config": str(path), "overrides": {"name": "first"}, **(gate or {"advance_when": {"plateau": plateau}})},
            {"config": str(path), "overrides": second},
        ]
        values = {"name": name, "output_dir": str(tmp_path / name), "stages": stages}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
        return load_pipeline_config(tmp_path / f"{name}.yaml")

    return write


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[PipelineConfig], dict[str, Any]]:
    """Runs a pipeline whose stages train in this process, which spares each of them ten seconds of imports."""

    def call(_: Processes, command: Sequence[str]) -> int:
        path, *overrides = command[4:]
        assembled.train(load_run_config(path, overrides), Console(file=io.StringIO()))
        return 0

    monkeypatch.setattr(Processes, "call", call)
    return lambda pipeline: run_pipeline(pipeline, Console(file=io.StringIO()))


@contextmanager
def killed_at(moment: int | None) -> Any:
    """Breaks off before the n-th step, line of metrics or journal, checkpoint or result; yields what has been."""
    passed: list[str] = []
    places = [
        (Trainer, "step"),
        (MetricsFile, "write"),
        (Journal, "_append"),
        (CheckpointWriter, "_write_files"),
        (assembled, "write_result"),
    ]

    def watched(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if moment is not None and len(passed) >= moment:
                raise Killed
            passed.append(name)
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in places:
            patch.setattr(owner, name, watched(getattr(owner, name), name))
        yield passed


def test_pipeline_killed_at_random_moments_ends_with_the_same_weights(
    pipeline: Callable[..., PipelineConfig], in_process: Callable[[PipelineConfig], dict[str, Any]], tmp_path: Path
):
    with killed_at(None) as passed:
        in_process(pipeline("straight"))
    first, second = [moment for moment, name in enumerate(passed) if name == "_write_files"][:2]
    drawn, broken = random.Random(9), pipeline("broken")
    # Once between two checkpoints, where the gates' memory counts; then before a launch can come to the end.
    for stop in (drawn.randint(first + 1, second), *(drawn.randint(0, first) for _ in range(KILLS - 1))):
        with killed_at(stop), pytest.raises(Killed):
            in_process(broken)
    summary = in_process(broken)
    assert [stage["ended_by"] for stage in summary["stages"]] == ["advance_when.plateau", "max_steps"]
    for stage in ("first", "second"):
        straight, killed = tmp_path / "straight" / stage, tmp_path / "broken" / stage
        assert weights(killed) == weights(straight)
        assert outcome(killed) == outcome(straight)
        for event in ("train", "eval"):
            done = [row["step"] for row in read_metrics(killed / "metrics.jsonl", event)]
            assert done == [row["step"] for row in read_metrics(straight / "metrics.jsonl", event)], "each once"


def test_stage_that_is_good_enough_spares_the_next_one(
    pipeline: Callable[..., PipelineConfig], in_process: Callable[[PipelineConfig], dict[str, Any]], tmp_path: Path
):
    good = pipeline("good", stop_when={"threshold": {"metric": "eval/loss", "at_most": 1e6}})
    first, second = in_process(good)["stages"]
    assert (first["steps"], first["ended_by"]) == (2, "stop_when.threshold")
    assert second["state"] == "skipped"
    assert not (tmp_path / "good/second").exists()


# -- the quickstart ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tiny model and the quickstart's pipeline, its stages shortened and each with a gate."""
    directory = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "theworld_train", "tiny", "runs/tiny"]
    subprocess.run(command, cwd=directory, env=environment(), check=True, capture_output=True)
    values = yaml.safe_load((ROOT / "configs" / "pipelines" / "quickstart.yaml").read_text())
    for stage, name in zip(values["stages"], QUICKSTART, strict=True):
        stage["config"] = str(ROOT / "configs" / "quickstart" / f"{name}.yaml")
        stage["overrides"] = {
            "training.max_steps": 40,
            "training.global_batch_size": 8,
            "training.micro_batch_size": 4,
            "schedule.warmup_steps": 2,
            "checkpoint.every_steps": 3,
            "evaluation.every_steps": 5,
            "evaluation.max_samples": 8,
            "evaluation.micro_batch_size": 8,
        }
        stage["advance_when"] = {"plateau": {"metric": "eval/loss", "mode": "min", "patience": 2, "min_delta": 1e6}}
    values["evaluation"] = {"stages": ["full"], "ablations": ["as_trained"]}
    (directory / "short.yaml").write_text(yaml.safe_dump(values))
    return directory


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def start(directory: Path, name: str) -> subprocess.Popen[bytes]:
    """Starts the pipeline in a process group of its own, which its stages belong to."""
    command = [sys.executable, "-m", "theworld_train", "run", "short.yaml", f"output_dir=runs/{name}"]
    with (directory / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command, cwd=directory, env=environment(), stdout=log, stderr=log, start_new_session=True
        )


@pytest.mark.slow
@pytest.mark.distributed
def test_quickstart_killed_at_random_moments_ends_with_the_same_weights(quickstart: Path):
    began = time.monotonic()
    assert start(quickstart, "straight").wait() == 0, (quickstart / "straight.log").read_text()[-4000:]
    took = time.monotonic() - began
    moments = [random.uniform(0, took / 2) for _ in range(KILLS)]
    for moment in moments:
        process = start(quickstart, "killed")
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert start(quickstart, "killed").wait() == 0, (quickstart / "killed.log").read_text()[-4000:]
    for name in QUICKSTART:
        straight, killed = (quickstart / "runs" / which / name for which in ("straight", "killed"))
        assert weights(killed) == weights(straight), f"{name}, after kills {moments} s from each start"
        assert outcome(killed) == outcome(straight)
