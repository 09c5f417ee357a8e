"""Protects the model of CUDA's caching allocator: rounding, segments, reuse, splitting and merging."""

from __future__ import annotations

import pytest

from theworld_train.memory.timeline import Span
from theworld_train.plan.allocator import MIB, CachingAllocator, reserved_bytes


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB, 12 * MIB),  # what is left of the segment is too small to be kept apart
        (64 * MIB + 1, 64 * MIB + 512, 66 * MIB),  # and here it is not
    ],
)
def test_requests_take_segments_of_their_class(size: int, allocated: int, reserved: int):
    allocator = CachingAllocator()
    allocator.allocate(size)
    assert allocator.reserved == reserved
    assert allocator.allocated == allocated


def test_small_requests_share_a_segment_and_large_ones_do_not_enter_it():
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(MIB // 2)
    assert allocator.reserved == 2 * MIB
    allocator.allocate(2 * MIB)
    assert allocator.reserved == 22 * MIB


def test_freed_blocks_are_reused_and_merged():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(5 * MIB) for _ in range(4)]
    assert allocator.reserved == 20 * MIB
    for index in (1, 0, 2):  # neighbours on either side
        allocator.release(blocks[index])
    allocator.allocate(15 * MIB)
    assert allocator.reserved == 20 * MIB
    assert allocator.allocated == 20 * MIB


def test_the_smallest_free_block_that_holds_a_request_is_taken():
    allocator = CachingAllocator()
    large, small = allocator.allocate(64 * MIB), allocator.allocate(32 * MIB)
    allocator.release(large)
    allocator.release(small)
    allocator.allocate(30 * MIB)
    allocator.allocate(64 * MIB)
    assert allocator.reserved == 96 * MIB


def test_fragments_make_it_reserve_more_than_is_alive():
    """Two blocks of 24 MiB with a survivor between them do not make one of 48."""
    held = [
        Span(24 * MIB, "temporaries", "loss", 0, 3),
        Span(24 * MIB, "temporaries", "loss", 1, 3),
        Span(48 * MIB, "temporaries", "loss", 4, 5),
    ]
    assert reserved_bytes(held) == 96 * MIB
    assert reserved_bytes([*held[:1], Span(24 * MIB, "temporaries", "loss", 4, 5)]) == 24 * MIB


def test_what_goes_makes_room_before_what_comes():
    assert reserved_bytes([Span(30 * MIB, "weights", "a", 0, 1), Span(30 * MIB, "weights", "a", 1, 2)]) == 30 * MIB
