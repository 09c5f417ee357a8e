"""Protects what a plan for a GPU assumes of its kernels: which attention runs, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from theworld_train.memory.tracker import Allocation, MemoryTracker
from theworld_train.plan.cuda import cuda_semantics
from theworld_train.plan.known_values import KnowingFakeMode

BATCH, HEADS, POSITIONS, SIZE = 2, 8, 100, 64


def made(
    mask: torch.dtype | None = None, dtype: torch.dtype = torch.bfloat16, kv_heads: int = HEADS
) -> list[Allocation]:
    """Returns what one attention makes; with a mask over pairs of positions if it has a dtype."""
    with KnowingFakeMode(), cuda_semantics(), MemoryTracker() as tracker:
        query, key, value = (
            torch.empty(BATCH, heads, POSITIONS, SIZE, dtype=dtype, requires_grad=True)
            for heads in (HEADS, kv_heads, kv_heads)
        )
        pairs = None if mask is None else torch.empty(BATCH, 1, POSITIONS, POSITIONS, dtype=mask)
        start = len(tracker.trace.events)
        functional.scaled_dot_product_attention(query, key, value, pairs, enable_gqa=kv_heads != HEADS)
        events = tracker.finish().events[start:]
    return [event.allocation for event in events if event.is_birth]


def test_without_a_mask_flash_attention_keeps_no_scores():
    allocations = made()
    assert {a.op for a in allocations} == {"_scaled_dot_product_flash_attention"}
    assert max(a.size for a in allocations) == BATCH * HEADS * POSITIONS * SIZE * 2


def test_a_mask_takes_the_memory_efficient_kernel_and_becomes_additive_and_aligned():
    allocations = made(torch.bool)
    assert "_scaled_dot_product_efficient_attention" in {a.op for a in allocations}
    (padded,) = (a for a in allocations if a.op == "constant_pad_nd")
    assert padded.size == BATCH * POSITIONS * 112 * 2
    assert BATCH * HEADS * POSITIONS * POSITIONS * 2 not in {a.size for a in allocations}  # over all heads at no cost


def test_fp32_takes_the_memory_efficient_kernel():
    assert "_scaled_dot_product_efficient_attention" in {a.op for a in made(dtype=torch.float32)}


def test_grouped_heads_are_repeated_only_where_the_kernel_wants_it():
    assert "_scaled_dot_product_flash_attention" in {a.op for a in made(kv_heads=2)}
    repeated = [a for a in made(torch.bool, kv_heads=2) if a.size == BATCH * HEADS * POSITIONS * SIZE * 2]
    assert len(repeated) == 3  # keys, values and the output


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_layer_norm_is_fp32_under_autocast(autocast: bool, dtype: torch.dtype):
    with KnowingFakeMode(), cuda_semantics(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        weight = torch.ones(8, dtype=torch.bfloat16)
        assert functional.layer_norm(torch.empty(4, 8, dtype=torch.bfloat16), [8], weight, weight).dtype is dtype


def test_the_functions_come_back():
    before = functional.scaled_dot_product_attention, functional.layer_norm
    with cuda_semantics():
        assert functional.scaled_dot_product_attention is not before[0]
    assert (functional.scaled_dot_product_attention, functional.layer_norm) == before
