"""CUDA's caching allocator: what it reserves for a sequence of allocations, rounding and fragments included.

The rules are those of PyTorch's `CUDACachingAllocator` with its default settings: sizes are rounded up to 512 bytes; up
to 1 MiB they share segments of 2 MiB, below 10 MiB segments of 20 MiB, and larger ones get their own in multiples of
2 MiB; a request takes the smallest free block that holds it, and leaves the rest if that is worth keeping; freed
neighbours merge.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from theworld_train.memory.timeline import Span

MIB = 2**20
_ROUNDING = 512
_SMALL_REQUEST, _SMALL_SEGMENT = MIB, 2 * MIB
_MEDIUM_REQUEST, _MEDIUM_SEGMENT = 10 * MIB, 20 * MIB
_LARGE_ROUNDING = 2 * MIB


@dataclass(eq=False)
class _Block:
    """A stretch of a segment.

    Attributes:
        size: Bytes.
        order: Number of the segment, and the address within it: ties between free blocks go to the lowest.
        small: Whether it belongs to the pool of small requests.
        free: Whether nothing lives in it.
        before: Neighbour at the lower address.
        after: Neighbour at the higher address.
    """

    size: int
    order: tuple[int, int]
    small: bool
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None


@dataclass
class CachingAllocator:
    """One GPU's allocator, without a limit.

    Attributes:
        reserved: Bytes taken from the GPU and kept.
        allocated: Bytes handed out.
    """

    reserved: int = 0
    allocated: int = 0
    _segments: int = 0
    _free: dict[bool, list[tuple[int, tuple[int, int], _Block]]] = field(default_factory=lambda: {True: [], False: []})

    def allocate(self, size: int) -> _Block:
        """Hands out a block of at least so many bytes."""
        size = max(_ROUNDING, -(-size // _ROUNDING) * _ROUNDING)
        small = size <= _SMALL_REQUEST
        pool = self._free[small]
        place = bisect_left(pool, (size, (-1, -1)))
        block = pool.pop(place)[2] if place < len(pool) else self._grow(size, small)
        rest = block.size - size
        if rest >= _ROUNDING if small else rest > _SMALL_REQUEST:
            segment, address = block.order
            remainder = _Block(rest, (segment, address + size), small, before=block, after=block.after)
            if block.after is not None:
                block.after.before = remainder
            block.size, block.after = size, remainder
            self._keep(remainder)
        block.free = False
        self.allocated += block.size
        return block

    def release(self, block: _Block) -> None:
        """Takes a block back and merges it with free neighbours."""
        self.allocated -= block.size
        block.free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.free:
                self._drop(neighbour)
                block = self._merge(neighbour, block) if neighbour is block.before else self._merge(block, neighbour)
        self._keep(block)

    def _grow(self, size: int, small: bool) -> _Block:
        """Takes a new segment from the GPU."""
        if small:
            segment = _SMALL_SEGMENT
        elif size < _MEDIUM_REQUEST:
            segment = _MEDIUM_SEGMENT
        else:
            segment = -(-size // _LARGE_ROUNDING) * _LARGE_ROUNDING
        self.reserved += segment
        self._segments += 1
        return _Block(segment, (self._segments, 0), small)

    def _keep(self, block: _Block) -> None:
        insort(self._free[block.small], (block.size, block.order, block))

    def _drop(self, block: _Block) -> None:
        pool = self._free[block.small]
        place = bisect_left(pool, (block.size, block.order))
        assert pool[place][2] is block, "a free block is not where its size puts it"
        pool.pop(place)

    @staticmethod
    def _merge(low: _Block, high: _Block) -> _Block:
        low.size += high.size
        low.after = high.after
        if high.after is not None:
            high.after.before = low
        low.free = True
        return low


def reserved_bytes(held: Iterable[Span]) -> int:
    """Returns what the allocator has reserved after all spans have come and gone in their order; it never shrinks."""
    changes = [(span.start, True, number, span) for number, span in enumerate(held)]
    changes += [(span.end, False, number, span) for _, _, number, span in changes]
    allocator = CachingAllocator()
    blocks: dict[int, _Block] = {}
    for _, comes, number, span in sorted(changes, key=lambda change: change[:3]):  # what goes makes room first
        if comes:
            blocks[number] = allocator.allocate(span.size)
        else:
            allocator.release(blocks.pop(number))
    return allocator.reserved
