"""Protects the advice: verdicts, the largest micro-batch, and changes in the order of what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from tests.helpers.planned import EVERYTHING, architecture, run_config
from theworld_train.accounting.gpus import GpuSpec, gpu_specs
from theworld_train.plan import advice
from theworld_train.plan.advice import CONTEXT_BYTES, GIB, Planner, judge
from theworld_train.plan.dry_run import dry_run

MODEL = architecture(hidden_size=256, intermediate_size=1024, vocab_size=4096, head_dim=64, num_hidden_layers=1)


def gpu(usable: float) -> GpuSpec:
    """Returns a GPU with so many bytes."""
    return replace(gpu_specs()[0], name="test", title="test", usable_gib=usable / GIB)


@pytest.fixture
def planner(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Planner]:
    """Makes planners of small runs, with the model of this file."""
    monkeypatch.setattr(advice, "dry_run", partial(dry_run, architecture=MODEL))

    def make(*args: Any, **kwargs: Any) -> Planner:
        return Planner(run_config(*args, **kwargs))

    return make


def test_verdicts_follow_the_margin(planner: Callable[..., Planner]):
    plans = planner()
    need = plans.need(plans.setting("ddp", 1))
    assert need.overhead == CONTEXT_BYTES
    assert need.reserved >= need.peak.total
    assert judge(need, gpu(need.usual * 1.04)).word == "fits"
    assert judge(need, gpu(need.usual * 1.001)).word == "tight"
    assert judge(need, gpu(need.least)).word == "tight"
    verdict = judge(need, gpu(need.least - 4096))
    assert verdict.word == "does not fit"
    assert verdict.margin == pytest.approx(-4096, abs=2)


def test_several_ranks_pay_for_collectives(planner: Callable[..., Planner]):
    plans = planner(global_batch=8)
    assert plans.need(plans.setting("ddp", 2)).overhead > CONTEXT_BYTES


def test_the_largest_micro_batch_fits_and_five_times_as_many_do_not(planner: Callable[..., Planner]):
    plans = planner(("world_projector",), batch=1, global_batch=64, length=512, gradient_checkpointing="none")
    setting = plans.setting("ddp", 1)
    largest = plans.largest_micro_batch(setting, gpu(GIB))
    assert 2 < largest < 64
    assert plans.need(replace(setting, micro_batch_size=largest)).least <= GIB
    assert plans.need(replace(setting, micro_batch_size=5 * largest)).usual > GIB
    assert plans.largest_micro_batch(setting, gpu(20 * GIB)) == 64
    # Room for what two samples keep alive is not enough: the allocator wastes some.
    need, two = plans.need(setting), max(base + more for base, more in plans.lines(setting))
    assert need.reserved > 1.05 * need.peak.total
    assert plans.largest_micro_batch(setting, gpu(need.overhead + 1.02 * two)) == 1
    assert plans.largest_micro_batch(plans.setting("ddp", 1), gpu(CONTEXT_BYTES)) == 0


def test_hybrid_shards_within_a_machine(planner: Callable[..., Planner], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(advice, "MACHINE_RANKS", 2)
    whole, hybrid = planner(EVERYTHING, global_batch=64), planner(EVERYTHING, global_batch=64)
    runtime = hybrid.config.runtime.model_copy(update={"strategy": "fsdp2", "hybrid": True})
    hybrid.config = hybrid.config.model_copy(update={"runtime": runtime})
    peaks = [plans.need(plans.setting("fsdp2", 4)).peak.total for plans in (whole, hybrid)]
    assert peaks[0] < peaks[1] == whole.need(whole.setting("fsdp2", 2)).peak.total
    ddp = [plans.need(plans.setting("ddp", 4)).peak.total for plans in (whole, hybrid)]
    assert ddp[0] == ddp[1]


def test_a_micro_batch_is_no_larger_than_a_ranks_share(planner: Callable[..., Planner]):
    assert planner(batch=4, global_batch=8).setting("ddp", 8).micro_batch_size == 1


def test_the_cheapest_change_comes_first(planner: Callable[..., Planner]):
    plans = planner(("world_projector",), batch=8, length=512, gradient_checkpointing="none")
    setting = plans.setting("ddp", 1)
    priced = (plans.price(option, setting, gpu(GIB)) for option in plans.options(setting))
    changes = {str(change): change.verdict.need.least for change in priced}
    names = list(changes)
    one = "training.micro_batch_size=1"
    assert names[:3] == [one, *(f'{one} training.gradient_checkpointing="{mode}"' for mode in ("selective", "full"))]
    assert changes[names[2]] < changes[names[1]] < changes[names[0]] < plans.need(setting).least
    found = plans.assess(setting, gpu(plans.need(setting).least - 1))
    assert str(found.change) == names[0]
    assert found.change.verdict.word == "fits"
    assert found.least is None


def test_what_training_refuses_is_not_advised(planner: Callable[..., Planner]):
    plans = planner(("world_projector",), batch=8, gradient_checkpointing="none")
    options = list(plans.options(plans.setting("zero3", 2)))
    modes = {(option.strategy, dict(option.overrides).get("training.gradient_checkpointing")) for option in options}
    assert ("fsdp2", "selective") in modes
    assert ("zero3", "full") in modes
    assert ("zero3", "selective") not in modes


def test_advice_keeps_to_strategies_that_the_config_can_run(planner: Callable[..., Planner]):
    plans = planner(("world_projector",), batch=1, gradient_checkpointing="none")
    sections = {"runtime": {"strategy": "fsdp2", "hybrid": True}, "optimizer": {"name": "adamw_8bit"}}
    for name, values in sections.items():
        section = getattr(plans.config, name).model_copy(update=values)
        limited = Planner(plans.config.model_copy(update={name: section}))
        found = {option.strategy for option in limited.options(limited.setting("fsdp2", 2))}
        assert found == ({"fsdp2"} if name == "runtime" else {"ddp"})


def test_few_dry_runs_tell(planner: Callable[..., Planner], monkeypatch: pytest.MonkeyPatch):
    """A dry run of the 4B model takes seconds: none is made whose answer is known."""
    made: list[tuple[int, int]] = []
    counted = advice.dry_run

    def count(config: Any, **kwargs: Any) -> Any:
        made.append((kwargs["micro_batch_size"], kwargs["steps"]))
        return counted(config, **kwargs)

    monkeypatch.setattr(advice, "dry_run", count)
    plans = planner(batch=1, global_batch=8)
    setting = plans.setting("ddp", 1)
    plans.assess(setting, gpu(20 * GIB))
    assert made == [(1, 2), (2, 1)], "two steps, and the first one of two samples for the largest micro-batch"
    made.clear()
    plans.assess(setting, gpu(plans.need(setting).least + 4096))
    assert made == [], "all is known: it is tight, no larger micro-batch fits, and there is nothing to change"
    whole = planner(batch=8)
    whole.assess(whole.setting("ddp", 1), gpu(20 * GIB))
    assert made == [(8, 2)], "the micro-batch cannot be larger than the global one"


def test_sharding_is_advised_where_there_are_several_gpus(planner: Callable[..., Planner]):
    plans = planner(EVERYTHING, batch=1, global_batch=8, length=40)
    setting = plans.setting("ddp", 8)
    shared = plans.need(plans.setting("fsdp2", 8))
    found = plans.assess(setting, gpu(1.05 * shared.usual))
    assert str(found.change) == "--strategy fsdp2"


def test_the_least_is_named_where_nothing_fits(planner: Callable[..., Planner]):
    plans = planner(batch=2)
    setting = plans.setting("ddp", 1)
    found = plans.assess(setting, gpu(1000))
    assert found.verdict.word == "does not fit"
    assert found.change is None
    assert found.least is not None
    assert found.largest_micro_batch == 0
    assert found.least.verdict.need.usual <= min(
        plans.price(option, setting, gpu(1000)).verdict.need.usual for option in plans.options(setting)
    )
