"""Loads batches in worker processes, in an order and with a content that do not depend on their number."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from theworld_train.batch import Batch, EncodedSample, FlatBatch
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.batching import Batching, MicroBatch, Place
from theworld_train.data.collator import Collator, Encoded
from theworld_train.data.mixture import part_ends
from theworld_train.data.order import EvaluationSlot, Order, evaluation_micro_batches
from theworld_train.data.source import ExcludedSampleError, Question, Sample, Source, UnreadableSampleError, question_of
from theworld_train.data.workers import in_workers

#: Samples in a row that may turn out unusable before the run stops.
MAX_REPLACEMENTS = 1000


@dataclass(frozen=True)
class Dropped:
    """A sample that another one replaced.

    Attributes:
        sample_id: Id of the sample that was left out.
        reason: Why.
        asked_for: Whether the config asks for that: `data.too_long: drop`.
    """

    sample_id: str
    reason: str
    asked_for: bool = False


@dataclass(frozen=True)
class Window:
    """What one rank takes in one optimizer step.

    Attributes:
        step: The optimizer step, counted from 0.
        micro_batches: The batches whose gradients are accumulated.
        dropped: Samples of this rank that were due in this step and were replaced.
        trimmed: Samples of this rank whose end was cut off.
        shares: Of a mixture, the share of each part in what has been drawn when the step is done.
    """

    step: int
    micro_batches: tuple[Batch, ...]
    dropped: tuple[Dropped, ...]
    trimmed: int = 0
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationBatch:
    """One batch of an evaluation.

    Attributes:
        batch: The batch.
        counted: Of each sample, whether it counts; False for padding and for replacements of unusable samples.
        dropped: Unusable samples that were to count here; the held-out split is measured without them.
        indices: Of each sample, its index in the source; that of the sample it replaces, where it does not count.
        questions: Of each sample, what it asks.
    """

    batch: Batch
    counted: tuple[bool, ...]
    dropped: tuple[Dropped, ...]
    indices: tuple[int, ...] = ()
    questions: tuple[Question, ...] = ()


def training_batches(
    source: Source,
    collator: Collator,
    order: Order,
    batching: Batching,
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    start_step: int,
    num_steps: int,
    num_workers: int,
    pin_memory: bool,
) -> Generator[Window, None, None]:
    """Yields what one rank takes in each optimizer step.

    A sample that does not fit the collator's length, or whose media cannot be read, is replaced by the next index of
    the source that is usable. The workers end when the iterator is exhausted, closed or fails.

    Args:
        source: The samples.
        collator: Encodes and pads them.
        order: Which samples each step takes.
        batching: How these are laid into micro-batches.
        rank: This rank.
        world_size: Number of ranks.
        micro_batch_size: Rows of a batch.
        start_step: First optimizer step, above 0 when a run is resumed.
        num_steps: Number of optimizer steps to yield.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Put tensors into page-locked memory, for GPUs.

    Raises:
        ConfigError: If the global batch cannot be split evenly, or if no usable sample is found.
    """
    steps = range(start_step, start_step + num_steps)
    requests = _TrainingRequests(order, batching, rank, world_size, micro_batch_size, steps)
    requests.of(0)  # answers now if the global batch cannot be split
    loaded = _load(_MicroBatches(source, collator, batching.lengths), requests, num_workers, pin_memory)
    return _windows(loaded, requests)


def evaluation_batches(
    source: Source,
    collator: Collator,
    *,
    num_samples: int,
    rank: int,
    world_size: int,
    micro_batch_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Generator[EvaluationBatch, None, None]:
    """Yields the evaluation batches of one rank; every rank gets equally many, and each sample counts once.

    Args:
        source: The samples.
        collator: Encodes and pads them.
        num_samples: How many of them are measured, from the first on.
        rank: This rank.
        world_size: Number of ranks.
        micro_batch_size: Samples of a batch.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Put tensors into page-locked memory, for GPUs.

    Raises:
        ConfigError: If no usable sample is found.
    """
    slots = evaluation_micro_batches(min(num_samples, len(source)), rank, world_size, micro_batch_size)
    requests = [tuple((Place(slot.index, collator.max_length),) for slot in batch) for batch in slots]
    dataset = _MicroBatches(source, collator, asks=True)
    loaded = _load(dataset, requests, min(num_workers, len(requests)), pin_memory)
    return _evaluations(loaded, slots)


def check_budget(source: Source, collator: Collator, samples: int = 8) -> list[Problem]:
    """Encodes a few samples and returns a problem if none of them is usable: as a rule the length is set too low.

    Args:
        source: The samples.
        collator: Encodes them.
        samples: How many to try, spread evenly over the source.
    """
    count = min(samples, len(source))
    lengths: list[int] = []
    reason = ""
    for index in (i * len(source) // count for i in range(count)):
        try:
            sample = source[index]
            encoded = collator.encoder.encode(sample.messages, world=sample.world)
        except (UnreadableSampleError, ValueError) as error:
            reason = reason or str(error)
            continue
        if collator.fit(encoded) is not None:
            return []
        lengths.append(encoded.input_ids.shape[0])
    if not lengths:
        return [Problem(f"none of {count} samples can be read or encoded; the first one: {reason}", key="data")]
    message = (
        f"none of {len(lengths)} samples fits {collator.max_length} tokens with its images and a part of its answer; "
        f"the shortest has {min(lengths)}"
    )
    return [Problem(message, key="data.max_sequence_length", hint="raise it, or lower model.world.resolution")]


@dataclass(frozen=True)
class _TrainingRequests:
    """The places of every micro-batch of a run, made one by one: a long run has millions."""

    order: Order
    batching: Batching
    rank: int
    world_size: int
    micro_batch_size: int
    steps: range

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in self.steps:
            yield from self.of(step)

    def of(self, step: int) -> list[MicroBatch]:
        """Returns the micro-batches that the rank takes in a step."""
        return self.batching.micro_batches(self.order.indices(step), self.rank, self.world_size, self.micro_batch_size)


@dataclass(frozen=True)
class _Loaded:
    """What a worker made of one micro-batch: the batch, or the error that this process raises in its stead.

    A `ConfigError` travels as a value, since the loader would wrap it in a worker's traceback. `dropped` holds, for
    each sample of the batch, the one that was due there and those that failed in its stead; mostly none. `questions`
    are those of the samples, for evaluations alone.
    """

    flat: FlatBatch | None
    dropped: tuple[tuple[Dropped, ...], ...] = ()
    trimmed: int = 0
    questions: tuple[Question, ...] = ()
    error: ConfigError | None = None

    def pin_memory(self) -> _Loaded:
        return self if self.flat is None else replace(self, flat=self.flat.pin_memory())


class _MicroBatches(Dataset[_Loaded]):
    """Loads a micro-batch, given the places of its samples."""

    def __init__(
        self, source: Source, collator: Collator, lengths: NDArray[np.int32] | None = None, *, asks: bool = False
    ) -> None:
        self._source = source
        self._asks = asks
        self._collator = collator
        self._lengths = lengths
        self._ends = part_ends(source)

    def __getitem__(self, rows: MicroBatch) -> _Loaded:
        try:
            return self._load(rows)
        except ConfigError as error:
            return _Loaded(None, error=error)

    def _load(self, rows: MicroBatch) -> _Loaded:
        loaded: list[list[Encoded]] = []
        dropped: list[tuple[Dropped, ...]] = []
        for row in rows:
            found = [self._usable(place) for place in row]
            loaded.append([pair for pair, _ in found if pair is not None])
            dropped += [before for _, before in found]
            if not loaded[-1]:  # nothing is as short: a row of its own takes any sample
                pair, _ = self._usable(replace(row[0], room=self._collator.max_length))
                assert pair is not None
                loaded[-1].append(pair)
        trimmed = sum(encoded.trimmed > 0 for row in loaded for _, encoded in row)
        questions = tuple(_last_question(*pair) for row in loaded for pair in row) if self._asks else ()
        return _Loaded(self._collator.collate(loaded).flatten(), tuple(dropped), trimmed, questions)

    def _usable(self, place: Place) -> tuple[Encoded | None, tuple[Dropped, ...]]:
        """Returns the first usable sample from a place's index on that fits its room, and the unusable before it.

        None, where no sample is short enough: a packed row then goes without.
        """
        dropped: list[Dropped] = []
        tries = 0
        for candidate in self._candidates(place):
            tries += 1
            try:
                sample = self._source[candidate]
                encoded = self._collator.encode(sample)
            except ExcludedSampleError:
                continue
            except UnreadableSampleError as error:
                dropped.append(Dropped(error.sample_id, error.reason))
                continue
            if encoded is None:
                reason = f"does not fit {self._collator.max_length} tokens with its images and a part of its answer"
                dropped.append(Dropped(sample.id, reason, asked_for=self._collator.too_long == "drop"))
            elif len(encoded.input_ids) <= place.room:
                return (sample, encoded), tuple(dropped)
        if place.room < self._collator.max_length:
            return None, tuple(dropped)
        why = f"the last one, {dropped[-1].sample_id}: {dropped[-1].reason}" if dropped else "all are excluded"
        message = f"none of {tries} samples in a row is usable here; {why}"
        raise ConfigError(Problem(message, key="data", hint="check data.max_sequence_length and the media files"))

    def _candidates(self, place: Place) -> Iterator[int]:
        """Yields a place's own sample and those that may stand in for it: what follows in its part of a mixture.

        In a packed row they are no longer than it, as far as lengths tell.
        """
        following = successors(self._ends, place.index)
        if self._lengths is not None and place.room < self._collator.max_length:
            lengths, room, own = self._lengths, place.room, place.index
            following = (index for index in following if index == own or 0 < lengths[index] <= room)
        return itertools.islice(following, MAX_REPLACEMENTS)


def successors(ends: Sequence[int], index: int) -> Iterator[int]:
    """Yields an index and those that may stand in for it: what follows in its part, after the last one the first.

    Args:
        ends: Index behind the last sample of each part; see `part_ends`.
        index: Of the sample.
    """
    number = bisect_right(ends, index)
    first, end = ends[number - 1] if number else 0, ends[number]
    return (first + (index - first + offset) % (end - first) for offset in range(end - first))


def _last_question(sample: Sample, encoded: EncodedSample) -> Question:
    """Returns what a sample asks last, as far as it was not cut off."""
    begins = torch.nn.functional.pad(encoded.supervised, (1, 0))[:-1] < encoded.supervised
    return question_of(sample, int(begins.sum()) - 1)


def _load(
    dataset: _MicroBatches, requests: Iterable[MicroBatch], num_workers: int, pin_memory: bool
) -> Generator[_Loaded, None, None]:
    """Yields one loaded micro-batch for each request, in order, and ends the workers whatever happens."""
    with closing(in_workers(dataset, requests, num_workers, pin_memory=pin_memory)) as batches:
        for loaded in batches:
            if loaded.error is not None:
                raise loaded.error
            yield loaded


def _windows(loaded: Generator[_Loaded, None, None], requests: _TrainingRequests) -> Generator[Window, None, None]:
    try:
        for step in requests.steps:
            parts = [next(loaded) for _ in requests.of(step)]
            batches = tuple(part.flat.batch() for part in parts if part.flat is not None)
            dropped = tuple(sample for part in parts for place in part.dropped for sample in place)
            yield Window(step, batches, dropped, sum(part.trimmed for part in parts), requests.order.shares(step))
    finally:
        loaded.close()


def _evaluations(
    loaded: Generator[_Loaded, None, None], slots: list[list[EvaluationSlot]]
) -> Generator[EvaluationBatch, None, None]:
    try:
        for part, batch_slots in zip(loaded, slots, strict=True):
            assert part.flat is not None
            places = list(zip(batch_slots, part.dropped, strict=True))
            counted = tuple(slot.counted and not dropped for slot, dropped in places)
            # Only the first is missed here: those that failed in its stead have places of their own.
            missed = tuple(dropped[0] for slot, dropped in places if slot.counted and dropped)
            indices = tuple(slot.index for slot in batch_slots)
            yield EvaluationBatch(part.flat.batch(), counted, missed, indices, part.questions)
    finally:
        loaded.close()
