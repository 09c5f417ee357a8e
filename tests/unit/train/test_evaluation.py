"""Held-out accuracy is what greedy decoding would score, and each sample counts once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config.components import Component
from theworld_train.config.schema import RunConfig
from theworld_train.config.sources import MovingDigitsSource
from theworld_train.data import Collator, Dropped, EvaluationBatch, evaluation_batches, open_source
from theworld_train.model import TheWorld
from theworld_train.train.evaluation import TOTAL, EvaluationResult, EvaluationTally, evaluate, score
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


def test_exact_match_is_what_greedy_decoding_scores(
    tiny: TinyCheckpoint, make_stage: Stage, schooled: TheWorld, held_out: object, runtime: Runtime
):
    stage = make_stage([], model=schooled)
    processor = tiny.processor()
    by_kind: dict[str, list[bool]] = {"direction": [], "digit": []}
    for index, item in enumerate(batches(tiny, held_out, 1)):
        sample = held_out[index]
        tally = EvaluationTally()
        score(stage, stage, item, stage.encode(item.batch), 1, tally)
        measured = tally.result(runtime).accuracy[sample.kind]
        inputs = processor.apply_chat_template(sample.messages[:1], tokenize=True, add_generation_prompt=True)
        output = schooled.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        end = schooled.generation_config.eos_token_id[1]
        answer = sample.messages[1]["content"][0]["text"]
        expected = [*processor.tokenizer(answer, add_special_tokens=False).input_ids, end]
        assert len(expected) == 2
        generated = output.tolist()[:2]
        assert measured == float(generated == expected), f"{sample.id}: {generated} for {expected}"
        by_kind[sample.kind].append(generated == expected)
    right = [hit for hits in by_kind.values() for hit in hits]
    assert any(right), "a comparison of wrong answers alone would show nothing"
    assert not all(right)
    result = evaluate(stage, stage, batches(tiny, held_out, 7), runtime)
    assert result.accuracy == {kind: sum(hits) / len(hits) for kind, hits in by_kind.items()} | {
        TOTAL: sum(right) / SAMPLES
    }
    assert result.samples == {kind: len(hits) for kind, hits in by_kind.items()}


def test_samples_that_could_not_be_read_are_told(tiny: TinyCheckpoint, held_out: object, runtime: Runtime):
    (item,) = batches(tiny, held_out, 4, 4)
    labels = item.batch.labels[:, 1:]
    item = replace(item, dropped=(Dropped("a", "damaged"), Dropped("b", "too long")))
    result = tally_of(item, labels[labels != -100], runtime)
    assert result.dropped == 2
    assert result.to_dict()["dropped"] == 2
    assert result.metrics()["eval/dropped"] == 2


def same(first: EvaluationResult, second: EvaluationResult) -> bool:
    return (first.accuracy, first.samples) == (second.accuracy, second.samples) and first.loss == pytest.approx(
        second.loss, rel=1e-6
    )


def test_result_does_not_depend_on_the_batch_size(
    tiny: TinyCheckpoint, make_stage: Stage, schooled: TheWorld, held_out: object, runtime: Runtime
):
    stage = make_stage([], model=schooled)
    first, *others = [evaluate(stage, stage, batches(tiny, held_out, size, 10), runtime) for size in (10, 1, 4, 7, 16)]
    assert sum(first.samples.values()) == 10
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
    expected = evaluate(stage, stage, [EvaluationBatch(kept, (True,) * 3, ())], runtime)
    assert same(partial, expected)
    assert sum(partial.samples.values()) == 3
    assert partial.loss != pytest.approx(evaluate(stage, stage, [whole], runtime).loss, rel=1e-6)


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
    tally.add(batch, 6.0, predictions)
    return tally.result(runtime)


def test_an_answer_is_right_only_if_each_of_its_tokens_is(tiny: TinyCheckpoint, held_out: object, runtime: Runtime):
    (item,) = batches(tiny, held_out, 4, 4)
    labels = item.batch.labels[:, 1:]
    right = labels[labels != -100]
    assert len(right) == 8
    assert tally_of(item, right, runtime).accuracy == {"digit": 1.0, "direction": 1.0, TOTAL: 1.0}
    wrong = right.clone()
    wrong[1] += 1  # the end of the first answer, which is a direction
    assert tally_of(item, wrong, runtime).accuracy == {"digit": 1.0, "direction": 0.5, TOTAL: 0.75}
    assert tally_of(item, wrong, runtime).loss == 6.0 / 8


def test_one_kind_needs_no_overall_accuracy(tiny: TinyCheckpoint, runtime: Runtime):
    source = open_source(MovingDigitsSource(source="moving_digits", split="eval", samples=2, questions=("direction",)))
    (item,) = batches(tiny, source, 2, 2)
    labels = item.batch.labels[:, 1:]
    result = tally_of(item, labels[labels != -100], runtime)
    assert result.accuracy == {"direction": 1.0}
    assert result.metrics() == {"eval/loss": 1.5, "eval/accuracy/direction": 1.0, "eval/dropped": 0}
    assert result.to_dict() == {
        "loss": 1.5,
        "accuracy": {"direction": 1.0},
        "samples": {"direction": 2},
        "dropped": 0,
    }


def test_nothing_measured_is_no_division_by_zero(runtime: Runtime):
    result = EvaluationTally().result(runtime)
    assert (result.loss, result.accuracy, result.samples, result.dropped) == (0.0, {}, {}, 0)
