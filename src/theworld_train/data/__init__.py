"""Conversations from files, the hub or a generator, made into padded batches in a reproducible order."""

from __future__ import annotations

from theworld_train.config.schema import HubSource, JsonlSource, MovingDigitsSource
from theworld_train.data.batching import Batching
from theworld_train.data.collator import Collator
from theworld_train.data.lengths import measure_lengths
from theworld_train.data.loader import (
    Dropped,
    EvaluationBatch,
    Window,
    check_budget,
    evaluation_batches,
    training_batches,
)
from theworld_train.data.order import TrainingOrder, accumulation_steps
from theworld_train.data.source import MediaError, Sample, Source, UnreadableSampleError

__all__ = [
    "Batching",
    "Collator",
    "Dropped",
    "EvaluationBatch",
    "MediaError",
    "Sample",
    "Source",
    "TrainingOrder",
    "UnreadableSampleError",
    "Window",
    "accumulation_steps",
    "check_budget",
    "evaluation_batches",
    "measure_lengths",
    "open_source",
    "training_batches",
]


def open_source(config: JsonlSource | HubSource | MovingDigitsSource) -> Source:
    """Opens the source that a section of the run config describes.

    Raises:
        ConfigError: If it is missing or empty.
    """
    # Each kind is imported when it is asked for: two of them need large packages that the others do without.
    if isinstance(config, JsonlSource):
        from theworld_train.data.jsonl import JsonlConversations

        return JsonlConversations(config)
    if isinstance(config, HubSource):
        from theworld_train.data.hub import HubConversations

        return HubConversations(config)
    from theworld_train.data.moving_digits import MovingDigits

    return MovingDigits(config)
