"""What teacher forcing predicts is what greedy decoding writes, and each sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config.components import Component
from theworld_train.config.schema import AnswerMetric, EvaluationSection, RunConfig
from theworld_train.config.sources import MovingDigitsSource
from theworld_train.data import Collator, Dropped, EvaluationBatch, evaluation_batches, open_source, question_of
from theworld_train.model import TheWorld
from theworld_train.train.evaluation import EvaluationResult, EvaluationTally, Evaluator, evaluate, summary_line
from theworld_train.train.loss import LossOutput
from theworld_train.train.runtime import Runtime
from theworld_train.train.stage import StageModule

Stage = Callable[..., StageModule]
SAMPLES = 24


@pytest.fixture
def runtime(run_config: Callable[..., RunConfig]) -> Iterator[Runtime]:
    runtime = Runtime(run_config())
    yield runtime
    runtime.close()


@pytest.fixture(scope="module")
def held_out() -> object:
    return open_source(MovingDigitsSource(source="moving_digits", split="eval", samples=SAMPLES))


@pytest.fixture(scope="module")
def schooled(tiny: TinyCheckpoint) -> TheWorld:
    """A tiny model that has seen a few samples: it answers with a digit or a direction, at times the right one."""
    model = tiny.theworld().requires_grad_(True)
    source = open_source(MovingDigitsSource(source="moving_digits", split="train", samples=512))
    collator = Collator(tiny.processor(), 4096)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(20):
        batch = collator([source[step * 8 + index] for index in range(8)])
        model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            pixel_values=batch.pixel_values,
            world_frames=batch.world_frames,
            world_frame_counts=batch.world_frame_counts,
            labels=batch.labels,
        ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def batches(tiny: TinyCheckpoint, source: object, size: int, number: int = SAMPLES) -> list[EvaluationBatch]:
    options = {"rank": 0, "world_size": 1, "num_workers": 0, "pin_memory": False}
    collator = Collator(tiny.processor(), 4096)
    return list(evaluation_batches(source, collator, num_samples=number, micro_batch_size=size, **options))


def predicted(result: EvaluationResult) -> dict[str, float | None]:
    return {kind: group.shares["predicted"].value for kind, group in result.kinds.items()}


def test_teacher_forcing_predicts_what_greedy_decoding_writes(
    tiny: TinyCheckpoint, make_stage: Stage, schooled: TheWorld, held_out: object, runtime: Runtime
):
    """And the answers of a batch are those that `generate` writes for each question alone."""
    stage = make_stage([], model=schooled)
    processor = tiny.processor()
    section = EvaluationSection(
        max_new_tokens=4,
        metrics={"digit": AnswerMetric(metric="numeric", tolerance=100.0)},
        keep_answers=SAMPLES,
    )
    written: list[str] = []
    by_kind: dict[str, list[bool]] = {"direction": [], "digit": []}
    for index in range(SAMPLES):
        sample = held_out[index]
        processor.enable_world = sample.world  # a sample for plain Gemma 3 has no world tokens
        inputs = processor.apply_chat_template(sample.messages[:1], tokenize=True, add_generation_prompt=True)
        output = schooled.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        end = schooled.generation_config.eos_token_id[1]
        answer = sample.messages[1]["content"][0]["text"]
        expected = [*processor.tokenizer(answer, add_special_tokens=False).input_ids, end]
        by_kind[sample.kind].append(output.tolist()[: len(expected)] == expected)
        written.append(processor.decode_answer(output.tolist()))
    right = [hit for hits in by_kind.values() for hit in hits]
    assert any(right), "a comparison of wrong answers alone would show nothing"
    assert not all(right)
    result = evaluate(stage, stage, batches(tiny, held_out, 7), runtime, section, tiny.processor().decode_answer)
    assert predicted(result) == {kind: sum(hits) / len(hits) for kind, hits in by_kind.items()}
    assert result.total.shares["predicted"].right == sum(right)
    assert {kind: group.samples for kind, group in result.kinds.items()} == {k: len(v) for k, v in by_kind.items()}
    assert [answer.answer for answer in result.answers] == written
    # Answers that differ were generated, others taken from teacher forcing; both count alike.
    assert result.kinds["direction"].shares["exact"].right == sum(by_kind["direction"])
    assert result.kinds["direction"].shares["correct"] == result.kinds["direction"].shares["exact"]
    numbers = [text.isdigit() for text, answer in zip(written, result.answers, strict=True) if answer.kind == "digit"]
    assert result.kinds["digit"].shares["correct"].right == sum(numbers), "every digit is near enough, and no word is"


def test_answers_are_told_with_what_was_asked(
    tiny: TinyCheckpoint, make_stage: Stage, schooled: TheWorld, held_out: object, runtime: Runtime
):
    stage = make_stage([], model=schooled)
    section = EvaluationSection(max_new_tokens=3, keep_answers=2)
    result = evaluate(stage, stage, batches(tiny, held_out, 4), runtime, section, tiny.processor().decode_answer)
    assert [(answer.index, answer.kind) for answer in result.answers] == [
        (0, "direction"),
        (1, "digit"),
        (2, "direction"),
        (3, "digit"),
    ]
    told = result.to_dict()["answers"][1]
    question = question_of(held_out[1])
    assert (told["question"], told["expected"]) == ("Which digit is it?", question.expected)
    assert (told["id"], told["media"]) == ("moving-digits-eval-1", [{"type": "video", "message": 0, "part": 0}])
    assert told["correct"] == (told["answer"] == told["expected"])
    assert "correct digit" in summary_line(result)
    without = evaluate(stage, stage, batches(tiny, held_out, 4), runtime)
    assert without.answers[0].answer is None
    assert set(without.total.shares) == {"predicted"}
    assert without.total.loss == result.total.loss


def test_samples_that_could_not_be_read_are_told(tiny: TinyCheckpoint, held_out: object, runtime: Runtime):
    (item,) = batches(tiny, held_out, 4, 4)
    labels = item.batch.labels[:, 1:]
    item = replace(item, dropped=(Dropped("a", "damaged"), Dropped("b", "too long")))
    result = tally_of(item, labels[labels != -100], runtime)
    assert result.dropped == 2
    assert result.to_dict()["dropped"] == 2
    assert result.metrics()["eval/dropped"] == 2


def same(first: EvaluationResult, second: EvaluationResult) -> bool:
    counts = [{kind: group.samples for kind, group in result.kinds.items()} for result in (first, second)]
    return (
        predicted(first) == predicted(second)
        and counts[0] == counts[1]
        and first.total.loss.value == pytest.approx(second.total.loss.value, rel=1e-6)
    )


def test_result_does_not_depend_on_the_batch_size(
    tiny: TinyCheckpoint, make_stage: Stage, schooled: TheWorld, held_out: object, runtime: Runtime
):
    stage = make_stage([], model=schooled)
    first, *others = [evaluate(stage, stage, batches(tiny, held_out, size, 10), runtime) for size in (10, 1, 4, 7, 16)]
    assert first.total.samples == 10
    assert all(same(first, other) for other in others)


def test_samples_that_do_not_count_are_in_no_number(
    tiny: TinyCheckpoint, make_stage: Stage, schooled: TheWorld, held_out: object, runtime: Runtime
):
    stage = make_stage([], model=schooled)
    (whole,) = batches(tiny, held_out, 6, 6)
    counted = (True, False, True, True, False, False)
    partial = evaluate(stage, stage, [replace(whole, counted=counted)], runtime)
    collator = Collator(tiny.processor(), 4096)
    kept = collator([held_out[index] for index in range(6) if counted[index]])
    chosen = [index for index in range(6) if counted[index]]
    questions = tuple(whole.questions[index] for index in chosen)
    expected = evaluate(stage, stage, [EvaluationBatch(kept, (True,) * 3, (), tuple(chosen), questions)], runtime)
    assert same(partial, expected)
    assert partial.total.samples == 3
    of_all = evaluate(stage, stage, [whole], runtime).total.loss.value
    assert partial.total.loss.value != pytest.approx(of_all, rel=1e-6)


def test_every_batch_takes_one_call_of_what_is_wrapped(
    tiny: TinyCheckpoint, make_stage: Stage, held_out: object, runtime: Runtime
):
    class Wrapped(nn.Module):
        """Stands for an engine, in which each call is a collective: another rank may hold a batch that counts whole."""

        def __init__(self, stage: StageModule) -> None:
            super().__init__()
            self.stage = stage
            self.calls = 0

        def forward(self, *args: object, **kwargs: object) -> object:
            self.calls += 1
            assert not self.training
            assert not torch.is_grad_enabled()
            return self.stage(*args, **kwargs)

    stage = make_stage([Component.WORLD_PROJECTOR])
    wrapped = Wrapped(stage)
    items = batches(tiny, held_out, 4, 6)
    assert [all(item.counted) for item in items] == [True, False]
    evaluate(stage, wrapped, items, runtime)
    assert wrapped.calls == 2


def test_training_modes_are_restored(tiny: TinyCheckpoint, make_stage: Stage, held_out: object, runtime: Runtime):
    stage = make_stage([Component.LANGUAGE_MODEL])
    before = {name: module.training for name, module in stage.model.named_modules()}
    evaluate(stage, stage, batches(tiny, held_out, 2, 2), runtime)
    assert {name: module.training for name, module in stage.model.named_modules()} == before


def tally_of(batch: EvaluationBatch, predictions: Tensor, runtime: Runtime) -> EvaluationResult:
    tally = EvaluationTally()
    losses = torch.full(predictions.shape, 0.75)
    tally.add(batch, LossOutput(losses.sum(), predictions, token_losses=losses), [None] * len(batch.counted))
    return tally.result(runtime)


def test_an_answer_is_right_only_if_each_of_its_tokens_is(tiny: TinyCheckpoint, held_out: object, runtime: Runtime):
    (item,) = batches(tiny, held_out, 4, 4)
    labels = item.batch.labels[:, 1:]
    right = labels[labels != -100]
    assert len(right) == 8
    assert predicted(tally_of(item, right, runtime)) == {"digit": 1.0, "direction": 1.0}
    wrong = right.clone()
    wrong[1] += 1  # the end of the first answer, which is a direction
    result = tally_of(item, wrong, runtime)
    assert predicted(result) == {"digit": 1.0, "direction": 0.5}
    assert result.total.shares["predicted"].value == 0.75
    assert (result.total.loss.value, result.total.loss.count) == (0.75, 8)


def test_names_of_metrics(tiny: TinyCheckpoint, runtime: Runtime):
    source = open_source(MovingDigitsSource(source="moving_digits", split="eval", samples=2, questions=("direction",)))
    (item,) = batches(tiny, source, 2, 2)
    labels = item.batch.labels[:, 1:]
    result = tally_of(item, labels[labels != -100], runtime)
    assert result.metrics() == {
        "eval/loss": 0.75,
        "eval/loss/direction": 0.75,
        "eval/predicted": 1.0,
        "eval/predicted/direction": 1.0,
        "eval/dropped": 0,
    }
    told = result.to_dict()
    assert told["total"] == told["kinds"]["direction"]
    assert told["total"]["loss"] == {"value": 0.75, "low": 0.75, "high": 0.75, "count": 4}
    assert (told["total"]["predicted"]["right"], told["total"]["samples"], told["dropped"]) == (2, 2, 0)


def test_a_sample_without_supervised_tokens_is_in_no_share(tiny: TinyCheckpoint, held_out: object, runtime: Runtime):
    (item,) = batches(tiny, held_out, 4, 4)
    labels = item.batch.labels.clone()
    labels[0] = -100
    predictions = labels[:, 1:][labels[:, 1:] != -100]
    result = tally_of(replace(item, batch=replace(item.batch, labels=labels)), predictions, runtime)
    assert result.total.samples == 4
    assert (result.total.shares["predicted"].right, result.total.shares["predicted"].count) == (3, 3)


def test_nothing_measured_is_no_division_by_zero(runtime: Runtime):
    result = EvaluationTally().result(runtime)
    assert (result.metrics(), dict(result.kinds)) == ({"eval/dropped": 0}, {})
    assert result.to_dict()["total"] == {
        "samples": 0,
        "loss": {"value": None, "low": None, "high": None, "count": 0},
    }
    assert summary_line(result) == "nothing, 0 samples left out"


def test_only_wrong_answers_are_generated(
    tiny: TinyCheckpoint,
    make_stage: Stage,
    schooled: TheWorld,
    held_out: object,
    runtime: Runtime,
    monkeypatch: pytest.MonkeyPatch,
):
    """Where ranks gather weights, one without a question takes part with a row that nobody reads."""
    stage = make_stage([], model=schooled)
    section, decode = EvaluationSection(max_new_tokens=2), tiny.processor().decode_answer
    (item,) = batches(tiny, held_out, SAMPLES)
    asked: list[list[int]] = []
    generate = stage.generate

    def count(batch: object, features: object, rows: list[int], ends: list[int], longest: int) -> Tensor:
        asked.append(rows)
        alone = not stage.lockstep  # else it would ask the other ranks whether they are done
        return generate(batch, features, rows, ends, longest) if alone else torch.zeros(len(rows), 1)

    monkeypatch.setattr(stage, "generate", count)
    result = evaluate(stage, stage, [item], runtime, section, decode)
    right = result.total.shares["predicted"].right
    assert right > 0
    assert [len(rows) for rows in asked] == [SAMPLES - right]

    # Where teacher forcing finds every reference, there is nothing to ask.
    asked.clear()
    evaluator, features = Evaluator(stage, stage, runtime, section, decode), stage.encode(item.batch)
    labels = item.batch.labels[:, 1:]
    found = LossOutput(torch.zeros(()), labels[labels != -100])
    references = [question.expected for question in item.questions]
    assert evaluator._answer(item.batch, features, found, 2) == references
    assert asked == []
    monkeypatch.setattr(runtime, "exchange", lambda values: [values, [True]])  # another rank has a question
    assert evaluator._answer(item.batch, features, found, 2) == references
    assert asked == []
    stage.lockstep = True
    assert evaluator._answer(item.batch, features, found, 2) == references
    assert asked == [[0]]
    # What is longer than a generated answer may be is not taken from teacher forcing.
    stage.lockstep = False
    asked.clear()
    cut = evaluator._answer(item.batch, features, found, 1)
    assert asked == [[*range(SAMPLES)]]
    assert cut != references
