"""Conversations from files, the hub or a generator, made into padded batches in a reproducible order."""

from __future__ import annotations

from theworld_train.config.sources import (
    AS_GIVEN,
    ClipsSource,
    FileSource,
    HubSource,
    MixtureSource,
    SourceSection,
    WebDatasetSource,
    WorldFrames,
)
from theworld_train.data.batching import Batching
from theworld_train.data.collator import Collator
from theworld_train.data.conversations import Conversations
from theworld_train.data.exclusion import Check, ExcludingSource, check_rows, read_exclusions
from theworld_train.data.lengths import each_sample, measure_lengths
from theworld_train.data.loader import (
    Dropped,
    EvaluationBatch,
    Window,
    check_budget,
    evaluation_batches,
    training_batches,
)
from theworld_train.data.mixture import MixedSource, MixtureOrder, part_ends, part_sizes, parts_of
from theworld_train.data.order import Groups, Order, TrainingOrder, accumulation_steps
from theworld_train.data.rollouts import RolloutSource
from theworld_train.data.source import (
    ExcludedSampleError,
    MediaError,
    MediaPart,
    Question,
    Sample,
    Source,
    UnreadableSampleError,
    question_of,
)
from theworld_train.data.workers import in_workers

__all__ = [
    "Batching",
    "Check",
    "Collator",
    "Conversations",
    "Dropped",
    "EvaluationBatch",
    "ExcludedSampleError",
    "ExcludingSource",
    "MediaError",
    "MediaPart",
    "MixedSource",
    "MixtureOrder",
    "Order",
    "Question",
    "Sample",
    "Source",
    "TrainingOrder",
    "UnreadableSampleError",
    "Window",
    "accumulation_steps",
    "check_budget",
    "check_rows",
    "each_sample",
    "evaluation_batches",
    "in_workers",
    "measure_lengths",
    "open_source",
    "part_ends",
    "part_sizes",
    "question_of",
    "read_exclusions",
    "training_batches",
    "training_order",
]


def open_source(config: SourceSection | MixtureSource, world: WorldFrames = AS_GIVEN) -> Source:
    """Opens the source that a section of the run config describes.

    Args:
        config: The section.
        world: Which frames its samples hold.

    Raises:
        ConfigError: If it is missing or empty.
    """
    if isinstance(config, MixtureSource):
        return MixedSource({name: open_source(part.data, world) for name, part in config.parts.items()})
    source = _open_leaf(config, world)
    return RolloutSource(source, world.steps, world.rollout) if world.frames == "rollout" and world.steps else source


def _open_leaf(config: SourceSection, world: WorldFrames) -> Source:
    # Each kind is imported when it is asked for: some of them need large packages that the others do without.
    if isinstance(config, FileSource):
        from theworld_train.data.files import open_file

        return open_file(config, world)
    if isinstance(config, WebDatasetSource):
        from theworld_train.data.webdataset import open_shards

        return open_shards(config, world)
    if isinstance(config, ClipsSource):
        from theworld_train.data.clips import open_clips

        return open_clips(config, world)
    if isinstance(config, HubSource):
        from theworld_train.data.hub import open_hub

        return open_hub(config, world)
    from theworld_train.data.moving_digits import MovingDigits

    return MovingDigits(config, world)


def training_order(config: SourceSection | MixtureSource, source: Source, seed: int, global_batch_size: int) -> Order:
    """Returns the order in which training takes the samples of a source.

    Args:
        config: What the source was opened from.
        source: The source.
        seed: Seed of the order.
        global_batch_size: Samples in one optimizer step, over all ranks.

    Raises:
        ConfigError: If there are no samples.
    """
    if isinstance(config, MixtureSource):
        assert isinstance(source, MixedSource)
        groups = {name: _groups_of(part) for name, part in source.parts.items()}
        return MixtureOrder(parts_of(config, source.sizes, groups), seed, global_batch_size)
    return TrainingOrder(len(source), seed, global_batch_size, _groups_of(source))


def _groups_of(source: Source) -> Groups | None:
    if isinstance(source, RolloutSource):
        return _groups_of(source.source)
    return source.groups if isinstance(source, Conversations) else None
