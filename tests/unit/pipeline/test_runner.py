"""A pipeline goes on where it was, and never shows stages together that do not come from one another."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from theworld_train.checkpoint_files import FORMAT, Origin, newest_checkpoint, origin_of
from theworld_train.config import dump_config
from theworld_train.config.errors import ConfigError
from theworld_train.config.gates import AdvanceWhen
from theworld_train.config.launchers import ranks_of
from theworld_train.config.pipeline import OnFailure, PipelineConfig, PipelineEvaluation
from theworld_train.pipeline.journal import read_journal
from theworld_train.pipeline.process import Processes
from theworld_train.pipeline.runner import PipelineHaltedError, run_pipeline, summarise
from theworld_train.pipeline.stages import StagePlan, plan_stages
from theworld_train.train.run_lock import run_lock

STAGES = ("projection", "vision", "language")
Run = Callable[..., list[str]]


def write_stage(directory: Path, init_from: Origin | None = None, *, step: int = 4, text: str = "") -> Path:
    """Writes a checkpoint as far as the runner reads it; another text is another checkpoint."""
    checkpoint = directory / f"step-{step}"
    checkpoint.mkdir(parents=True)
    record = {"format": FORMAT, "init_from": vars(init_from) if init_from else None}
    (checkpoint / "components.json").write_text(json.dumps(record))
    (checkpoint / "manifest.json").write_text(json.dumps({"format": FORMAT, "text": f"{checkpoint} {text}"}))
    return checkpoint


def write_evaluation(plan: StagePlan) -> None:
    """Writes what `evaluate` finds on a stage's newest checkpoint, as far as the runner reads it."""
    newest = newest_checkpoint(plan.directory)
    assert newest is not None
    found = {
        "checkpoint": {"manifest_sha256": origin_of(newest).manifest_sha256},
        "ablations": {name: {} for name in plan.ablations or ("as_trained",)},
    }
    (plan.directory / "evaluation.json").write_text(json.dumps(found))


@pytest.fixture
def pipeline(tmp_path: Path) -> PipelineConfig:
    """Three stages, whose configs are all that there is of them."""
    stages = []
    for name in STAGES:
        values = {
            "name": name,
            "output_dir": "elsewhere",
            "trainable": {"world_projector": {}},
            "data": {"train": {"source": "moving_digits", "split": "train", "samples": 8}},
            "training": {"max_steps": 4},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))
        stages.append({"config": str(tmp_path / f"{name}.yaml")})
    values = {"name": "test", "output_dir": str(tmp_path / "runs"), "stages": stages}
    return PipelineConfig.model_validate_json(json.dumps(values))


@dataclass
class Script:
    """What the processes of stages do instead of training.

    Attributes:
        codes: Exit codes of each stage's launches, the last one again and again; 0 where there are none. Those of its
            measurements are of `measure NAME`.
        complete_anyway: Stages that leave a result whatever they end with.
        ended_by: What ends a stage that is complete; all steps if it is not named.
        ran: Names of the stages that were launched, in order.
    """

    codes: dict[str, list[int]] = field(default_factory=dict)
    ended_by: dict[str, str] = field(default_factory=dict)
    complete_anyway: tuple[str, ...] = ()
    ran: list[str] = field(default_factory=list)

    def call(self, pipeline: PipelineConfig, command: Sequence[str]) -> int:
        plan = next(plan for plan in plan_stages(pipeline) if command in (plan.command, plan.evaluation))
        name = plan.name if command == plan.command else f"measure {plan.name}"
        self.ran.append(name)
        codes = self.codes.get(name, [0])
        code = codes.pop(0) if len(codes) > 1 else codes[0]
        if command == plan.evaluation:
            if code == 0:
                write_evaluation(plan)
            return code
        source = newest_checkpoint(Path(plan.config.init_from)) if plan.config.init_from else None
        if newest_checkpoint(plan.directory) is None:
            write_stage(plan.directory, origin_of(source) if source else None)
        (plan.directory / "config.yaml").write_text(dump_config(plan.config))
        if code == 0 or plan.name in self.complete_anyway:
            by = self.ended_by.get(plan.name, "max_steps")
            (plan.directory / "result.json").write_text(json.dumps({"steps": 4, "ended_by": by, "reason": f"by {by}"}))
        return code


@pytest.fixture
def run(pipeline: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a pipeline whose stages leave a checkpoint and a result; returns the names of those that ran."""

    def go(
        pipeline: PipelineConfig = pipeline,
        script: Script | None = None,
        first: str | None = None,
        last: str | None = None,
    ) -> list[str]:
        script = script or Script()
        monkeypatch.setattr(Processes, "call", lambda _, command: script.call(pipeline, command))
        run_pipeline(pipeline, Console(file=io.StringIO()), first, last)
        return script.ran

    return go


@pytest.fixture
def runs(run: Run, tmp_path: Path) -> Path:
    """The directory of a pipeline that has run to its end."""
    assert run() == list(STAGES)
    return tmp_path / "runs"


def test_complete_stages_are_not_run_again(run: Run, runs: Path):
    assert run() == []
    (runs / "language" / "result.json").unlink()
    assert run() == ["language"]
    shutil.rmtree(runs / "language")
    assert run() == ["language"]


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "to-be-resumed"])
def test_stages_whose_source_is_gone_are_refused_before_it_is_trained_again(run: Run, runs: Path, complete: bool):
    shutil.rmtree(runs / "projection")
    if not complete:
        (runs / "vision" / "result.json").unlink()
    with pytest.raises(ConfigError) as caught:
        run()
    (problem,) = caught.value.problems
    assert problem.source == str(runs / "vision")
    assert f"was trained from {runs / 'projection' / 'step-4'}, but {runs / 'projection'} holds no" in problem.message
    assert "remove this directory" in problem.hint
    assert not (runs / "projection").exists(), "nothing was trained"


def test_stages_whose_source_was_trained_again_are_refused(run: Run, runs: Path):
    former = (runs / "projection").rename(runs / "former")
    # Trained again by another process, which was stopped before it came to the next stage.
    write_stage(runs / "projection", text="trained again")
    for name in ("config.yaml", "result.json"):
        shutil.copy(former / name, runs / "projection")
    with pytest.raises(ConfigError) as caught:
        run()
    assert [problem.source for problem in caught.value.problems] == [str(runs / "vision")]
    assert "holds another step-4 now" in str(caught.value)
    shutil.rmtree(runs / "vision")
    with pytest.raises(ConfigError) as caught:
        run()
    assert [problem.source for problem in caught.value.problems] == [str(runs / "language")]
    shutil.rmtree(runs / "language")
    assert run() == ["vision", "language"]


def test_source_that_was_put_back_is_the_same(run: Run, runs: Path):
    former = (runs / "projection").rename(runs / "former")
    with pytest.raises(ConfigError):
        run()
    former.rename(runs / "projection")
    assert run() == []


def test_source_that_has_gone_on_is_another(
    run: Run, runs: Path, pipeline: PipelineConfig, monkeypatch: pytest.MonkeyPatch
):
    def go_on(_: Processes, command: Sequence[str]) -> int:
        assert command == plan_stages(pipeline)[0].command
        write_stage(runs / "projection", step=8)
        (runs / "projection" / "result.json").write_text("{}")
        return 0

    (runs / "projection" / "result.json").unlink()
    monkeypatch.setattr(Processes, "call", go_on)
    with pytest.raises(ConfigError, match=r"vision: was trained from .*step-4, but .* holds another step-8 now"):
        run_pipeline(pipeline, Console(file=io.StringIO()))


def test_source_from_elsewhere_may_be_gone_but_not_another(run: Run, pipeline: PipelineConfig, tmp_path: Path):
    source = write_stage(tmp_path / "elsewhere")
    first = pipeline.stages[0].model_copy(update={"overrides": {"init_from": str(source)}})
    pipeline = pipeline.model_copy(update={"stages": (first, *pipeline.stages[1:])})
    assert run(pipeline) == list(STAGES)
    shutil.rmtree(source)
    assert run(pipeline) == [], "nothing takes the place of a checkpoint that the pipeline does not make"
    write_stage(source.parent, text="trained again")
    with pytest.raises(ConfigError, match=r"projection: was trained from .*elsewhere/step-4, but .* holds another"):
        run(pipeline)


def test_run_directory_of_another_config_is_refused_but_not_for_what_is_safe_to_change(
    run: Run, runs: Path, pipeline: PipelineConfig
):
    def changed(**values: object) -> PipelineConfig:
        first = pipeline.stages[0].model_copy(update={"overrides": values})
        return pipeline.model_copy(update={"stages": (first, *pipeline.stages[1:])})

    with pytest.raises(ConfigError, match=r"projection: was written by another config \(seed: 0 there, 1 now\)"):
        run(changed(seed=1))
    with pytest.raises(ConfigError, match=r"model\.base"):
        run(changed(**{"model.base": "another"}))
    assert run(changed(**{"runtime.strategy": "auto", "training.advance_when.steps": 2})) == []


# -- gates ------------------------------------------------------------------------------------------------------------


def test_stages_after_one_that_is_good_enough_are_skipped(run: Run, tmp_path: Path):
    script = Script(ended_by={"projection": "advance_when.plateau", "vision": "stop_when.threshold"})
    assert run(script=script) == ["projection", "vision"]
    summary = json.loads((tmp_path / "runs/summary.json").read_text())
    assert [stage["state"] for stage in summary["stages"]] == ["complete", "complete", "skipped"]
    assert states(tmp_path)["language"] == [("skipped", 0, "vision is good enough: by stop_when.threshold", None)]
    assert run() == [], "it stays so"
    assert len(states(tmp_path)["language"]) == 1, "and is said once"


def test_stage_that_was_skipped_can_be_asked_for(run: Run, tmp_path: Path):
    run(script=Script(ended_by={"projection": "stop_when.threshold"}))
    with pytest.raises(ConfigError, match=r"--from: has nothing to start from: .*/vision holds no checkpoint"):
        run(first="language")
    assert run(first="vision") == ["vision", "language"]
    assert run() == []


# -- from and until ---------------------------------------------------------------------------------------------------


def test_from_leaves_what_is_before_and_until_what_comes_after(run: Run, tmp_path: Path):
    assert run(last="vision") == ["projection", "vision"]
    summary = json.loads((tmp_path / "runs/summary.json").read_text())
    assert [stage["state"] for stage in summary["stages"]] == ["complete", "complete", "pending"]
    (tmp_path / "runs/vision/result.json").unlink()
    assert run(first="language") == ["language"], "from a stage that is half done"
    assert run() == ["vision"]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"first": "visoin"}, "--from: no stage is called so (got 'visoin'); did you mean 'vision'?"),
        ({"last": "x"}, "--until: no stage is called so"),
        ({"first": "vision", "last": "projection"}, "--until: comes before --from vision"),
        ({"first": "vision"}, "projection holds no checkpoint (got 'vision'); begin earlier: --from projection"),
    ],
)
def test_wrong_from_and_until_are_refused(run: Run, stages: dict[str, str], said: str):
    with pytest.raises(ConfigError) as caught:
        run(**stages)
    assert said in str(caught.value)


# -- failures ---------------------------------------------------------------------------------------------------------


def states(tmp_path: Path) -> dict[str, list[tuple[str, int, str | None, int | None]]]:
    """Returns what the journal says of each stage."""
    found: dict[str, list[tuple[str, int, str | None, int | None]]] = {}
    for row in read_journal(tmp_path / "runs"):
        if row["event"] == "stage":
            entry = (row["state"], row["attempt"], row["reason"], row["exit_code"])
            found.setdefault(row["stage"], []).append(entry)
    return found


def test_journal_tells_what_has_happened(run: Run, runs: Path, tmp_path: Path):
    (first,) = [row for row in read_journal(runs) if row["event"] == "run"]
    assert (first["pipeline"], first["stages"], first["format"]) == ("test", list(STAGES), 1)
    assert states(tmp_path) == {
        name: [("running", 1, None, None), ("complete", 1, "by max_steps", 0)] for name in STAGES
    }


def test_stage_that_fails_halts_the_pipeline(run: Run, tmp_path: Path):
    with pytest.raises(PipelineHaltedError, match="stage 'vision' ended with exit code 69") as caught:
        run(script=Script({"vision": [69]}))
    assert caught.value.returncode == 69
    assert states(tmp_path)["vision"][-1] == ("failed", 1, "ended with exit code 69", 69)
    assert run() == ["vision", "language"]
    assert states(tmp_path)["vision"][-2:] == [("running", 2, None, None), ("complete", 2, "by max_steps", 0)]


@pytest.mark.parametrize(
    ("codes", "launches"),
    [([1, 137, 0], 3), ([1, 1, 1], 3), ([2], 1), ([75], 1), ([143], 1)],
    ids=["in-the-end", "always", "wrong-input", "stopped-and-saved", "stopped"],
)
def test_stage_is_retried_if_that_may_help(run: Run, pipeline: PipelineConfig, codes: list[int], launches: int):
    pipeline = pipeline.model_copy(update={"on_failure": OnFailure(retry=2)})
    script = Script({"projection": [*codes]})
    if codes[-1]:
        with pytest.raises(PipelineHaltedError) as caught:
            run(pipeline, script)
        assert caught.value.returncode == codes[-1]
    else:
        run(pipeline, script)
    assert script.ran.count("projection") == launches


def test_stage_may_state_its_own_retries(run: Run, pipeline: PipelineConfig):
    first = pipeline.stages[0].model_copy(update={"on_failure": OnFailure(retry=1)})
    script = Script({"projection": [1, 0], "vision": [1]})
    with pytest.raises(PipelineHaltedError, match="'vision'"):
        run(pipeline.model_copy(update={"stages": (first, *pipeline.stages[1:])}), script)
    assert script.ran == ["projection", "projection", "vision"]


@pytest.mark.parametrize("code", [1, 75, 143])
def test_stage_that_ends_badly_after_its_result_is_complete(run: Run, tmp_path: Path, code: int):
    assert run(script=Script({"vision": [code]}, complete_anyway=("vision",))) == list(STAGES)
    assert states(tmp_path)["vision"] == [("running", 1, None, None), ("complete", 1, "by max_steps", code)]


def test_signal_that_comes_as_a_stage_completes_stops_the_pipeline_after_it(
    pipeline: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    script = Script({"projection": [143]}, complete_anyway=("projection",))

    def call(processes: Processes, command: Sequence[str]) -> int:
        processes.stopped_by = signal.SIGTERM
        return script.call(pipeline, command)

    monkeypatch.setattr(Processes, "call", call)
    with pytest.raises(PipelineHaltedError, match="stopped by SIGTERM before stage 'vision'") as caught:
        run_pipeline(pipeline, Console(file=io.StringIO()))
    assert (caught.value.returncode, script.ran) == (75, ["projection"])
    assert states(tmp_path)["projection"][-1][0] == "complete"


def test_stopped_pipeline_never_ends_with_0(pipeline: PipelineConfig, monkeypatch: pytest.MonkeyPatch):
    def call(processes: Processes, _: Sequence[str]) -> int:
        processes.stopped_by = signal.SIGTERM
        return 0

    monkeypatch.setattr(Processes, "call", call)
    with pytest.raises(PipelineHaltedError, match="was stopped by a signal") as caught:
        run_pipeline(pipeline, Console(file=io.StringIO()))
    assert caught.value.returncode == 75


def test_launcher_that_does_not_wait_is_a_failure(pipeline: PipelineConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Processes, "call", lambda *_: 0)
    with pytest.raises(PipelineHaltedError, match="a launcher has to wait for its processes") as caught:
        run_pipeline(pipeline, Console(file=io.StringIO()))
    assert caught.value.returncode == 1


def test_journal_that_a_kill_has_torn_is_read_and_goes_on(run: Run, tmp_path: Path):
    with pytest.raises(PipelineHaltedError):
        run(script=Script({"vision": [1]}))
    journal = tmp_path / "runs/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    assert run() == ["vision", "language"]
    assert [state for state, *_ in states(tmp_path)["vision"]] == ["running", "running", "complete"]


def test_one_process_runs_a_pipeline(pipeline: PipelineConfig, run: Run):
    directory = Path(pipeline.output_dir)
    directory.mkdir()
    holder = os.fork()
    if holder == 0:  # a lock is no obstacle to the process that holds it
        with run_lock(directory, "other"):
            (directory / "held").touch()
            time.sleep(60)
    try:
        while not (directory / "held").exists():
            time.sleep(0.01)
        with pytest.raises(ConfigError, match="is being written by run other"):
            run()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(pipeline: PipelineConfig, tmp_path: Path) -> Callable[..., PipelineConfig]:
    """Makes a pipeline that measures its stages: the first has no world path, the last no held-out split."""
    held_out = {"data.eval": {"source": "moving_digits", "split": "eval", "samples": 8}}
    for name, values in {"projection": {"model.world.enabled": False, **held_out}, "vision": held_out}.items():
        config = json.loads((tmp_path / f"{name}.yaml").read_text())
        if name == "projection":
            config["trainable"] = {"multi_modal_projector": {}}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
        index = STAGES.index(name)
        stage = pipeline.stages[index].model_copy(update={"overrides": values})
        stages = (*pipeline.stages[:index], stage, *pipeline.stages[index + 1 :])
        pipeline = pipeline.model_copy(update={"stages": stages})

    def make(**fields: Any) -> PipelineConfig:
        return pipeline.model_copy(update={"evaluation": PipelineEvaluation.model_validate_json(json.dumps(fields))})

    return make


def test_unless_they_are_named_all_ablations_that_fit_are_measured(measured: Callable[..., PipelineConfig]):
    first, second, last = plan_stages(measured())
    assert last.evaluation is None
    for plan in (first, second):
        assert plan.evaluation is not None
        assert "--ablation" not in plan.evaluation, "evaluate itself knows which fit"
    named = plan_stages(measured(ablations=["as_trained", "image_blanked"]))[0].evaluation
    assert named is not None
    assert " ".join(named).count("--ablation") == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"ablations": ["as_trained", "world_masked"]},
            "stage 'projection': there is no world path, so there is nothing",
        ),
        (
            {"ablations": ["frames_rollout"], "stages": ["vision"]},
            "stage 'vision': rollouts are read from data.encoded",
        ),
        ({"stages": ["language"]}, "evaluation.stages: stage 'language' has no held-out split to be measured on"),
        ({"stages": ["visoin"]}, "evaluation.stages: no stage is called 'visoin'; did you mean 'vision'?"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(
    run: Run, measured: Callable[..., PipelineConfig], fields: dict[str, Any], said: str
):
    script = Script()
    with pytest.raises(ConfigError) as caught:
        run(measured(**fields), script)
    (problem,) = caught.value.problems
    assert said in str(problem)
    assert not script.ran


def test_stage_is_measured_once_unless_its_checkpoint_or_the_ablations_are_others(
    run: Run, measured: Callable[..., PipelineConfig], tmp_path: Path
):
    first, last = ["projection", "measure projection"], ["vision", "measure vision"]
    assert run(measured()) == [*first, *last, "language"]
    assert run(measured()) == []
    wanted = {"ablations": ["as_trained", "image_blanked"]}
    assert run(measured(**wanted)) == [first[1], last[1]]
    assert run(measured(**wanted)) == run(measured()) == []
    record = json.loads((tmp_path / "runs/projection/evaluation.json").read_text())
    other = record | {"checkpoint": {"manifest_sha256": "another"}}
    (tmp_path / "runs/projection/evaluation.json").write_text(json.dumps(other))
    assert summarise(measured(), plan_stages(measured()))["stages"][0]["ablations"] == {}
    assert run(measured()) == [first[1]]


@pytest.mark.parametrize(
    ("codes", "launches"),
    [([1, 137, 0], 3), ([1, 1, 1], 3), ([2], 1), ([143], 1)],
    ids=["helps", "always", "wrong", "stopped"],
)
def test_measurement_is_retried_if_that_may_help(
    run: Run, measured: Callable[..., PipelineConfig], codes: list[int], launches: int
):
    pipeline = measured(stages=["vision"]).model_copy(update={"on_failure": OnFailure(retry=2)})
    script = Script({"measure vision": [*codes]})
    if codes[-1]:
        with pytest.raises(PipelineHaltedError, match="measuring stage 'vision' ended with exit code") as caught:
            run(pipeline, script)
        assert caught.value.returncode == codes[-1]
    else:
        run(pipeline, script)
    assert script.ran.count("measure vision") == launches
    assert script.ran.count("vision") == 1


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "begins", "ranks"),
    [
        ((), (sys.executable, "-m", "theworld_train", "train"), 1),
        (("theworld-train", "launch", "--nproc", "8"), ("theworld-train", "launch", "--nproc", "8"), 8),
        (("srun", "bin/theworld-train", "launch", "--nproc=8", "--nnodes", "2"), ("srun",), 16),
        (("accelerate", "launch", "--multi_gpu"), ("accelerate", "launch", "--multi_gpu", "-m"), None),
        (("accelerate", "launch", "--num_processes", "4"), ("accelerate",), 4),
    ],
)
def test_launcher_gets_the_training_command(
    pipeline: PipelineConfig, launcher: tuple[str, ...], begins: tuple[str, ...], ranks: int | None
):
    own = pipeline.stages[1].model_copy(update={"launcher": launcher})
    command = plan_stages(pipeline.model_copy(update={"stages": (pipeline.stages[0], own)}))[1].command
    assert command[: len(begins)] == begins
    at = command.index(own.config)
    assert command[:at] == launcher or command[at - 3 : at] == ("-m", "theworld_train", "train")
    assert "init_from=" + str(Path(pipeline.output_dir) / "projection") in command[at:]
    assert ranks_of(launcher) == ranks


def test_gates_reach_the_stage_through_its_command(pipeline: PipelineConfig):
    gate = AdvanceWhen(tokens=500)
    own = pipeline.stages[0].model_copy(update={"advance_when": gate})
    (plan,) = plan_stages(pipeline.model_copy(update={"stages": (own,)}))
    assert plan.config.training.advance_when == gate
    assert "training.advance_when.tokens=500" in plan.command
