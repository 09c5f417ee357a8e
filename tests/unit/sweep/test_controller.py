"""Protects what becomes of trials: how each may end, what it is launched with, and what is kept of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import scripted_trial
from tests.helpers.scripted_trial import (
    CRASHES,
    OUT_OF_MEMORY,
    SILENT,
    SLOW,
    STEPS,
    STOPPED,
    UNFINISHED,
    WELL,
    value_at,
)
from tests.helpers.sweeps import LAUNCHER, NO_PLAN, TOO_LARGE, controller_of, write_sweep
from theworld_train.config import ConfigError, load_run_config, load_sweep_config
from theworld_train.config.schema import RunConfig
from theworld_train.config.sweep import SweepWorkers
from theworld_train.sweep.controller import Controller, Worker, only_worker, training_command, workers_of

Make = Callable[..., Controller]
ALONE = [Worker(None, 1)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theworld_train.sweep.controller.POLL_S", 0.02)


def scripts(*names: int) -> dict[str, Any]:
    return {"schedule.warmup_steps": {"values": list(names)}}


def of_scripts(controller: Controller) -> dict[int, dict[str, Any]]:
    """Returns the trials of a sweep's summary by their scripts."""
    return {trial["values"]["schedule.warmup_steps"]: trial for trial in controller.summary()["trials"]}


def test_every_end_is_a_result_of_the_trial_alone(tmp_path: Path):
    path = write_sweep(
        tmp_path, space=scripts(WELL, CRASHES, OUT_OF_MEMORY, SILENT, SLOW, STOPPED, UNFINISHED), timeout_s=3
    )
    said: list[str] = []
    controller = controller_of(path, ALONE * 3, said)
    assert controller.run() is None
    trials = of_scripts(controller)
    assert {script: trial["state"] for script, trial in trials.items()} == {
        WELL: "complete",
        CRASHES: "failed",
        OUT_OF_MEMORY: "out_of_memory",
        SILENT: "failed",
        UNFINISHED: "failed",
        SLOW: "timed_out",
        STOPPED: "interrupted",  # somebody's signal is no fault of the point: the next command goes on with it
    }
    assert trials[OUT_OF_MEMORY]["reason"].startswith("torch.OutOfMemoryError: CUDA out of memory")
    assert trials[SILENT]["reason"] == "the run wrote no eval/loss; did you mean 'train/loss'?"
    assert trials[UNFINISHED]["reason"] == "its process ended with exit code 0, but without result.json"
    assert trials[UNFINISHED]["value"] is None
    assert trials[SLOW]["reason"] == "took longer than 3 s"
    assert len(trials[SLOW]["intermediate"]) >= 1
    assert trials[WELL]["intermediate"] == [[s, value_at(s, 1e-4, 0)] for s in range(1, STEPS + 1)]
    assert trials[WELL]["seconds"] > 0
    assert any("out of memory" in line for line in said)
    # The one that was stopped goes on; what has ended stays as it is.
    again = controller_of(path, ALONE)
    again.run()
    after = of_scripts(again)
    assert after[STOPPED]["state"] == "complete"
    assert after[STOPPED]["launches"] == 2
    assert {script: after[script] for script in after if script != STOPPED} == {
        script: trials[script] for script in trials if script != STOPPED
    }
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text()) == again.summary()


def test_bad_trials_are_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCRIPTED_STEP_S", "0.15")
    space = {"optimizer.lr": {"values": [0.3, 0.31, 9.0]}}
    controller = controller_of(write_sweep(tmp_path, space=space, pruner="median", startup_trials=2, seed=3), ALONE)
    controller.run()
    *good, bad = controller.summary()["trials"]
    assert [trial["state"] for trial in good] == ["complete", "complete"]
    assert bad["values"] == {"optimizer.lr": 9.0}  # the last one with this seed
    assert (bad["state"], bad["value"], bad["exit_code"]) == ("pruned", None, 75)
    assert bad["reason"].startswith("worse than others at step")
    assert len(bad["intermediate"]) < STEPS


def test_points_that_make_no_config_are_recorded(tmp_path: Path):
    # So many points that each key alone is looked at before, and an offload needs a strategy that divides.
    space = {
        "runtime.strategy": {"values": ["fsdp2", "ddp"]},
        "runtime.offload": {"values": ["none", "all"]},
        "seed": {"min": 0, "max": 64, "step": 1},
    }
    path = write_sweep(tmp_path, space=space, trials=3)
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text() + "runtime: {strategy: fsdp2}\n")
    controller = controller_of(path, ALONE * 2)
    controller.run()
    trials = controller.summary()["trials"]
    assert {trial["state"] for trial in trials} == {"complete", "invalid"}
    for trial in trials:
        values = trial["values"]
        wrong = values["runtime.offload"] == "all" and values["runtime.strategy"] == "ddp"
        assert (trial["state"] == "invalid") is wrong
        assert (trial["launches"] == 0) is wrong
        assert not wrong or "needs strategy fsdp2" in trial["reason"]


def test_a_result_that_was_not_recorded_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_sweep(tmp_path, space=scripts(WELL))
    controller = controller_of(path, ALONE)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("theworld_train.sweep.study.Study.finish", killed)
        with pytest.raises(KeyboardInterrupt):
            controller.run()
    assert controller.summary()["trials"][0]["state"] == "interrupted"
    again = controller_of(path, ALONE)
    again.run()
    (trial,) = again.summary()["trials"]
    assert (trial["state"], trial["launches"]) == ("complete", 1)


def test_an_end_that_optuna_was_not_told_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_sweep(tmp_path, space={"optimizer.lr": {"values": [TOO_LARGE]}})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("optuna.study.Study.tell", killed)
        with pytest.raises(KeyboardInterrupt):
            controller_of(path, ALONE).run()
    again = controller_of(path, ALONE)
    again.run()
    (trial,) = again.summary()["trials"]
    assert (trial["state"], trial["reason"]) == ("does_not_fit", "it takes 90 GiB, and the GPU has 79")


def test_a_trial_whose_plan_fails_is_launched(tmp_path: Path):
    said: list[str] = []
    controller = controller_of(write_sweep(tmp_path, space={"optimizer.lr": {"values": [NO_PLAN]}}), ALONE, said)
    controller.run()
    assert said[0] == "trial 0 cannot be planned (NotImplementedError: no plan of it), so that it is launched without"
    assert controller.summary()["trials"][0]["state"] == "complete"


@pytest.mark.parametrize(
    ("words", "state"), [(["--nproc=1"], "does_not_fit"), (["--nproc", "8"], "complete"), ([], "complete")]
)
def test_the_plan_is_asked_with_the_processes_of_the_launcher(tmp_path: Path, words: list[str], state: str):
    """Eight of them divide what one cannot hold; a launcher that does not say how many there are is not judged."""
    space = {"optimizer.lr": {"values": [TOO_LARGE]}}
    controller = controller_of(write_sweep(tmp_path, space=space, launcher=[*LAUNCHER, *words]), ALONE)
    controller.run()
    assert controller.summary()["trials"][0]["state"] == state


def test_the_plan_is_asked_with_the_processes_of_each_stage(
    tmp_path: Path, chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    text = (tmp_path / "chain.yaml").read_text()
    stages = text.replace("- config: stage.yaml", "- launcher: [srun]\n  config: stage.yaml", 1)
    (tmp_path / "chain.yaml").write_text(stages + "launcher: [torchrun, --nnodes=2, --nproc-per-node=8]\n")
    asked = []

    def fits(run: RunConfig, processes: int) -> str:
        asked.append((run.name, processes))
        return "too large"

    monkeypatch.setattr("tests.helpers.sweeps.fits", fits)
    space = {"stages.one.seed": {"values": [1]}}
    controller = controller_of(write_sweep(tmp_path, space=space, **chain), [Worker(None, 1)])
    controller.run()
    assert asked == [("two", 16)], "nobody knows what srun starts"
    assert controller.summary()["trials"][0]["reason"] == "two: too large"


def test_values_are_reported_as_often_as_the_stage_of_the_metric_asks(
    tmp_path: Path, chain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def interval(_metric: str, run: RunConfig) -> int:
        raise RuntimeError(run.name)

    monkeypatch.setattr("theworld_train.sweep.controller.start", lambda *_: None)
    monkeypatch.setattr("theworld_train.sweep.controller.report_interval", interval)
    path = write_sweep(tmp_path, space={"stages.one.seed": {"values": [1]}}, stage="one", **chain)
    with pytest.raises(RuntimeError, match=r"^one$"):
        controller_of(path, ALONE).run()


def test_each_worker_has_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    workers = workers_of(SweepWorkers(count=2, gpus=((0, 1), (2,))))
    assert workers == [Worker("0,1", 2), Worker("2", 1)]
    path = write_sweep(tmp_path, space={"seed": {"values": [1, 2]}})
    controller_of(path, workers).run()
    results = [json.loads(file.read_text()) for file in (tmp_path / "sweep").glob("trials/*/run/result.json")]
    assert {result["cuda_visible"] for result in results} == {"0,1", "2"}


def test_numbers_of_gpus_are_those_of_what_this_process_sees(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-ab,7")
    assert workers_of(SweepWorkers(count=2, gpus=((0, 1), (2,)))) == [Worker("4,GPU-ab", 2), Worker("7", 1)]
    with pytest.raises(ConfigError, match="names GPU 3, but CUDA_VISIBLE_DEVICES shows 3, numbered from 0"):
        workers_of(SweepWorkers(gpus=((3,),)))


def test_a_jobs_worker_takes_the_gpus_that_it_sees(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert only_worker(SweepWorkers()) == Worker(None, 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert only_worker(SweepWorkers(processes=2)) == Worker(None, 2)


def test_commands(tmp_path: Path):
    config = Path("config.yaml")
    module = [sys.executable, "-m", "theworld_train"]

    def command(processes: int = 1, **settings: Any) -> list[str]:
        return training_command(load_sweep_config(write_sweep(tmp_path, **settings)), config, processes)

    assert command(launcher=[]) == [*module, "train", "config.yaml"]
    assert command(4, launcher=[]) == [*module, "launch", "config.yaml", "--nproc", "4"]
    assert command(launcher=["torchrun"]) == ["torchrun", "-m", "theworld_train", "train", "config.yaml"]
    own = ["srun", "/opt/bin/theworld-train", "launch"]
    assert command(launcher=own) == [*own, "config.yaml"]
    assert command(launcher=[], config=None, pipeline="chain.yaml") == [*module, "run", "config.yaml"]


def test_a_trials_config_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = write_sweep(tmp_path, space={"optimizer.lr": {"values": [0.25]}}, output_dir="relative")
    controller_of(path, ALONE).run()
    config = load_run_config("relative/trials/0000/config.yaml")
    assert config.optimizer.lr == 0.25
    assert config.name == "scripted-0000"
    assert config.output_dir == str(tmp_path / "relative" / "trials" / "0000" / "run")
    assert config.schedule.warmup_steps == scripted_trial.WELL
