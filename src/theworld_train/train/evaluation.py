"""Measuring a stage on held-out samples: loss, and how many answers are exactly right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from theworld_train.batch import IGNORE_INDEX
from theworld_train.data import EvaluationBatch
from theworld_train.train.loss import num_chunks
from theworld_train.train.runtime import Runtime, take
from theworld_train.train.stage import Features, StageModule

#: Name of the accuracy over all kinds of question.
TOTAL = "total"


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation has measured.

    Attributes:
        loss: Mean cross entropy in nats per supervised token.
        accuracy: Share of samples whose every supervised token is predicted from the reference before it, by kind and
            (`total`) over all kinds. With one assistant turn this is the share that greedy decoding answers exactly.
        samples: Number of samples by kind.
        dropped: Number of samples that are in no other number, as they could not be read or did not fit.
    """

    loss: float
    accuracy: Mapping[str, float]
    samples: Mapping[str, int]
    dropped: int

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Returns the result as flat metrics."""
        accuracy = {f"{prefix}/accuracy/{kind}": value for kind, value in self.accuracy.items()}
        return {f"{prefix}/loss": self.loss, **accuracy, f"{prefix}/dropped": self.dropped}

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON-ready values."""
        return {
            "loss": self.loss,
            "accuracy": dict(self.accuracy),
            "samples": dict(self.samples),
            "dropped": self.dropped,
        }


class EvaluationTally:
    """Adds up batches of one rank; `result` adds up ranks."""

    def __init__(self) -> None:
        """Starts from nothing."""
        self._loss = 0.0
        self._tokens = 0
        self._right: dict[str, int] = defaultdict(int)
        self._samples: dict[str, int] = defaultdict(int)
        self._dropped = 0

    def add(self, item: EvaluationBatch, loss_sum: float, predictions: Tensor) -> None:
        """Adds a batch whose samples all count, or those of a mixed one that do.

        Args:
            item: The batch.
            loss_sum: Loss summed over the supervised tokens of the counted samples.
            predictions: `(supervised tokens,)` in row-major order.
        """
        batch = item.batch
        labels = batch.labels[:, 1:]
        supervised = labels != IGNORE_INDEX
        right = torch.ones_like(supervised)
        right[supervised] = predictions == labels[supervised]
        exact = right.all(-1).tolist()
        self._loss += loss_sum
        for row, counts in enumerate(item.counted):
            if counts:
                kind = batch.kinds[row]
                self._tokens += int(supervised[row].sum())
                self._right[kind] += bool(exact[row])
                self._samples[kind] += 1
        self._dropped += len(item.dropped)

    def result(self, runtime: Runtime) -> EvaluationResult:
        """Returns the sums over all ranks."""
        ranks = runtime.gather((self._loss, self._tokens, dict(self._right), dict(self._samples), self._dropped))
        kinds = sorted({kind for part in ranks for kind in part[3]})
        right = {kind: sum(part[2].get(kind, 0) for part in ranks) for kind in kinds}
        samples = {kind: sum(part[3].get(kind, 0) for part in ranks) for kind in kinds}
        accuracy = {kind: right[kind] / samples[kind] for kind in kinds}
        if len(kinds) > 1:
            accuracy[TOTAL] = sum(right.values()) / sum(samples.values())
        loss, tokens = sum(part[0] for part in ranks), sum(part[1] for part in ranks)
        return EvaluationResult(loss / max(1, tokens), accuracy, samples, sum(part[4] for part in ranks))


def in_step(
    batches: Iterable[EvaluationBatch], chunk_size: int, runtime: Runtime
) -> Generator[tuple[EvaluationBatch, int], None, None]:
    """Yields this rank's batches with the chunks of their loss, equal on all ranks; all ranks stop if one has none.

    Raises:
        ConfigError: If the data of any rank fail.
    """
    iterator = iter(batches)
    while True:
        item, error = take(iterator)
        chunks = 0 if item is None else num_chunks(item.batch.num_supervised, chunk_size)
        ranks = runtime.exchange([error is not None, chunks])
        if any(failed for failed, _ in ranks):
            runtime.raise_failures(error)
        if item is None:
            return
        yield item, int(max(number for _, number in ranks))


@torch.no_grad()
def score(
    stage: StageModule,
    wrapped: nn.Module,
    item: EvaluationBatch,
    features: Features,
    chunks: int,
    tally: EvaluationTally,
) -> None:
    """Runs one batch through the stage, in one call, and adds it to a tally; samples that do not count are left out."""
    if not all(item.counted):
        uncounted = ~torch.tensor(item.counted, device=item.batch.labels.device)
        labels = item.batch.labels.masked_fill(uncounted.unsqueeze(-1), IGNORE_INDEX)
        item = replace(item, batch=replace(item.batch, labels=labels))
    output = wrapped(item.batch, features, chunks, want_predictions=True)
    assert output.predictions is not None
    tally.add(item, float(output.loss_sum), output.predictions)


def evaluate(
    stage: StageModule,
    wrapped: nn.Module,
    batches: Iterable[EvaluationBatch],
    runtime: Runtime,
) -> EvaluationResult:
    """Measures a stage on held-out batches; every rank makes equally many calls.

    Args:
        stage: The stage.
        wrapped: The same, as the engine wrapped it.
        batches: This rank's batches.
        runtime: The process group.
    """
    tally = EvaluationTally()
    wrapped.eval()
    for item, chunks in in_step(batches, stage.chunk_size, runtime):
        moved = EvaluationBatch(item.batch.to(runtime.device), item.counted, item.dropped)
        score(stage, wrapped, moved, stage.encode(moved.batch), chunks, tally)
    stage.set_training_modes()
    return tally.result(runtime)
