"""Protects the arithmetic of strategies: what is shared, what is whole, and names that are not known."""

from __future__ import annotations

import pytest

from tests.helpers.planned import EVERYTHING, architecture, run_config
from theworld_train.config.errors import ConfigError
from theworld_train.plan.dry_run import DryRun, dry_run
from theworld_train.plan.strategies import STRATEGIES, load_peak, offload_of, rank_timeline, strategy_of


@pytest.fixture(scope="module")
def single() -> DryRun:
    return dry_run(run_config(), architecture=architecture())


@pytest.fixture(scope="module")
def gathered() -> DryRun:
    return dry_run(run_config(), architecture=architecture(), gathering="computed")


@pytest.fixture(scope="module")
def vision() -> DryRun:
    return dry_run(run_config(EVERYTHING[:1]), architecture=architecture(), gathering="computed")


def held(run: DryRun, name: str, ranks: int, category: str, offload: str = "none") -> int:
    """Returns the bytes of a category before the last step does anything."""
    timeline = rank_timeline(run, STRATEGIES[name], ranks, offload)
    start = next(index for index, event in enumerate(run.trace.events) if event.step == 1)
    return sum(s.size for s in timeline.held if s.category == category and s.start < start < s.end)


def trained(run: DryRun) -> int:
    return sum(parameter.numel for parameter in run.parameters if parameter.trains)


def test_a_single_process_is_the_trace_itself(single: DryRun):
    assert rank_timeline(single, STRATEGIES["ddp"], 1).peak(1) == single.timeline().peak(1)


def test_kernels_of_liger_are_planned_as_those_that_they_stand_for(single: DryRun):
    config = run_config(loss="liger")
    config = config.model_copy(update={"model": config.model.model_copy(update={"kernels": "liger"})})
    run = dry_run(config, architecture=architecture())
    assert run.timeline().peak(1) == single.timeline().peak(1)


def test_ddp_keeps_buckets_of_every_gradient(single: DryRun):
    assert held(single, "ddp", 4, "gradients") == 4 * trained(single)
    assert held(single, "ddp", 4, "optimizer") == pytest.approx(8 * trained(single), rel=0.01)


@pytest.mark.parametrize(("name", "gradients"), [("zero1", 1), ("zero2", 0)])
def test_zero_shares_the_state(single: DryRun, name: str, gradients: int):
    assert held(single, name, 4, "optimizer") == pytest.approx(2 * trained(single), rel=0.01)
    assert held(single, name, 4, "gradients") == gradients * 4 * trained(single)
    assert held(single, name, 4, "optimizer", "optimizer") == 0


def test_zero2_keeps_a_share_of_the_gradients_until_the_update(single: DryRun):
    sizes = [s.size for s in rank_timeline(single, STRATEGIES["zero2"], 4).held if s.category == "gradients"]
    assert sum(sizes) == pytest.approx(2 * trained(single), rel=0.01)  # a quarter of 4 bytes, in each of two steps


@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_sharding_shares_weights_too(gathered: DryRun, name: str):
    assert held(gathered, name, 4, "masters") == pytest.approx(trained(gathered), rel=0.05)
    assert held(gathered, name, 4, "optimizer") == pytest.approx(2 * trained(gathered), rel=0.05)
    assert held(gathered, name, 4, "masters", "all") == held(gathered, name, 4, "optimizer", "all") == 0


def test_computing_in_fp32_gathers_fp32():
    config = run_config().model_copy(update={"precision": "fp32"})
    run = dry_run(config, architecture=architecture(), gathering="computed")
    layer = next(parameter for parameter in run.parameters if parameter.unit)
    sizes = {s.size for s in rank_timeline(run, STRATEGIES["fsdp2"], 4).held if s.category == "weights"}
    assert 4 * layer.numel in sizes


def test_frozen_encoders_outside_of_the_engine_stay_whole(vision: DryRun):
    outside = sum(p.numel * p.itemsize for p in vision.parameters if p.unit is None)
    assert outside
    assert held(vision, "fsdp2", 64, "weights") >= outside


def test_zero3_gathers_what_is_stored_and_keeps_layers():
    run = dry_run(run_config(), architecture=architecture(), gathering="stored", steps=1)
    layers = sum(p.numel * p.itemsize for p in run.parameters if p.unit)
    whole = [s for s in rank_timeline(run, STRATEGIES["zero3"], 4).held if s.category == "weights"]
    assert layers in {s.size for s in whole}, "so few elements are all kept"
    layer = max((p for p in run.parameters if p.unit), key=lambda p: p.numel)
    assert 4 * layer.numel in {s.size for s in whole}


def test_a_model_is_on_its_gpu_whole_before_it_is_sharded(gathered: DryRun, vision: DryRun):
    stored = sum(p.numel * p.itemsize for p in gathered.parameters)
    assert load_peak(gathered, STRATEGIES["ddp"], 4).total == stored
    assert load_peak(gathered, STRATEGIES["fsdp2"], 4).total == pytest.approx(1.25 * stored, rel=0.05)
    wrapped = sum(p.numel * p.itemsize for p in vision.parameters if p.unit is not None)
    whole = sum(p.numel * p.itemsize for p in vision.parameters)
    assert load_peak(vision, STRATEGIES["fsdp2"], 2).total == pytest.approx(whole + wrapped / 2, rel=0.05)


def test_more_ranks_never_take_more(gathered: DryRun):
    peaks = [rank_timeline(gathered, STRATEGIES["fsdp2"], ranks).peak(1).total for ranks in (2, 4, 16, 64)]
    assert peaks == sorted(peaks, reverse=True)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'fsdp2'"):
        strategy_of("fdsp2")
    with pytest.raises(ConfigError, match="did you mean 'optimizer'"):
        offload_of("optimiser")
