"""Measuring a stage on held-out samples: losses, what teacher forcing predicts, and the answers that it generates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from theworld_train.accounting.intervals import Estimate, Share, ratio, share
from theworld_train.batch import IGNORE_INDEX, Batch
from theworld_train.config.schema import AnswerMetric, EvaluationSection
from theworld_train.data import EvaluationBatch, Question
from theworld_train.train.loss import LossOutput, num_chunks
from theworld_train.train.runtime import Runtime, take
from theworld_train.train.scoring import is_correct, is_exact, is_normalized
from theworld_train.train.stage import Features, StageModule

#: How an answer of a kind is scored that `evaluation.metrics` does not name.
DEFAULT_METRIC = AnswerMetric(metric="exact")

#: Turns generated tokens into text.
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class SampleResult:
    """What has been measured on one sample.

    Attributes:
        index: Of the sample in its source.
        sample_id: Its id.
        kind: Kind of its question.
        loss: Cross entropy in nats, summed over its supervised tokens.
        tokens: Its supervised tokens.
        predicted: Whether teacher forcing finds every supervised token the most likely one.
        answer: What was generated in the place of its last assistant turn; None if nothing was.
        shares: By share, whether the sample is in it: `predicted`, and of an answer `exact`, `normalized`, `correct`;
            none of a sample without supervised tokens.
        question: What it asks; None where nobody will look at it.
    """

    index: int
    sample_id: str
    kind: str
    loss: float
    tokens: int
    predicted: bool
    answer: str | None
    shares: Mapping[str, bool]
    question: Question | None

    @property
    def correct(self) -> bool:
        """Whether the answer is right; without one, whether the reference is the most likely answer."""
        return self.shares.get("correct", self.predicted)

    def to_dict(self) -> dict[str, Any]:
        """Returns the sample as JSON-ready values."""
        assert self.question is not None
        return {
            "index": self.index,
            "id": self.sample_id,
            "kind": self.kind,
            "question": self.question.text,
            "expected": self.question.expected,
            "answer": self.answer,
            "correct": self.correct,
            "loss": self.loss if math.isfinite(self.loss) else None,
            "tokens": self.tokens,
            "media": [asdict(part) for part in self.question.media],
        }


@dataclass(frozen=True)
class GroupResult:
    """What has been measured on a group of samples.

    Attributes:
        samples: Their number.
        loss: Mean cross entropy in nats per supervised token.
        shares: Shares of them by name; see `SampleResult.shares`.
    """

    samples: int
    loss: Estimate
    shares: Mapping[str, Share]

    @classmethod
    def of(cls, samples: Sequence[SampleResult]) -> GroupResult:
        """Adds samples up."""
        held: dict[str, list[bool]] = {}
        for sample in samples:
            for name, right in sample.shares.items():
                held.setdefault(name, []).append(right)
        shares = {name: share(sum(rights), len(rights)) for name, rights in held.items()}
        loss = ratio([sample.loss for sample in samples], [sample.tokens for sample in samples])
        return cls(len(samples), loss, shares)

    def to_dict(self) -> dict[str, Any]:
        """Returns the group as JSON-ready values."""
        shares = {name: value.to_dict() for name, value in self.shares.items()}
        return {"samples": self.samples, "loss": self.loss.to_dict(), **shares}


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation has measured.

    Attributes:
        total: On all samples.
        kinds: By kind of question.
        dropped: Number of samples that are in no other number, as they could not be read or did not fit.
        answers: The first samples of each kind, in the order of the source.
    """

    total: GroupResult
    kinds: Mapping[str, GroupResult]
    dropped: int
    answers: tuple[SampleResult, ...] = ()

    def metrics(self, prefix: str = "eval") -> dict[str, float]:
        """Returns the result as flat metrics: `eval/loss` of all samples, `eval/loss/<kind>` of a kind, and so on."""
        values: dict[str, float | None] = {}
        for group, suffix in [(self.total, ""), *((group, f"/{kind}") for kind, group in self.kinds.items())]:
            values[f"{prefix}/loss{suffix}"] = group.loss.value
            values |= {f"{prefix}/{name}{suffix}": each.value for name, each in group.shares.items()}
        values[f"{prefix}/dropped"] = self.dropped
        return {name: value for name, value in values.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON-ready values; see decision 15."""
        return {
            "dropped": self.dropped,
            "total": self.total.to_dict(),
            "kinds": {kind: group.to_dict() for kind, group in self.kinds.items()},
            "answers": [sample.to_dict() for sample in self.answers],
        }


def summary_line(result: EvaluationResult) -> str:
    """Says what was measured in a line: `loss 0.1234  correct digit 90.0%, direction 50.0%`."""
    if result.total.loss.value is None:
        return f"nothing, {result.dropped} samples left out"
    name = "correct" if "correct" in result.total.shares else "predicted"
    shares = {kind: group.shares[name] for kind, group in result.kinds.items() if name in group.shares}
    shown = ", ".join(f"{kind} {each.value:.1%}" for kind, each in shares.items())
    dropped = f"  ({result.dropped} samples left out)" if result.dropped else ""
    return f"loss {result.total.loss.value:.4f}  {name} {shown}{dropped}"


class EvaluationTally:
    """Takes in batches of one rank; `result` puts the ranks together."""

    def __init__(self, section: EvaluationSection | None = None) -> None:
        """Args: section: which metric belongs to which kind, and how many answers are kept."""
        self._section = section or EvaluationSection()
        self._samples: list[SampleResult] = []
        self._asked: Counter[str] = Counter()
        self._dropped = 0

    def add(self, item: EvaluationBatch, output: LossOutput, answers: Sequence[str | None]) -> None:
        """Adds the samples of a batch that count.

        Args:
            item: The batch.
            output: Predictions and losses of the supervised tokens of the samples that count.
            answers: What was generated for each sample of the batch, or None.
        """
        assert output.predictions is not None
        assert output.token_losses is not None
        batch = item.batch
        rows = _rows(batch, item.counted)
        right = (output.predictions == batch.labels[:, 1:][rows]).tolist()
        losses = output.token_losses.tolist()
        done = 0
        for row, number in enumerate(rows.sum(-1).tolist()):
            if item.counted[row]:
                own = slice(done, done + number)
                self._take(item, row, math.fsum(losses[own]), right[own], answers[row])
            done += number
        self._dropped += len(item.dropped)

    def _take(self, item: EvaluationBatch, row: int, loss: float, right: Sequence[bool], answer: str | None) -> None:
        kind, question = item.batch.kinds[row], item.questions[row]
        predicted = bool(right) and all(right)
        shares = {"predicted": predicted} if right else {}
        if answer is not None:
            metric = self._section.metrics.get(kind, DEFAULT_METRIC)
            shares["exact"] = is_exact(answer, question.expected)
            shares["normalized"] = is_normalized(answer, question.expected)
            shares["correct"] = is_correct(metric, answer, question.expected)
        self._asked[kind] += 1
        self._samples.append(
            SampleResult(
                index=item.indices[row],
                sample_id=item.batch.sample_ids[row],
                kind=kind,
                loss=loss,
                tokens=len(right),
                predicted=predicted,
                answer=answer,
                shares=shares,
                # A rank's samples come in the order of the source: the first ones of all are among the first of each.
                question=question if self._asked[kind] <= self._section.keep_answers else None,
            )
        )

    def result(self, runtime: Runtime) -> EvaluationResult:
        """Returns what all ranks have measured; on every rank it is the same, and for any number of them."""
        ranks = runtime.gather((self._samples, self._dropped))
        samples = sorted((sample for part, _ in ranks for sample in part), key=lambda sample: sample.index)
        by_kind = {kind: [s for s in samples if s.kind == kind] for kind in sorted({s.kind for s in samples})}
        answers = {s.index: s for part in by_kind.values() for s in part[: self._section.keep_answers]}
        return EvaluationResult(
            GroupResult.of(samples),
            {kind: GroupResult.of(part) for kind, part in by_kind.items()},
            sum(dropped for _, dropped in ranks),
            tuple(answers[index] for index in sorted(answers)),
        )


def _rows(batch: Batch, counted: Sequence[bool]) -> Tensor:
    """Returns the supervised positions of samples that count, `(batch, sequence - 1)`."""
    counts = torch.tensor(counted, device=batch.labels.device)
    return (batch.labels[:, 1:] != IGNORE_INDEX) & counts.unsqueeze(-1)


class Evaluator:
    """Measures batches with a stage."""

    def __init__(
        self,
        stage: StageModule,
        wrapped: nn.Module,
        runtime: Runtime,
        section: EvaluationSection | None = None,
        decode: Decode | None = None,
    ) -> None:
        """Keeps what measuring takes.

        Args:
            stage: The stage.
            wrapped: The same, as the engine wrapped it.
            runtime: The process group.
            section: How long answers may be; by default none are generated.
            decode: Turns tokens into text; needed where answers are generated.
        """
        self._stage = stage
        self._wrapped = wrapped
        self._runtime = runtime
        self._longest = None if section is None else section.max_new_tokens
        assert self._longest is None or decode is not None
        self._decode = decode

    @torch.no_grad()
    def score(self, item: EvaluationBatch, features: Features, chunks: int, tally: EvaluationTally) -> None:
        """Runs one batch through the stage and adds it to a tally; samples that do not count are left out.

        Every rank calls it equally often.

        Args:
            item: The batch, on the stage's device.
            features: What the frozen encoders made of it.
            chunks: Chunks of its loss, as `in_step` tells.
            tally: Takes in what is measured.
        """
        batch = item.batch
        if not all(item.counted):
            uncounted = ~torch.tensor(item.counted, device=batch.labels.device)
            batch = replace(batch, labels=batch.labels.masked_fill(uncounted.unsqueeze(-1), IGNORE_INDEX))
        output: LossOutput = self._wrapped(batch, features, chunks, want_predictions=True)
        answers: list[str | None] = [None] * len(item.counted)
        if self._longest is not None:
            answers = self._answer(batch, features, output, self._longest)
        tally.add(item, output, answers)

    def _answer(self, batch: Batch, features: Features, output: LossOutput, longest: int) -> list[str | None]:
        """Returns the greedy answer to each row's last question; None for rows without labels.

        Where teacher forcing predicts a whole turn, up to the token that ends it, greedy decoding writes that turn.
        """
        assert self._decode is not None
        assert output.predictions is not None
        predictions = torch.full_like(batch.labels, IGNORE_INDEX)
        predictions[:, 1:][batch.labels[:, 1:] != IGNORE_INDEX] = output.predictions
        spans = [_last_turn(labels) for labels in batch.labels.tolist()]
        answers: list[str | None] = [None] * len(spans)
        asked: dict[int, int] = {}
        ends = self._ends_of_turn()
        for row, span in enumerate(spans):
            if span is None:
                continue
            turn = batch.labels[row, span[0] : span[1]]
            known = torch.equal(turn, predictions[row, span[0] : span[1]]) and int(turn[-1]) in ends
            if known and len(turn) <= longest:
                answers[row] = self._text(turn)
            else:
                asked[row] = span[0]
        if any(needed for (needed,) in self._runtime.exchange([bool(asked)])) and (asked or self._stage.lockstep):
            # Where weights are gathered all ranks take part, also one that has nothing to ask.
            begun = asked or {0: 1}
            tokens = self._stage.generate(batch, features, list(begun), list(begun.values()), longest)
            answers = [
                self._text(tokens[list(asked).index(row)]) if row in asked else answer
                for row, answer in enumerate(answers)
            ]
        return answers

    def _ends_of_turn(self) -> frozenset[int]:
        config: Any = self._stage.model.generation_config
        ids = config.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or ())

    def _text(self, tokens: Tensor) -> str:
        assert self._decode is not None
        return self._decode(tokens.tolist()).strip()


def _last_turn(labels: Sequence[int]) -> tuple[int, int] | None:
    """Returns where the last run of labels of a row begins, and the end behind it; None if there is none."""
    places = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
    if not places:
        return None
    first = last = places[-1]
    while first > 0 and labels[first - 1] != IGNORE_INDEX:
        first -= 1
    return first, last + 1


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


def evaluate(
    stage: StageModule,
    wrapped: nn.Module,
    batches: Iterable[EvaluationBatch],
    runtime: Runtime,
    section: EvaluationSection | None = None,
    decode: Decode | None = None,
) -> EvaluationResult:
    """Measures a stage on held-out batches; every rank makes equally many calls.

    Args:
        stage: The stage.
        wrapped: The same, as the engine wrapped it.
        batches: This rank's batches.
        runtime: The process group.
        section: What is measured; by default losses and teacher forcing.
        decode: Turns tokens into text; needed where answers are generated.
    """
    tally = EvaluationTally(section)
    evaluator = Evaluator(stage, wrapped, runtime, section, decode)
    wrapped.eval()
    for item, chunks in in_step(batches, stage.chunk_size, runtime):
        moved = replace(item, batch=item.batch.to(runtime.device))
        evaluator.score(moved, stage.encode(moved.batch), chunks, tally)
    stage.set_training_modes()
    return tally.result(runtime)
