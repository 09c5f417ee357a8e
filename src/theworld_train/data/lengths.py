"""The length of each sample as the model sees it, worked out without its pixels."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from theworld_train.config.errors import ConfigError
from theworld_train.data.collator import Collator
from theworld_train.data.source import Source, UnreadableSampleError
from theworld_train.data.workers import in_workers

#: Samples that a worker takes before it hands on what it has found.
CHUNK = 32

T = TypeVar("T")


def measure_lengths(
    source: Source, collator: Collator, indices: range, num_workers: int, beat: Callable[[], None] = lambda: None
) -> NDArray[np.int32]:
    """Returns `(samples,)` tokens of some samples after the cut to the longest allowed sequence; 0 if unusable.

    What only its pixels tell, a damaged image, is not found here.

    Args:
        source: The samples.
        collator: Encodes them.
        indices: Those that are measured.
        num_workers: Worker processes; 0 measures in this process.
        beat: Called whenever some are done.

    Raises:
        ConfigError: If a row is wrong.
    """
    found: list[int] = []
    for lengths in each_sample(_Length(source, collator), indices, num_workers):
        found += lengths
        beat()
    return np.array(found, dtype=np.int32)


def each_sample(
    function: Callable[[int], T], indices: Sequence[int], num_workers: int
) -> Generator[list[T], None, None]:
    """Yields what a function makes of each index, in their order, some at a time.

    Args:
        function: Called in worker processes.
        indices: What it is called with.
        num_workers: Worker processes; 0 calls it in this process.

    Raises:
        ConfigError: If the function does.
    """
    chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    with closing(in_workers(_Chunks(function), chunks, min(num_workers, len(chunks)))) as found:
        for results in found:
            if isinstance(results, ConfigError):
                raise results
            yield results


class _Length:
    """Measures a sample, given its index."""

    def __init__(self, source: Source, collator: Collator) -> None:
        self._source = source
        self._collator = collator

    def __call__(self, index: int) -> int:
        try:
            encoded = self._collator.encode(self._source.outline(index))
        except UnreadableSampleError:
            return 0
        return 0 if encoded is None else len(encoded.input_ids)


class _Chunks(Dataset[list[T] | ConfigError], Generic[T]):
    def __init__(self, function: Callable[[int], T]) -> None:
        self._function = function

    def __getitem__(self, indices: Sequence[int]) -> list[T] | ConfigError:
        try:
            return [self._function(index) for index in indices]
        except ConfigError as error:
            return error  # as a value: the loader would wrap it in a worker's traceback
