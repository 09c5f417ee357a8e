"""Protects the plan of memory: against published measurements, real steps, a real engine, and itself at other sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.planned import EVERYTHING, architecture, real_model, run_config
from tests.helpers.sharded import fsdp2_peak
from theworld_train.assemble.model import ledger_of
from theworld_train.config import load_run_config, parse_run_config
from theworld_train.plan.advice import Planner
from theworld_train.plan.dry_run import dry_run, sample_shape, synthetic_batch, trace_steps
from theworld_train.plan.strategies import STRATEGIES, rank_timeline
from theworld_train.train import recompute
from theworld_train.train.ledger import add_adapters, build_ledger

CONFIGS = Path(__file__).parents[2] / "configs"
GIB = 2**30

PROJECTION = ("world_projector",)
LANGUAGE = ("world_projector", "language_model")


@pytest.mark.parametrize(("checkpointing", "most"), [("full", 13), ("none", 37)])
def test_the_published_workload_takes_a_seventh_of_its_memory(checkpointing: str, most: float):
    override = f"training.gradient_checkpointing={checkpointing}"
    config = load_run_config(CONFIGS / "reference" / "fast-projection.yaml", [override])
    assert dry_run(config, supervised=300, steps=1).timeline().peak().total < most * GIB


@pytest.mark.parametrize(("name", "published"), [("published-projection", 89.92), ("published-gemma-only", 47.18)])
def test_published_measurements_are_planned_from_their_configs(name: str, published: float):
    run = dry_run(load_run_config(CONFIGS / "reference" / f"{name}.yaml"))
    peak = run.timeline().peak(1)
    assert peak.total / GIB == pytest.approx(published, rel=0.02)
    assert peak.phase == "backward"


def test_the_published_logits_are_four_buffers():
    """37.7 GiB of the 89.92: fp32 logits, and three more of their size while the loss is differentiated."""
    run = dry_run(load_run_config(CONFIGS / "reference" / "published-projection.yaml"), steps=1)
    logits = 2 * 4823 * 262_208 * 4
    assert run.timeline().peak(0).by_component()["loss"] == pytest.approx(4 * logits, rel=0.001)


@pytest.mark.parametrize("trainable", [PROJECTION, LANGUAGE, EVERYTHING], ids=len)
@pytest.mark.parametrize(
    ("checkpointing", "batching"),
    [("none", "padded"), ("full", "padded"), ("selective", "padded"), ("full", "packed")],
)
def test_a_real_step_takes_what_was_planned(trainable: tuple[str, ...], checkpointing: str, batching: str):
    config = run_config(trainable, gradient_checkpointing=checkpointing, batching=batching)
    model = architecture()
    planned = dry_run(config, device="cpu", architecture=model)
    shape = sample_shape(config, model)
    assert shape.images > 1 if batching == "packed" else shape.images == 1
    batch = synthetic_batch(model, shape, 2)
    real = trace_steps(config, real_model(model), (batch,), shape, steps=2, device="cpu")
    for step in (0, 1):
        first, second = planned.timeline().peak(step), real.timeline().peak(step)
        assert first.total == pytest.approx(second.total, rel=0.01)
        assert first.by_category() == pytest.approx(second.by_category(), rel=0.02, abs=4096)
        assert (first.phase, first.op, first.module) == (second.phase, second.op, second.module)


def test_what_is_kept_is_less_the_more_is_computed_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(recompute, "SMALLEST_MOVED", 0)
    cases = {
        "all": {"gradient_checkpointing": "none"},
        "products": {"gradient_checkpointing": "selective"},
        "borders": {"gradient_checkpointing": "full"},
        "nothing": {"gradient_checkpointing": "full", "activation_offload": True},
    }
    kept = {}
    for name, training in cases.items():
        config = run_config(PROJECTION, length=512, **training)
        # Among so few layers, one that computes less would move the peak away from what the others keep.
        whole = config.model.model_copy(update={"last_layers": "whole"})
        run = dry_run(config.model_copy(update={"model": whole}), architecture=architecture())
        kept[name] = run.timeline().peak(1).by_category()["activations"]
    assert kept["nothing"] < 0.9 * kept["borders"] < kept["borders"] < 0.9 * kept["products"]
    assert kept["products"] < 0.9 * kept["all"]


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_a_step_of_an_adapter_takes_what_was_planned(name: str):
    stated = run_config(LANGUAGE).model_dump(mode="json")
    stated |= {"trainable": {"language_model": {"adapter": "lora"}, "world_projector": {}}, "optimizer": {"name": name}}
    config, model = parse_run_config(stated), architecture()
    planned = dry_run(config, device="cpu", architecture=model)
    shape = sample_shape(config, model)
    adapted = real_model(model)
    add_adapters(adapted, config)
    real = trace_steps(config, adapted, (synthetic_batch(model, shape, 2),), shape, steps=2, device="cpu")
    first, second = planned.timeline().peak(1), real.timeline().peak(1)
    assert first.total == pytest.approx(second.total, rel=0.01)
    assert first.by_category() == pytest.approx(second.by_category(), rel=0.02, abs=4096)
    ledger = build_ledger(adapted, config)
    assert second.by_category()["optimizer"] == pytest.approx(sum(row.optimizer_bytes for row in ledger.rows), rel=0.02)


def test_the_plan_holds_what_the_ledger_counts():
    config = load_run_config(CONFIGS / "stages" / "vision.yaml")
    ledger = ledger_of(config)
    run = dry_run(config, device="cpu", positions=4500, supervised=16)
    made = [event.allocation for event in run.trace.events if event.is_birth]
    weights = sum(a.size for a in made if a.category == "weights" and a.phase == "load" and a.parameter)
    assert weights == sum(row.weight_bytes for row in ledger.rows)
    held = run.timeline().peak(1).by_category()
    assert held["masters"] == sum(row.master_bytes for row in ledger.rows)
    assert held["optimizer"] == sum(row.optimizer_bytes for row in ledger.rows)


def test_the_optimizer_of_a_gpu_makes_nothing_as_large_as_weights():
    run = dry_run(run_config(LANGUAGE), architecture=architecture())
    update = [event for event in run.trace.events if event.step == 1 and event.phase == "optimizer" and event.is_birth]
    assert sum(event.allocation.size for event in update) < 0.01 * sum(4 * p.numel for p in run.parameters if p.trains)


@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_precision_decides_what_is_held_for_a_weight(precision: str):
    config = run_config(LANGUAGE).model_copy(update={"precision": precision})
    run = dry_run(config, device="cpu", architecture=architecture())
    size = 4 if precision == "bf16" else 2
    trained = size * sum(parameter.numel for parameter in run.parameters if parameter.trains)
    held = run.timeline().peak(1).by_category()
    assert held["masters"] == (trained if precision == "bf16" else 0)
    assert held["optimizer"] == pytest.approx(2 * trained, rel=0.01)


def test_gradients_of_earlier_micro_batches_are_counted():
    config, model = run_config(LANGUAGE, batch=1, global_batch=2), architecture()
    shape = sample_shape(config, model)
    batch = synthetic_batch(model, shape, 1)
    real = trace_steps(config, real_model(model), (batch, batch), shape, steps=2, device="cpu")
    run = dry_run(config, device="cpu", architecture=model, micro_batch_size=1)
    accumulated = rank_timeline(run, STRATEGIES["ddp"], 1, accumulates=True)
    assert accumulated.peak(1).total == pytest.approx(real.timeline().peak(1).total, rel=0.01)
    assert accumulated.phase_peaks(1)["forward"] > 1.05 * run.timeline().phase_peaks(1)["forward"]


@pytest.mark.parametrize("ranks", [8, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 64))])
@pytest.mark.parametrize("trainable", [PROJECTION, EVERYTHING], ids=len)
def test_sharding_agrees_with_a_rank_of_fsdp2(trainable: tuple[str, ...], ranks: int):
    # Wide enough for weights, gathered layers and buffers to be what counts.
    model = architecture(hidden_size=512, intermediate_size=2048, vocab_size=4096, head_dim=128)
    config = run_config(trainable)
    run = dry_run(config, architecture=model, gathering="computed")
    planned = rank_timeline(run, STRATEGIES["fsdp2"], ranks).peak(1)
    assert planned.total == pytest.approx(fsdp2_peak(config, model, ranks, "cuda").total, rel=0.03)


@pytest.mark.slow
def test_the_peak_of_many_samples_follows_from_one_and_two():
    """With few samples the loss is the peak, with many the recomputation of a layer: the line bends in between."""
    planner = Planner(load_run_config(CONFIGS / "stages" / "projection.yaml"))
    setting = planner.setting("ddp", 1)
    lines = planner.lines(setting)
    for size in (4, 8):
        peak = planner.need(replace(setting, micro_batch_size=size)).peak.total
        assert max(base + (size - 1) * more for base, more in lines) == pytest.approx(peak, rel=0.01)
