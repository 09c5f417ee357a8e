"""Protects the attribution of time: whose a backward pass is, and that nothing is lost or counted twice."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.checkpoint import checkpoint

from theworld_train.profiling.attribution import OTHER, StepBreakdown, break_down
from theworld_train.profiling.ranges import BACKWARD, PREFIX, STEP

NODE = "autograd::engine::evaluate_function: "


def ranged(part: str) -> record_function:
    return record_function(PREFIX + part)


class Pair:
    """A first layer that is recomputed, and a second one; a frozen layer beside them, off the gradient's path."""

    def __init__(self) -> None:
        self.first, self.second, self.aside = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.aside.requires_grad_(False)

    def step(self, *, recompute: bool) -> None:
        inputs = torch.randn(256, 64)
        with ranged(STEP):
            with ranged("world_encoder"):
                self.aside(inputs)
            with ranged("vision_tower"):
                hidden = checkpoint(self._first, inputs, use_reentrant=False) if recompute else self._first(inputs)
            with ranged("language_model"):
                loss = self.second(hidden).sum()
            with ranged(BACKWARD):
                loss.backward()

    def _first(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.first(inputs))


def traced(*, recompute: bool, steps: int = 2) -> StepBreakdown:
    pair = Pair()
    pair.step(recompute=recompute)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            pair.step(recompute=recompute)
    return break_down(profiler.events(), on_gpu=False)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_backward_pass_belongs_to_whom_the_forward_pass_belonged(recompute: bool):
    found = traced(recompute=recompute).by_part
    kinds = {part: {kind for name, kind in found if name == part} for part, _ in found}
    assert kinds["language_model"] == {"forward", "backward"}
    assert kinds["vision_tower"] == {"forward", "backward"} | ({"recompute"} if recompute else set())
    assert kinds["world_encoder"] == {"forward"}


@pytest.mark.parametrize("recompute", [False, True])
def test_the_parts_add_up_to_the_step(recompute: bool):
    found = traced(recompute=recompute)
    assert sum(found.by_part.values()) == pytest.approx(found.seconds, rel=1e-6)
    assert all(seconds > 0 for seconds in found.by_part.values())


def test_operators_are_counted_by_step_and_ranges_are_none():
    found = {each.name: each for each in traced(recompute=False, steps=4).operations}
    assert found["aten::addmm"].calls == 3
    assert found["aten::mm"].calls == 3  # gradients of both weights, and of the second layer's inputs
    assert not [name for name in found if name.startswith(PREFIX)]


def test_an_operator_that_makes_no_node_does_not_own_one():
    """It has the number of the node that comes next, which another part makes."""
    layer = nn.Linear(64, 64)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, ranged(STEP):
        with ranged("data"):
            inputs = torch.randn(256, 64) * 2
        with ranged("language_model"):
            loss = layer(inputs).sum()
        with ranged(BACKWARD):
            loss.backward()
    found = break_down(profiler.events(), on_gpu=False).by_part
    assert ("data", "backward") not in found
    assert found["language_model", "backward"] > 0


@dataclass
class GpuEvent:
    """An event as the profiler tells it of a GPU: what the host did, and the kernels that came of it."""

    name: str
    start: float
    end: float
    kernel: float = 0.0
    sequence_nr: int = -1
    scope: int = 0
    children: list[GpuEvent] = field(default_factory=list)
    cpu_parent: GpuEvent | None = None

    def __post_init__(self) -> None:
        self.device_type = SimpleNamespace(name="CPU")
        self.is_user_annotation = self.name.startswith(PREFIX)
        self.time_range = SimpleNamespace(start=self.start, elapsed_us=lambda: self.end - self.start)
        self.kernels = [SimpleNamespace(name="gemm", duration=self.kernel)] if self.kernel else []
        if self.is_user_annotation:  # the profiler draws a range on the GPU too
            self.kernels = [SimpleNamespace(name=self.name, duration=self.end - self.start)]
        self.cpu_children = self.children
        for child in self.children:
            child.cpu_parent = self

    def all(self) -> list[GpuEvent]:
        return [self, *(event for child in self.children for event in child.all())]


def test_on_a_gpu_kernels_count_and_the_backward_pass_has_another_thread():
    forward = GpuEvent(
        PREFIX + "language_model", 0, 10, children=[GpuEvent("aten::mm", 1, 2, kernel=30.0, sequence_nr=7)]
    )
    step = GpuEvent(PREFIX + STEP, 0, 200, children=[forward, GpuEvent(PREFIX + BACKWARD, 20, 190)])
    again = GpuEvent("aten::mm", 31, 32, kernel=25.0, sequence_nr=3)  # the numbers of another thread
    node = GpuEvent(
        NODE + "MmBackward0", 30, 40, sequence_nr=7, children=[again, GpuEvent("aten::mm", 33, 34, kernel=60.0)]
    )
    gradient = GpuEvent(
        NODE + "torch::autograd::AccumulateGrad", 41, 50, children=[GpuEvent("aten::add_", 42, 43, kernel=5.0)]
    )
    found = break_down([*step.all(), *node.all(), *gradient.all()], on_gpu=True)
    assert found.by_part == {
        ("language_model", "forward"): pytest.approx(30e-6),
        ("language_model", "recompute"): pytest.approx(25e-6),
        ("language_model", "backward"): pytest.approx(65e-6),
        (OTHER, "forward"): pytest.approx(80e-6),
    }
    assert found.seconds == pytest.approx(200e-6)
