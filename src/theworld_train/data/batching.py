"""How the samples of an optimizer step are laid into rows and micro-batches; which these are is a matter of `order`.

The gradient of a step is a sum over its samples. However they are laid out, on however many ranks, it stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from theworld_train.config.schema import BatchingKind
from theworld_train.data.order import accumulation_steps


@dataclass(frozen=True)
class Place:
    """Where a sample goes.

    Attributes:
        index: Index of the sample in the source.
        room: Tokens that a sample may have which takes its place, should it be unusable.
    """

    index: int
    room: int


Row = tuple[Place, ...]
MicroBatch = tuple[Row, ...]


@dataclass(frozen=True)
class Batching:
    """Lays samples into micro-batches.

    Attributes:
        kind: `padded`, `grouped` or `packed`.
        max_length: Tokens that a row may have.
        lengths: `(samples,)` tokens of each sample of the source, as `measure_lengths` returns them; `padded` needs
            none.
        ends: Of a mixture, the index behind the last sample of each part, as `part_ends` returns them: what cannot be
            used is replaced within its part.
    """

    kind: BatchingKind
    max_length: int
    lengths: NDArray[np.int32] | None = None
    ends: tuple[int, ...] = ()

    def micro_batches(
        self, indices: Sequence[int], rank: int, world_size: int, micro_batch_size: int
    ) -> list[MicroBatch]:
        """Returns what one rank takes of an optimizer step; every rank takes equally many micro-batches.

        Micro-batch `a` of rank `r` is the `(a * world_size + r)`-th of the step.

        Args:
            indices: The step's samples, in their order.
            rank: The rank.
            world_size: Number of ranks.
            micro_batch_size: Rows of a micro-batch.

        Raises:
            ConfigError: If ranks and micro-batches do not divide the step's samples.
        """
        accumulation_steps(len(indices), micro_batch_size, world_size)
        rows = self._rows(indices, world_size * micro_batch_size)
        starts = range(rank * micro_batch_size, len(rows), world_size * micro_batch_size)
        return [tuple(rows[start : start + micro_batch_size]) for start in starts]

    def _rows(self, indices: Sequence[int], multiple: int) -> list[Row]:
        if self.kind == "padded":
            return [(Place(index, self.max_length),) for index in indices]
        tokens = self.tokens
        longest_first = sorted(indices, key=lambda index: -tokens[index])
        if self.kind == "grouped":
            return [(Place(index, self.max_length),) for index in longest_first]
        rows = _first_fit(longest_first, tokens, self.max_length)
        while len(rows) % multiple:
            _split_fullest(rows, tokens)
        # Micro-batches that run side by side, and the rows in each, are then of nearly the same length.
        rows.sort(key=lambda row: -_total(row, tokens))
        return [tuple(Place(index, int(tokens[index])) for index in row) for row in rows]

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """`(samples,)` tokens of what is taken for each sample: an unusable one is replaced by the next usable one."""
        assert self.lengths is not None
        parts = np.split(self.lengths, self.ends[:-1])
        return np.concatenate([_with_replacements(part) for part in parts])


def _with_replacements(lengths: NDArray[np.int32]) -> NDArray[np.int32]:
    """Returns lengths, those of unusable samples that of the next usable one, after the last one the first."""
    usable = np.flatnonzero(lengths)
    if not len(usable):
        return lengths
    following = np.searchsorted(usable, np.arange(len(lengths))) % len(usable)
    tokens: NDArray[np.int32] = lengths[usable[following]]
    return tokens


def _first_fit(indices: Sequence[int], tokens: NDArray[np.int32], capacity: int) -> list[list[int]]:
    """Returns rows that hold each sample, the first row that has room for it taking it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in indices:
        need = int(tokens[index])
        place = next((number for number, free in enumerate(room) if free >= need), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= need
    return rows


def _split_fullest(rows: list[list[int]], tokens: NDArray[np.int32]) -> None:
    """Cuts the row of most tokens that holds several samples into two of about the same length."""
    row = max((row for row in rows if len(row) > 1), key=lambda row: _total(row, tokens))
    rows.remove(row)
    halves: tuple[list[int], list[int]] = ([], [])
    for index in row:  # longest first
        min(halves, key=lambda half: _total(half, tokens)).append(index)
    rows.extend(halves)


def _total(row: Sequence[int], tokens: NDArray[np.int32]) -> int:
    return int(sum(tokens[index] for index in row))
