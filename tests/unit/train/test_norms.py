"""Norms by component are those of all their numbers, wherever these are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from theworld_train.train.engine import ReplicatedEngine, _without_padding
from theworld_train.train.norms import component_norms, parameters_by_component


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    groups = [
        {"name": "vision_tower/decay", "params": [parameter(3.0, 4.0)]},
        {"name": "vision_tower/no_decay", "params": [parameter(12.0)]},
        {"name": "world_projector/decay", "params": [parameter(1.0, 2.0, 2.0), parameter()]},
    ]
    return torch.optim.SGD(groups, lr=1.0)


def numbers(norms: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in norms.items()}


def test_groups_of_a_component_are_one(optimizer: torch.optim.Optimizer):
    components = parameters_by_component(optimizer)
    assert {name: len(held) for name, held in components.items()} == {"vision_tower": 2, "world_projector": 2}
    assert numbers(component_norms(components, lambda each: each, sharded=False)) == {
        "vision_tower": 13.0,
        "world_projector": 3.0,
    }
    assert component_norms({}, lambda each: each, sharded=False) == {}


def test_norms_of_bf16_weights_are_not_rounded_to_bf16():
    weights = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    norms = component_norms({"world_projector": [weights]}, lambda each: each, sharded=False)
    assert numbers(norms) == pytest.approx({"world_projector": math.sqrt(1000)}, rel=1e-6)


def test_what_has_no_gradient_adds_none(optimizer: torch.optim.Optimizer):
    engine = ReplicatedEngine(nn.Identity(), lambda: optimizer)
    assert numbers(engine.gradient_norms()) == {"vision_tower": 0.0, "world_projector": 0.0}
    first, *_ = parameters_by_component(optimizer)["vision_tower"]
    first.grad = torch.tensor([0.6, -0.8])
    assert numbers(engine.gradient_norms()) == pytest.approx({"vision_tower": 1.0, "world_projector": 0.0})
    assert numbers(engine.weight_norms()) == {"vision_tower": 13.0, "world_projector": 3.0}
    first.grad = torch.tensor([math.nan, 0.0])
    assert math.isnan(numbers(engine.gradient_norms())["vision_tower"])


def test_parts_of_ranks_are_added_and_copies_count_once(
    optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
):
    """Four ranks hold two copies of two parts, here equally large ones."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(4))
    norms = component_norms(parameters_by_component(optimizer), lambda each: each, sharded=True, copies=2)
    assert numbers(norms) == pytest.approx({"vision_tower": 13 * math.sqrt(2), "world_projector": 3 * math.sqrt(2)})


@pytest.mark.parametrize(("rank", "left"), [(0, [1.0, 1.0, 1.0]), (1, [1.0, 1.0]), (2, [])])
def test_padding_of_the_last_shards_is_left_out(rank: int, left: list[float], monkeypatch: pytest.MonkeyPatch):
    """Five numbers over three ranks, of which each holds room for three."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    whole = parameter()
    whole.ds_numel = 5  # type: ignore[attr-defined]
    assert _without_padding(whole, torch.ones(3)).tolist() == left
