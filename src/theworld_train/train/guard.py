"""Numbers that go wrong: gradients that are not finite, and losses that stand out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from statistics import median

from theworld_train.config.errors import ConfigError, Problem

#: A loss of so many times the median of the steps before it is a spike.
SPIKE_FACTOR = 4.0
#: Steps whose median it is compared with, and how many of them there must be.
SPIKE_WINDOW = 32
SPIKE_HISTORY = 8


class NumbersGuard:
    """Follows the loss and the skipped steps of a run; all ranks see the same and so decide alike."""

    def __init__(self, max_skipped: int) -> None:
        """Args: max_skipped: steps in a row that may be skipped before the run ends."""
        self._max_skipped = max_skipped
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._skipped = 0

    def is_spike(self, loss: float) -> bool:
        """Takes the next step's loss and says whether it stands out; it takes some steps to know what is usual."""
        spike = len(self._losses) >= SPIKE_HISTORY and loss > SPIKE_FACTOR * median(self._losses)
        if math.isfinite(loss):
            self._losses.append(loss)
        return spike

    def count(self, *, skipped: bool, step: int, sample_ids: Sequence[str]) -> None:
        """Counts a step.

        Args:
            skipped: Whether its gradient was not finite.
            step: Optimizer steps done, this one included.
            sample_ids: The window's samples on all ranks, if it was skipped.

        Raises:
            ConfigError: If it is one too many in a row.
        """
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped >= self._max_skipped:
            raise ConfigError(
                Problem(
                    f"{self._skipped} steps in a row had a gradient that is not finite, the last one step {step} with "
                    f"the samples {', '.join(sample_ids)}",
                    key="training.max_skipped_steps",
                    value=self._max_skipped,
                    hint="weights are as before these steps; look at the samples, or lower the learning rate",
                )
            )
