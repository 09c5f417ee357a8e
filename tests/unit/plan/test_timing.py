"""The time of a run: the config's sizes reach the closed formulas."""

from __future__ import annotations

from pathlib import Path

import pytest

from theworld_train.accounting.gpus import gpu_spec
from theworld_train.config import load_run_config
from theworld_train.plan.advice import Planner
from theworld_train.plan.dry_run import DryRun, PlannedParameter, SampleShape
from theworld_train.plan.timing import PlannedTime, plan_time

STAGES = Path(__file__).parents[3] / "configs" / "stages"
GPU = gpu_spec("h100-80gb")
#: One unit of a billion parameters that train, and a frozen encoder that no engine wraps.
PARAMETERS = (
    PlannedParameter("layer", "language_model", (1000, 1_000_000), 4, trains=True, unit="layer"),
    PlannedParameter("tower", "vision_tower", (1000, 1_000_000), 2, trains=False, unit=None),
)


def planned(stage: str, strategy: str = "ddp", ranks: int = 1, **overrides: object) -> PlannedTime:
    config = load_run_config(STAGES / f"{stage}.yaml", {"expect_trainable": None, **overrides})
    dry = DryRun(
        trace=None,
        device="cuda",
        shape=SampleShape(positions=8192, supervised=3000),
        micro_batch_size=1,
        steps=2,
        compute_size=2,
        optimizer="adamw",
        parameters=PARAMETERS,
    )
    return plan_time(config, dry, Planner(config).setting(strategy, ranks), GPU)


def test_stages_cost_what_they_train():
    seconds = [planned(stage).step.seconds.expected for stage in ("projection", "vision", "language")]
    assert seconds == sorted(seconds)
    assert seconds[2] > 1.1 * seconds[0]


def test_times_are_worst_expected_and_best():
    step = planned("projection").step
    assert step.seconds.worst > step.seconds.expected > step.seconds.best > 0
    assert 0 < step.mfu.worst < step.mfu.expected < step.mfu.best < 1


def test_recomputation_costs_time():
    plain = planned("projection", **{"training.gradient_checkpointing": "none"})
    assert planned("projection").step.seconds.expected > 1.2 * plain.step.seconds.expected


def test_encoder_whose_work_is_read_costs_nothing(tmp_path: Path):
    key = {"data.encoded": str(tmp_path)}
    whole = planned("projection").step
    assert planned("projection", **key).step == whole, "an empty directory saves nothing"
    for name in ("world_encoder-key", "vision_tower-key"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "entries.safetensors").touch()
    read = planned("projection", **key).step
    assert read.phases.get("encode", 0.0) == 0.0
    assert read.seconds.expected == pytest.approx(whole.seconds.expected - whole.phases["encode"], rel=1e-6)
    full = planned("full", **key).step
    assert full == planned("full").step, "what trains is never read"


def test_ranks_share_the_global_batch_and_exchange():
    alone, eight = planned("projection"), planned("projection", ranks=8)
    assert alone.step.communication == 0
    assert eight.step.communication > 0
    assert eight.step.computation["matmul"] == pytest.approx(alone.step.computation["matmul"] / 8, rel=1e-3)


def test_what_is_exchanged_is_what_an_engine_wraps():
    gradients = 4 * 10**9
    config_bytes = planned("projection", "ddp", 8).step.communication
    # A ring sends and receives 7/8 of the gradients twice.
    assert config_bytes > 2 * 7 / 8 * gradients / (GPU.link_gb_per_s * 1e9)
    assert config_bytes < 4 * gradients / (GPU.link_gb_per_s * 1e9)


def test_the_run_has_the_steps_of_the_config():
    run = planned("projection", **{"training.max_steps": 100, "training.epochs": None}).run
    assert run is not None
    assert run.steps == 100
    assert planned("projection", **{"training.max_steps": None, "training.epochs": 1.0}).run is None
