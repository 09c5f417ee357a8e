"""The length of each sample as the model sees it, worked out without its pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from theworld_train.config.errors import ConfigError
from theworld_train.data.collator import Collator
from theworld_train.data.source import Source, UnreadableSampleError
from theworld_train.data.workers import end_workers, start_worker

#: Samples that a worker measures before it hands their lengths on.
CHUNK = 256


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
    chunks = [indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)]
    loader: DataLoader[_Measured] = DataLoader(
        _Lengths(source, collator),
        batch_size=None,
        sampler=chunks,
        num_workers=min(num_workers, len(chunks)),
        worker_init_fn=start_worker,
        collate_fn=_identity,
    )
    iterator = iter(loader)
    found: list[int] = []
    try:
        for lengths in iterator:
            if isinstance(lengths, ConfigError):
                raise lengths
            found += lengths
            beat()
    finally:
        end_workers(iterator)
    return np.array(found, dtype=np.int32)


_Measured = list[int] | ConfigError


class _Lengths(Dataset[_Measured]):
    """Measures samples, given their indices."""

    def __init__(self, source: Source, collator: Collator) -> None:
        self._source = source
        self._collator = collator

    def __getitem__(self, indices: Sequence[int]) -> _Measured:
        try:
            return [self._length(index) for index in indices]
        except ConfigError as error:
            return error  # as a value: the loader would wrap it in a worker's traceback

    def _length(self, index: int) -> int:
        try:
            encoded = self._collator.encode(self._source.outline(index))
        except UnreadableSampleError:
            return 0
        return 0 if encoded is None else len(encoded.input_ids)


def _identity(lengths: _Measured) -> _Measured:
    return lengths
