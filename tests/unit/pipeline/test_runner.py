"""A pipeline goes on where it was, and never shows stages together that do not come from one another."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from theworld_train.checkpoint_files import FORMAT, Origin, newest_checkpoint, origin_of
from theworld_train.config import dump_config
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import PipelineConfig
from theworld_train.pipeline import runner
from theworld_train.pipeline.runner import plan_stages, run_pipeline

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


@pytest.fixture
def run(pipeline: PipelineConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a pipeline whose stages leave a checkpoint and a result; returns the names of those that ran."""

    def go(pipeline: PipelineConfig = pipeline) -> list[str]:
        ran: list[str] = []

        def train(stage: str, _: Sequence[str]) -> None:
            ran.append(stage)
            plan = next(plan for plan in plan_stages(pipeline) if plan.config.name == stage)
            source = newest_checkpoint(Path(plan.config.init_from)) if plan.config.init_from else None
            if newest_checkpoint(plan.directory) is None:
                write_stage(plan.directory, origin_of(source) if source else None)
            (plan.directory / "config.yaml").write_text(dump_config(plan.config))
            (plan.directory / "result.json").write_text(json.dumps({"steps": 4}))

        monkeypatch.setattr(runner, "_call", train)
        run_pipeline(pipeline, Console(file=io.StringIO()))
        return ran

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
    def go_on(stage: str, _: Sequence[str]) -> None:
        assert stage == "projection"
        write_stage(runs / stage, step=8)
        (runs / stage / "result.json").write_text("{}")

    (runs / "projection" / "result.json").unlink()
    monkeypatch.setattr(runner, "_call", go_on)
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
