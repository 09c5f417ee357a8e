"""Fail when torch moves a seam that sharding, timeouts or recomputation are built on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from theworld_train.train import recompute


@pytest.fixture
def group() -> Iterator[Any]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=7))
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


def timeout_of(group: Any) -> float:
    return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())


def test_timeouts_of_all_groups_can_be_set(group: Any):
    other = dist.new_group(backend="gloo")
    assert set(distributed_c10d._world.pg_map) == {group, other}
    assert timeout_of(other) != timeout_of(group) == 7, "a new group has torch's own timeout: the reason to set it"
    distributed_c10d._set_pg_timeout(timedelta(seconds=9), other)
    assert timeout_of(other) == 9


def test_a_group_can_be_left_at_once(group: Any):
    distributed_c10d._abort_process_group()
    assert not dist.is_initialized()


@pytest.fixture
def two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_a_unit_may_mix_dtypes_of_frozen_weights_and_those_that_train_have_one():
    def shard(frozen: torch.dtype, trained: tuple[torch.dtype, torch.dtype]) -> FSDPModule:
        unit = nn.Sequential(*(nn.Linear(4, 4, bias=False, dtype=dtype) for dtype in (frozen, *trained)))
        unit[0].requires_grad_(False)
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        fully_shard(unit, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
        unit.unshard()
        return unit

    assert {parameter.dtype for parameter in shard(torch.bfloat16, (torch.float32,) * 2).parameters()} == {
        torch.bfloat16
    }
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        shard(torch.float32, (torch.float32, torch.bfloat16))


def test_micro_batches_but_the_last_one_can_be_told():
    assert "is_last_backward" in inspect.signature(FSDPModule.set_is_last_backward).parameters


def test_selective_checkpointing_computes_no_kept_operator_again():
    weight, tensor = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    counted: list[Any] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted.append(func)
            return func(*args, **(kwargs or {}))

    contexts = partial(create_selective_checkpoint_contexts, recompute.KEPT)
    result = checkpoint(lambda t: torch.sin(t @ weight).exp(), tensor, use_reentrant=False, context_fn=contexts)
    with Count():
        result.sum().backward()
    assert counted.count(torch.ops.aten.mm.default) == 2, "two gradients"
    assert counted.count(torch.ops.aten.sin.default) == 1


def test_inputs_of_a_checkpoint_pass_the_hooks_around_it():
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    tensor = torch.ones(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        checkpoint(lambda t: (t @ torch.ones(5, 7)).exp(), tensor, use_reentrant=False)
    assert saved == [torch.Size([3, 5])]
