"""Protects `runtime.strategy: auto`: resolved before a run starts, said aloud, and planned only where it has to be."""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.planned import run_config
from theworld_train.cli import strategy
from theworld_train.config import ConfigError, RunConfig, load_run_config, parse_run_config
from theworld_train.plan import choice

GIB = 2**30
CONFIG = str(Path(__file__).parents[3] / "configs/stages/projection.yaml")


def auto(**sections: Any) -> RunConfig:
    values = run_config().model_dump(mode="json")
    values["runtime"] = {"strategy": "auto"} | sections.pop("runtime", {})
    return parse_run_config(values | sections)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the plan is asked, which answers with the last strategy that it is given."""
    questions: list[tuple[Any, ...]] = []

    def answer(_config: RunConfig, strategies: tuple[str, ...], ranks: int, memory: int) -> str:
        questions.append((strategies, ranks, memory))
        return strategies[-1]

    monkeypatch.setattr(choice, "first_that_fits", answer)
    return questions


def resolved(config: RunConfig, ranks: int) -> str:
    return strategy.resolve_strategy(config, ranks).runtime.strategy


@pytest.mark.parametrize(("ranks", "memory"), [(1, None), (1, 80 * GIB), (4, None)])
def test_nothing_is_planned_where_nothing_has_to_fit(
    ranks: int,
    memory: int | None,
    asked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(strategy, "least_gpu_memory", lambda: memory)
    assert resolved(auto(), ranks) == "ddp"
    assert resolved(auto(runtime={"offload": "all"}), ranks) == "fsdp2"
    assert not asked
    assert "runtime.strategy is ddp" in capsys.readouterr().err


def test_on_gpus_the_plan_decides_among_those_that_can_run_it(asked: list[Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strategy, "least_gpu_memory", lambda: 24 * GIB)
    assert resolved(auto(), 8) == "zero3"
    assert resolved(auto(optimizer={"name": "adamw_8bit"}), 8) == "ddp"
    assert resolved(auto(runtime={"offload": "all"}), 8) == "zero3"
    training = run_config().training.model_dump(mode="json") | {"gradient_checkpointing": "selective"}
    assert resolved(auto(training=training), 8) == "fsdp2"
    training = run_config().training.model_dump(mode="json") | {"loss": "liger"}
    assert resolved(auto(training=training), 8) == "zero2"
    monkeypatch.setattr(util, "find_spec", lambda _name: None)
    assert resolved(auto(), 8) == "fsdp2", "ZeRO needs DeepSpeed"
    assert asked == [
        (("ddp", "zero1", "zero2", "fsdp2", "zero3"), 8, 24 * GIB),
        (("ddp",), 8, 24 * GIB),
        (("fsdp2", "zero3"), 8, 24 * GIB),
        (("ddp", "zero1", "zero2", "fsdp2"), 8, 24 * GIB),
        (("ddp", "zero1", "zero2"), 8, 24 * GIB),
        (("ddp", "fsdp2"), 8, 24 * GIB),
    ]
    with pytest.raises(ConfigError, match="no strategy that is installed"):
        resolved(auto(runtime={"offload": "optimizer"}), 8)


def test_a_strategy_that_accelerate_names_is_refused_before_anything_is_planned(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(strategy, "least_gpu_memory", lambda: 24 * GIB)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(ConfigError, match=r"'2' contradicts runtime\.strategy: 'auto'"):
        resolved(auto(), 8)
    assert not asked


def test_launch_tells_the_ranks_what_it_has_found(call: Any):
    code, out, err = call("launch", CONFIG, "--nproc", "2", "--print", "seed=3")
    assert code == 0, err
    assert load_run_config(CONFIG).runtime.strategy == "auto"
    assert out.strip().endswith(f"train {CONFIG} seed=3 runtime.strategy=ddp")
    assert "runtime.strategy is ddp, found for 2 processes without GPUs" in err
