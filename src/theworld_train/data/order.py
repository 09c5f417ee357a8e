"""The order of samples, as pure functions of the seed and the step.

Training walks an endless stream of positions. Position `p` is in epoch `p // n`, whose permutation of the `n` samples
depends on (seed, epoch) alone. The global batch of a step is a slice of that stream, which `batching` lays into
micro-batches: neither the number of ranks nor that of workers changes which samples a step learns from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from theworld_train.config.errors import ConfigError, Problem

#: Groups of neighbouring samples whose samples are shuffled among each other.
SHUFFLED_GROUPS = 4


@dataclass(frozen=True, eq=False)
class Groups:
    """Neighbouring samples that are read at once, one such group after the other.

    Attributes:
        sizes: `(groups,)` samples of each group, in their order.
    """

    sizes: NDArray[np.int64]


class Order(Protocol):
    """Which samples each optimizer step learns from."""

    def indices(self, step: int) -> list[int]:
        """Returns the indices of the samples of optimizer step `step`, counted from 0."""
        ...

    def shares(self, step: int) -> dict[str, float]:
        """Returns the share of each part of a mixture in what has been drawn when a step is done."""
        ...


@dataclass(frozen=True)
class TrainingOrder:
    """The stream of training samples of one source.

    Attributes:
        num_samples: Samples in the source.
        seed: Seed of the order.
        global_batch_size: Samples in one optimizer step, over all ranks.
        groups: Samples that are read at once, of a source that has such groups.
    """

    num_samples: int
    seed: int
    global_batch_size: int
    groups: Groups | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Refuses an empty source."""
        if self.num_samples < 1:
            raise ConfigError("there are no training samples")
        assert self.global_batch_size > 0

    def index(self, position: int) -> int:
        """Returns the index into the source of the sample at a position of the stream."""
        epoch, offset = divmod(position, self.num_samples)
        return int(permutation(self.num_samples, self.seed, epoch, self.groups)[offset])

    def indices(self, step: int) -> list[int]:
        """Returns the indices of the samples that optimizer step `step`, counted from 0, learns from."""
        first = step * self.global_batch_size
        return [self.index(position) for position in range(first, first + self.global_batch_size)]

    def shares(self, step: int) -> dict[str, float]:
        """Returns nothing: there is one source."""
        return {}


@dataclass(frozen=True)
class EvaluationSlot:
    """A place in an evaluation batch.

    Attributes:
        index: Index of the sample in the source.
        counted: Whether its result counts; padding repeats a sample that counts elsewhere.
    """

    index: int
    counted: bool


def evaluation_micro_batches(
    num_samples: int, rank: int, world_size: int, micro_batch_size: int
) -> list[list[EvaluationSlot]]:
    """Splits samples `0 .. num_samples - 1` over the ranks so that each counts once.

    Every rank gets equally many full micro-batches, since a rank with fewer would leave the others waiting in a
    collective; the last ones are padded with repeated samples that do not count.
    """
    stride = world_size * micro_batch_size
    starts = range(rank * micro_batch_size, num_samples + rank * micro_batch_size, stride)
    return [
        [EvaluationSlot(slot % num_samples, slot < num_samples) for slot in range(start, start + micro_batch_size)]
        for start in starts
    ]


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Returns the micro-batches that each rank accumulates in an optimizer step.

    Raises:
        ConfigError: If they do not divide the global batch.
    """
    steps, rest = divmod(global_batch_size, micro_batch_size * world_size)
    if rest or not steps:
        message = f"must be a multiple of micro_batch_size x world size = {micro_batch_size} x {world_size}"
        raise ConfigError(Problem(message, key="training.global_batch_size", value=global_batch_size))
    return steps


@lru_cache(maxsize=4)
def permutation(num_samples: int, seed: int, epoch: int, groups: Groups | None = None) -> NDArray[np.int64]:
    """Returns the order of the samples in one epoch; groups are taken in turn, so many of them shuffled together.

    It sorts raw words of a counter-based generator: unlike numpy's `permutation`, those words are guaranteed to stay
    the same in later numpy versions (NEP 19), and with them the order of a run that is resumed after an upgrade.
    """
    key = np.random.SeedSequence(seed % 2**64, spawn_key=(epoch,))
    drawn = np.random.Philox(key)
    order: NDArray[np.int64]
    if groups is None:
        order = np.argsort(drawn.random_raw(num_samples), kind="stable")
    else:
        turn = np.argsort(drawn.random_raw(len(groups.sizes)), kind="stable")
        sizes = groups.sizes[turn]
        firsts = (np.cumsum(groups.sizes) - groups.sizes)[turn]
        samples = np.arange(num_samples) + np.repeat(firsts - (np.cumsum(sizes) - sizes), sizes)
        together = np.repeat(np.arange(len(sizes)) // SHUFFLED_GROUPS, sizes)
        order = samples[np.lexsort((drawn.random_raw(num_samples), together))]
    order.setflags(write=False)
    return order
