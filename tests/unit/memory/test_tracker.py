"""Protects the tracker: what is alive, what it holds, whose it is, and when it peaks."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from theworld_train.memory.timeline import Timeline, spans
from theworld_train.memory.tracker import Allocation, MemoryTracker, Trace

KIB = 1024


def allocations(trace: Trace) -> list[Allocation]:
    return [event.allocation for event in trace.events if event.is_birth]


def total(trace: Trace) -> list[int]:
    return Timeline(trace.events, spans(trace)).total.tolist()


def test_storages_count_once_from_birth_to_death():
    with MemoryTracker() as tracker:
        first = torch.empty(KIB, dtype=torch.uint8)
        view = first[10:].view(-1)
        del first  # the view keeps the storage
        second = torch.empty(2 * KIB, dtype=torch.uint8)
        del view
        trace = tracker.finish()
    assert total(trace) == [KIB, 3 * KIB, 2 * KIB]
    del second
    assert len(trace.events) == 3  # nothing is added after the end


def test_sizes_are_rounded_up_to_blocks_on_a_gpu():
    with MemoryTracker() as tracker:
        kept = torch.empty(513, dtype=torch.uint8)
        trace = tracker.finish()
    assert Timeline(trace.events, spans(trace), 512).peak().total == 1024
    assert Timeline(trace.events, spans(trace)).peak().total == kept.numel()


def step(tracker: MemoryTracker, layer: nn.Linear, optimizer: torch.optim.Optimizer, recompute: bool = False) -> None:
    inputs = torch.ones(64, 16)
    tracker.enter_phase("forward")

    def compute(values: torch.Tensor) -> torch.Tensor:
        return layer(values).exp().sin()

    hidden = checkpoint(compute, inputs, use_reentrant=False) if recompute else compute(inputs)
    loss = hidden.sum()
    tracker.enter_phase("backward")
    loss.backward()
    tracker.enter_phase("optimizer")
    del hidden, loss
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tracked_steps(recompute: bool = False) -> Trace:
    layer = nn.Linear(16, 32, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters())
    tracker = MemoryTracker()
    with tracker, tracker.watching(layer, {"": "language_model"}, ()):
        tracker.adopt_parameter(layer.weight, "language_model", "weight")
        tracker.adopt_state(optimizer, {id(layer.weight): ("language_model", "weight")})
        for number in range(2):
            tracker.begin_step(number)
            step(tracker, layer, optimizer, recompute)
        return tracker.finish()


def test_every_category_is_told_from_the_others():
    found = allocations(tracked_steps())
    weight = 16 * 32 * 4
    sizes = {category: [a.size for a in found if a.category == category and a.size > 64] for category in ("masters",)}
    assert sizes["masters"] == [weight]
    assert [a.size for a in found if a.category == "gradients"] == [weight, weight]
    assert sum(a.size for a in found if a.category == "optimizer") == 2 * weight + 4
    # The output of exp is what its derivative needs; the layer's own output is not.
    assert {a.op for a in found if a.category == "activations"} >= {"exp"}
    assert {a.category for a in found if a.op == "mm" and a.phase == "forward"} == {"temporaries"}
    assert "mm" not in {a.op for a in found if a.category == "activations" and a.phase == "backward"}
    assert all(a.category != "activations" for a in found if a.phase == "optimizer")


def test_gradients_and_state_carry_the_name_of_their_parameter():
    found = allocations(tracked_steps())
    assert {a.parameter for a in found if a.category in ("masters", "gradients", "optimizer")} == {"weight"}
    gradients = [a for a in found if a.category == "gradients"]
    assert all(a.accumulated is not None and a.born < a.accumulated <= a.died for a in gradients)


def test_what_is_recomputed_is_an_activation_of_the_backward_pass():
    found = allocations(tracked_steps(recompute=True))
    again = [a for a in found if a.phase == "backward" and a.in_forward and a.size > 4]
    assert again, "nothing was recomputed"
    assert not [a for a in allocations(tracked_steps()) if a.phase == "backward" and a.in_forward and a.size > 4]


def test_casts_of_weights_are_weights():
    layer = nn.Linear(16, 32, bias=False)
    tracker = MemoryTracker()
    with tracker, torch.autocast("cpu", dtype=torch.bfloat16):
        tracker.adopt_parameter(layer.weight, "language_model", "weight")
        tracker.enter_phase("forward")
        layer(torch.ones(64, 16))
        trace = tracker.finish()
    copies = [a for a in allocations(trace) if a.category == "weights"]
    assert [(a.size, a.parameter, a.op) for a in copies] == [(16 * 32 * 2, "weight", "_to_copy")]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(inputs))


def test_modules_are_known_forward_and_backward():
    model, tracker = Pair(), MemoryTracker()
    with tracker, tracker.watching(model, {"first": "a", "second": "b"}, ("first", "second")):
        tracker.enter_phase("forward")
        loss = model(torch.ones(4, 8)).sum()
        tracker.enter_phase("backward")
        loss.backward()
        trace = tracker.finish()
    forward = {a.module: a.component for a in allocations(trace) if a.phase == "forward"}
    assert forward["first"] == "a"
    assert forward["second.0"] == "b"
    backward = [a.module for a in allocations(trace) if a.phase == "backward" and a.module]
    assert backward.index("second.1") < backward.index("first")
    assert {a.component for a in allocations(trace) if a.module == "second.1" and a.phase == "backward"} == {"b"}
    (second,), (first,) = trace.backward_starts["second"], trace.backward_starts["first"]
    assert second < first
    assert len(trace.calls["first"]) == 1
