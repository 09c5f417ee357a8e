"""A profile takes the steps that training takes, and says where all of their time and memory goes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from theworld_train.cli.profile import _plan
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.plan.calibration import predict_step
from theworld_train.profiling import directory as written
from theworld_train.profiling.steps import Schedule

#: One step to warm up, two against the clock, two under the profiler, one followed.
SCHEDULE = Schedule(warmup=1, steps=2)
STEPS = len(SCHEDULE.ways)
COMPONENTS = [component.value for component in Component]
#: What trains everything, in two micro-batches whose layers run again.
FULL = {
    "precision": "bf16",
    "training__gradient_checkpointing": "full",
    "training__loss_chunk_size": 1,
    "training__micro_batch_size": 1,
}


@dataclass(frozen=True)
class Profiled:
    """A profile on disk.

    Attributes:
        config: Of the run.
        directory: Of the profile.
    """

    config: RunConfig
    directory: Path

    @property
    def report(self) -> dict[str, Any]:
        """What `report.json` holds."""
        return json.loads((self.directory / "report.json").read_text())

    def kinds(self, part: str) -> set[str]:
        """Returns the passes in which a part has taken time."""
        return {kind for kind, seconds in self.report["time"]["parts"].get(part, {}).items() if seconds}


@pytest.fixture(scope="module")
def profiled(
    quickstart_stage: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Profiled]:
    """Profiles a stage of the quickstart, once."""
    known: dict[str, Profiled] = {}

    def run(stage: str) -> Profiled:
        if stage not in known:
            directory = tmp_path_factory.mktemp(stage)
            config = stage_config(quickstart_stage, stage, directory / "run")
            (directory / "profile").mkdir()
            written.profile_run(config, SCHEDULE, directory / "profile", _plan)
            known[stage] = Profiled(config, directory / "profile")
        return known[stage]

    return run


def stage_config(load: Callable[..., RunConfig], stage: str, directory: Path) -> RunConfig:
    short = {
        "schedule__warmup_steps": 2,
        "training__max_steps": STEPS,
        "training__global_batch_size": 2,
        "training__micro_batch_size": 2,
        "data__eval": None,
    }
    return load(stage, directory, **short | (FULL if stage == "full" else {}))


both = pytest.mark.parametrize("stage", ["projection", "full"])


@both
def test_losses_are_those_of_training_bit_for_bit(stage: str, profiled, finish, quickstart_stage, tmp_path: Path):
    run = finish(stage_config(quickstart_stage, stage, tmp_path / "run"))
    losses = profiled(stage).report["losses"]
    assert [row["loss_hex"] for row in losses] == [row["loss_hex"] for row in run.train]
    assert [row["how"] for row in losses] == ["warm-up", "timed", "timed", "traced", "traced", "followed"]


@both
def test_the_run_itself_is_not_touched(stage: str, profiled):
    assert not Path(profiled(stage).config.output_dir).exists()


@both
def test_the_parts_of_a_step_add_up_to_it(stage: str, profiled):
    time = profiled(stage).report["time"]
    parts = {part: sum(passes.values()) for part, passes in time["parts"].items()}
    assert sum(parts.values()) == pytest.approx(time["seconds"], rel=1e-6)
    assert parts["other"] < 0.4 * time["seconds"]
    assert {*COMPONENTS, "sequence", "loss", "optimizer", "data", "other"} == set(parts)


@both
def test_the_traced_step_is_the_step(stage: str, profiled):
    """What the clock says of the same steps, whose median it is, agrees with their mean in the trace."""
    report = profiled(stage).report
    assert report["time"]["seconds"] == pytest.approx(report["step"]["traced_seconds"], rel=0.5)


def test_only_what_lies_on_the_gradients_path_has_a_backward_pass(profiled):
    projection = profiled("projection")
    assert {part for part in COMPONENTS if "backward" in projection.kinds(part)} == {
        "world_projector",
        "language_model",
    }
    assert not [part for part in COMPONENTS if "recompute" in projection.kinds(part)]


def test_what_runs_again_is_no_backward_pass(profiled):
    full = profiled("full")
    assert all({"forward", "backward"} <= full.kinds(part) for part in COMPONENTS)
    recomputed = {"vision_tower", "language_model", "world_encoder"}
    assert {part for part in COMPONENTS if "recompute" in full.kinds(part)} == recomputed
    assert "recompute" in full.kinds("loss")  # its chunks
    again = full.report["time"]["parts"]
    assert all(again[part]["recompute"] > 0 for part in recomputed)


@both
def test_traces_name_the_components(stage: str, profiled):
    directory = profiled(stage).directory
    (board,) = (directory / "tensorboard").glob("*.pt.trace.json.gz")
    assert board.read_bytes() == (directory / "trace.json.gz").read_bytes()
    events = json.loads(gzip.decompress(board.read_bytes()))["traceEvents"]
    names = {event.get("name") for event in events}
    ranges = (*COMPONENTS, "step", "data", "sequence", "loss", "backward", "optimizer")
    assert {f"theworld/{part}" for part in ranges} <= names
    assert sum(event.get("name") == "theworld/step" and event.get("ph") == "X" for event in events) == SCHEDULE.steps


@both
def test_memory_stands_beside_its_plan(stage: str, profiled):
    profile = profiled(stage)
    memory = profile.report["memory"]
    measured, planned = memory["measured"], memory["planned"]
    timeline = json.loads((profile.directory / "memory.json").read_text())
    assert measured["bytes"] == max(timeline["total"]) == sum(measured["by_category"].values())
    place = timeline["peak"]["event"]
    assert {name: row[place] for name, row in timeline["by_category"].items()} == measured["by_category"]
    expected, work = predict_step(profile.config, **memory["shape"], device="cpu")
    assert planned["by_category"] == expected.by_category()
    assert profile.report["parameters"]["step_flops"] == work.flops
    # Weights, masters and state are what they are; samples without a world block leave some activations out.
    for name in ("weights", "masters", "optimizer"):
        assert measured["by_category"][name] == planned["by_category"][name]
    if stage == "projection":
        assert measured["bytes"] == pytest.approx(planned["bytes"], rel=0.01)


def test_efficiency_counts_what_trains(profiled):
    report = profiled("projection").report
    values = report["parameters"]
    assert values["trainable"] == 12_000
    assert values["trainable_share"] == 12_000 / values["total"]
    assert values["updated_per_second"] == 12_000 / report["step"]["seconds"]
    assert 0 < values["weight_gradient_share"] < 0.05
    assert profiled("full").report["parameters"]["weight_gradient_share"] > 0.15


def test_a_run_that_is_too_short_is_refused_before_its_model_loads(
    quickstart_stage: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("theworld_train.assemble.steps.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    config = quickstart_stage("projection", tmp_path / "run", training__max_steps=5, schedule__warmup_steps=1)
    with pytest.raises(ConfigError, match=r"training\.max_steps: the run has 5 steps, and the profile takes 6"):
        written.profile_run(config, SCHEDULE, tmp_path, _plan)
