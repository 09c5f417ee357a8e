"""Several sources as one, drawn from in fixed shares."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.sources import MixtureSource
from theworld_train.data.exclusion import ExcludingSource
from theworld_train.data.order import Groups, permutation
from theworld_train.data.source import Finding, Sample, Source, UnreadableSampleError

#: Positions of the stream within which every part has its share, to one sample.
BLOCK = 1000


class MixedSource:
    """The samples of several sources one after the other, their ids behind the name of their part."""

    def __init__(self, parts: Mapping[str, Source]) -> None:
        """Args: parts: The sources by their names."""
        self.parts = dict(parts)
        self.sizes = {name: len(part) for name, part in self.parts.items()}
        self._ends = [int(end) for end in np.cumsum(list(self.sizes.values()))]

    def __len__(self) -> int:
        """Returns the samples of all parts together."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Loads one sample; see `Source`."""
        return self._sample(index, outline=False)

    def outline(self, index: int) -> Sample:
        """Returns one sample with blanks for its media; see `Source`."""
        return self._sample(index, outline=True)

    def _sample(self, index: int, *, outline: bool) -> Sample:
        number = bisect_right(self._ends, index)
        name, part = list(self.parts.items())[number]
        own = index - (self._ends[number - 1] if number else 0)
        try:
            sample = part.outline(own) if outline else part[own]
        except UnreadableSampleError as error:
            raise UnreadableSampleError(f"{name}/{error.sample_id}", error.reason) from error
        return replace(sample, id=f"{name}/{sample.id}")

    def check(self) -> Iterator[Finding]:
        """Checks every row of every part; see `Source`."""
        start = 0
        for name, part in self.parts.items():
            for finding in part.check():
                if finding.index is None:
                    yield finding
                else:
                    yield replace(finding, index=start + finding.index, sample_id=f"{name}/{finding.sample_id}")
            start += len(part)


def part_sizes(source: Source) -> dict[str, int]:
    """Returns the samples of each part of a mixture, in their order; nothing for another source."""
    if isinstance(source, ExcludingSource):
        return part_sizes(source.source)
    return source.sizes if isinstance(source, MixedSource) else {}


def part_ends(source: Source) -> list[int]:
    """Returns the index behind the last sample of each part, or of the whole source if it is no mixture."""
    return [int(end) for end in np.cumsum(list(part_sizes(source).values()) or [len(source)])]


@dataclass(frozen=True)
class Part:
    """What the order knows of one source.

    Attributes:
        name: Its name.
        size: Its samples.
        weight: Its share of what is drawn, relative to the others'.
        limit: Samples that it gives at most, repeated ones counted; None if there is no limit.
        groups: Samples that are read at once, of a source that has such groups.
    """

    name: str
    size: int
    weight: float
    limit: int | None = None
    groups: Groups | None = None


def parts_of(
    config: MixtureSource, sizes: Mapping[str, int], groups: Mapping[str, Groups | None] | None = None
) -> tuple[Part, ...]:
    """Returns the parts of a mixture, given how many samples each has, and which of these are read at once."""
    groups = groups or {}
    return tuple(
        Part(
            name,
            sizes[name],
            sizes[name] ** (1 / config.temperature) if part.weight is None else part.weight,
            None if part.max_epochs is None else max(1, round(part.max_epochs * sizes[name])),
            groups.get(name),
        )
        for name, part in config.parts.items()
    )


@dataclass(frozen=True)
class _Block:
    """A stretch of the stream.

    Attributes:
        parts: `(positions,)` the number of the part at each position.
        ordinals: `(positions,)` which of that part's draws it is, counted from 0 over the whole stream.
    """

    parts: NDArray[np.int64]
    ordinals: NDArray[np.int64]


class MixtureOrder:
    """The stream of training samples of a mixture; a pure function of parts, seed and step, as `TrainingOrder` is.

    Each block of the stream holds every part in proportion to its weight, shuffled; what does not come out even is
    carried into the next block. The n-th sample that a part gives is the n-th of its own stream of epochs.
    """

    def __init__(self, parts: Sequence[Part], seed: int, global_batch_size: int) -> None:
        """Begins at the first block.

        Args:
            parts: The parts, in the order in which their samples are numbered.
            seed: Seed of the order.
            global_batch_size: Samples in one optimizer step, over all ranks.

        Raises:
            ConfigError: If a part has no samples.
        """
        for part in parts:
            if not part.size:
                raise ConfigError(Problem("there are no training samples", key=f"data.train.parts.{part.name}"))
        self._parts, self._seed, self._global_batch_size = tuple(parts), seed, global_batch_size
        self._offsets = np.cumsum([0, *(part.size for part in parts)])[:-1]
        self._limits = [np.inf if part.limit is None else part.limit for part in parts]
        #: Samples that each part has given before each block, and what it is owed.
        self._drawn: list[NDArray[np.int64]] = [np.zeros(len(parts), dtype=np.int64)]
        self._owed = np.zeros(len(parts))
        self._blocks: dict[int, _Block] = {}
        self._epochs: dict[int, tuple[int, NDArray[np.int64]]] = {}

    @property
    def capacity(self) -> float:
        """Samples that can be drawn, repeated ones counted; infinite if a part has no limit."""
        return float(sum(self._limits))

    def indices(self, step: int) -> list[int]:
        """Returns the indices of the samples that optimizer step `step`, counted from 0, learns from.

        Raises:
            ConfigError: If the parts have given all that they may.
        """
        first = step * self._global_batch_size
        return [self._index(position) for position in range(first, first + self._global_batch_size)]

    def shares(self, step: int) -> dict[str, float]:
        """Returns the share of each part in what has been drawn when a step is done."""
        number, offset = divmod((step + 1) * self._global_batch_size, BLOCK)
        drawn = self._drawn_before(number).copy()
        if offset:
            drawn += np.bincount(self._block(number).parts[:offset], minlength=len(self._parts))
        return {part.name: float(count / drawn.sum()) for part, count in zip(self._parts, drawn, strict=True)}

    def _index(self, position: int) -> int:
        number, offset = divmod(position, BLOCK)
        block = self._block(number)
        if offset >= len(block.parts):
            message = f"the parts have given all {int(self.capacity):,} samples that max_epochs lets them"
            raise ConfigError(Problem(message, key="data.train.parts", hint="raise a part's max_epochs"))
        part = int(block.parts[offset])
        epoch, place = divmod(int(block.ordinals[offset]), self._parts[part].size)
        known = self._epochs.get(part)
        if known is None or known[0] != epoch:
            seed = int(np.random.SeedSequence(self._seed % 2**64, spawn_key=(1, part)).generate_state(1, np.uint64)[0])
            of = self._parts[part]
            known = self._epochs[part] = (epoch, permutation(of.size, seed, epoch, of.groups))
        return int(self._offsets[part] + known[1][place])

    def _block(self, number: int) -> _Block:
        if number not in self._blocks:
            before, after = self._drawn_before(number), self._drawn_before(number + 1)
            parts = np.repeat(np.arange(len(self._parts)), after - before)
            key = np.random.SeedSequence(self._seed % 2**64, spawn_key=(0, number))
            parts = parts[np.argsort(np.random.Philox(key).random_raw(len(parts)), kind="stable")]
            ordinals = np.empty_like(parts)
            for part, first in enumerate(before):
                places = np.flatnonzero(parts == part)
                ordinals[places] = first + np.arange(len(places))
            self._blocks = {kept: block for kept, block in self._blocks.items() if kept == number - 1}
            self._blocks[number] = _Block(parts, ordinals)
        return self._blocks[number]

    def _drawn_before(self, number: int) -> NDArray[np.int64]:
        """Returns the samples that each part has given before a block; blocks are counted once, in their order."""
        while len(self._drawn) <= number:
            self._drawn.append(self._drawn[-1] + self._counts(self._drawn[-1]))
        return self._drawn[number]

    def _counts(self, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns what each part gives to the next block."""
        weights = np.array([part.weight for part in self._parts])
        left = np.array(self._limits) - drawn
        counts = np.zeros(len(weights), dtype=np.int64)
        free = BLOCK
        while free and (open_parts := left - counts > 0).any():
            shares = np.where(open_parts, weights, 0.0)
            self._owed += free * shares / shares.sum()
            given = np.minimum(np.floor(self._owed).clip(0), left - counts).astype(np.int64)
            # Those whose fraction is largest take what is over, the first of equals.
            for part in sorted(np.flatnonzero(open_parts), key=lambda part: given[part] - self._owed[part]):
                if given.sum() < free and given[part] < left[part] - counts[part]:
                    given[part] += 1
            self._owed = np.where(open_parts, self._owed - given, 0.0)
            counts += given
            free = BLOCK - int(counts.sum())
        return counts
