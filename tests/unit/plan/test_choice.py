"""Protects what `runtime.strategy: auto` takes: the first strategy that fits, or a refusal that says what would."""

from __future__ import annotations

from functools import partial

import pytest

from tests.helpers.planned import architecture, run_config
from theworld_train.config import ConfigError
from theworld_train.plan import advice
from theworld_train.plan.advice import TIGHT_SHARE, Planner
from theworld_train.plan.choice import first_that_fits
from theworld_train.plan.dry_run import dry_run

MODEL = architecture(hidden_size=256, intermediate_size=1024, vocab_size=4096, head_dim=64, num_hidden_layers=1)
ORDER = ("ddp", "zero1", "zero2", "fsdp2", "zero3")
RANKS = 8


@pytest.fixture(autouse=True)
def small_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(advice, "dry_run", partial(dry_run, architecture=MODEL))


def enough_for(bytes_needed: int) -> int:
    """Returns the memory that so many bytes fit into, with the share that has to stay free."""
    return int(bytes_needed / (1 - TIGHT_SHARE)) + 4096


def test_the_first_that_fits_is_taken():
    config = run_config(global_batch=16)
    planner = Planner(config)
    needs = {name: planner.need(planner.setting(name, RANKS)).usual for name in ORDER}
    assert needs["fsdp2"] < needs["zero2"] < needs["ddp"], "a model that tells the strategies apart"
    for name in ("ddp", "zero2", "fsdp2"):
        memory = enough_for(needs[name])
        expected = next(other for other in ORDER if needs[other] <= needs[name])
        assert first_that_fits(config, ORDER, RANKS, memory) == expected
    assert first_that_fits(config, ("fsdp2", "zero3"), RANKS, enough_for(needs["ddp"])) == "fsdp2"


def test_none_that_fits_is_refused_with_what_would():
    config = run_config(batch=4, global_batch=4 * RANKS, length=512, gradient_checkpointing="none")
    smaller = Planner(
        config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": 1})})
    )
    memory = enough_for(max(smaller.need(smaller.setting(name, RANKS)).usual for name in ORDER))
    with pytest.raises(ConfigError) as refusal:
        first_that_fits(config, ORDER, RANKS, memory)
    (problem,) = refusal.value.problems
    assert (problem.key, problem.value) == ("runtime.strategy", "auto")
    assert "none of ddp, zero1, zero2, fsdp2, zero3 fits 8 GPUs of" in problem.message
    assert problem.hint.startswith("set training.micro_batch_size=1 runtime.strategy=")
    with pytest.raises(ConfigError, match="no change that a plan knows makes it fit"):
        first_that_fits(config, ORDER, RANKS, 2**20)
