"""Protects what `runtime.strategy: auto` takes: the first strategy that fits, or a refusal that says what would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers.planned import run_config
from theworld_train.config import ConfigError
from theworld_train.plan.advice import GIB, Planner
from theworld_train.plan.choice import first_that_fits, gpu_of_memory, why_not

ORDER = ("ddp", "zero1", "zero2", "fsdp2", "zero3")
#: GiB that one sample takes under each.
NEEDS = {"ddp": 50, "zero1": 40, "zero2": 30, "fsdp2": 10, "zero3": 12}
RANKS = 8


@pytest.fixture(autouse=True)
def needs(monkeypatch: pytest.MonkeyPatch):
    """Lets every setting need what the table says, in the place of a dry run."""

    def need(_planner: Planner, setting: Any) -> SimpleNamespace:
        size = NEEDS[setting.strategy.name] * setting.micro_batch_size * GIB
        return SimpleNamespace(setting=setting, usual=size, least=size, reserved=size, overhead=0)

    monkeypatch.setattr(Planner, "need", need)


@pytest.mark.parametrize(
    ("strategies", "memory", "expected"),
    [
        (ORDER, 80, "ddp"),
        (ORDER, 51, "zero1"),  # ddp fits, but tightly
        (ORDER, 35, "zero2"),
        (ORDER, 13, "fsdp2"),
        (("zero3", "fsdp2"), 13, "zero3"),
        (("fsdp2", "zero3"), 80, "fsdp2"),
    ],
)
def test_the_first_that_fits_is_taken(strategies: tuple[Any, ...], memory: int, expected: str):
    assert first_that_fits(run_config(batch=1, global_batch=8), strategies, RANKS, memory * GIB) == expected


def test_none_that_fits_is_refused_with_what_would():
    with pytest.raises(ConfigError) as refusal:
        first_that_fits(run_config(batch=4, global_batch=32), ORDER, RANKS, 11 * GIB)
    (problem,) = refusal.value.problems
    assert (problem.key, problem.value) == ("runtime.strategy", "auto")
    assert problem.message == "none of ddp, zero1, zero2, fsdp2, zero3 fits 8 GPUs of 11.0 GiB with room to spare"
    assert problem.hint == "set training.micro_batch_size=1 runtime.strategy=fsdp2 runtime.offload=none"
    with pytest.raises(ConfigError, match="no change that a plan knows makes it fit"):
        first_that_fits(run_config(batch=1, global_batch=8), ORDER, RANKS, GIB)


@pytest.mark.parametrize(
    ("strategies", "memory", "reason"),
    [
        (ORDER, 80, None),
        (ORDER, 11, None),
        (("ddp",), 51, None),  # tightly, but it may
        (ORDER, 9, "it takes 10.00 GiB at least, and the GPU has 9.00 (fsdp2 on 8, micro-batch 1)"),
        (("ddp",), 49, "it takes 50.00 GiB at least, and the GPU has 49.00 (ddp on 8, micro-batch 1)"),
    ],
)
def test_what_cannot_fit_is_told_apart_from_what_may(strategies: tuple[Any, ...], memory: int, reason: str | None):
    found = why_not(run_config(batch=1, global_batch=8), strategies, RANKS, gpu_of_memory(memory * GIB))
    assert found == (None if reason is None else f"the plan says that {reason}")
