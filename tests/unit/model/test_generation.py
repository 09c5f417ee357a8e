"""Protects generation: the cache changes nothing, inputs survive prefill and expansion, world tokens stay inside."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchFeature, LogitsProcessor, LogitsProcessorList

from tests.helpers.tiny import Message, TinyCheckpoint, clip, image, user
from theworld_train.model import TheWorld, TheWorldProcessor

GREEDY: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
CONVERSATIONS: list[list[Message]] = [
    [user("Which way", clip(1), "does it move?", image(2))],
    [user("Which digit is it?")],
    [user(image(4), clip(5, frames=9), "up", image(6))],
]


@pytest.fixture(scope="module")
def model(tiny: TinyCheckpoint) -> TheWorld:
    model = tiny.theworld()
    torch.nn.init.normal_(model.world_projector.temporal, generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = None  # every answer has full length, so that they can be compared
    return model


@pytest.fixture(scope="module")
def processor(tiny: TinyCheckpoint) -> TheWorldProcessor:
    return tiny.processor()


def prompts(processor: TheWorldProcessor, *indices: int) -> BatchFeature:
    conversations = [CONVERSATIONS[index] for index in indices]
    return processor.apply_chat_template(conversations, tokenize=True, add_generation_prompt=True)


def answers(output: Any, inputs: BatchFeature) -> Tensor:
    return output.sequences[:, inputs["input_ids"].shape[1] :]


class Favour(LogitsProcessor):
    """Makes some tokens by far the most likely."""

    def __init__(self, tokens: tuple[int, ...], by: float = 1e4) -> None:
        self.tokens, self.by = list(tokens), by

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.tokens] += self.by
        return scores


@pytest.mark.parametrize("indices", [(0,), (0, 1, 2)], ids=str)
def test_a_cache_changes_nothing(model: TheWorld, processor: TheWorldProcessor, indices: tuple[int, ...]):
    inputs = prompts(processor, *indices)
    with_cache = model.generate(**inputs, **GREEDY, use_cache=True)
    without = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(with_cache.sequences, without.sequences)
    for a, b in zip(with_cache.logits, without.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_generation_is_greedy_forward(model: TheWorld, processor: TheWorldProcessor):
    """Token by token, generate gives what forward gives on the whole sequence."""
    inputs = prompts(processor, 0)
    output = model.generate(**inputs, **GREEDY)
    ids = output.sequences
    types = torch.nn.functional.pad(inputs["token_type_ids"], (0, ids.shape[1] - inputs["input_ids"].shape[1]))
    visuals = {name: inputs[name] for name in ("pixel_values", "world_frames", "world_frame_counts")}
    with torch.no_grad():
        logits = model(input_ids=ids, token_type_ids=types, attention_mask=torch.ones_like(ids), **visuals).logits
    expected = torch.stack(output.logits, dim=1)
    torch.testing.assert_close(logits[:, -1 - GREEDY["max_new_tokens"] : -1], expected, rtol=0, atol=1e-4)


def test_answers_do_not_depend_on_the_batch(model: TheWorld, processor: TheWorldProcessor):
    together = prompts(processor, 0, 1, 2)
    expected = [answers(model.generate(**(one := prompts(processor, i)), **GREEDY), one)[0] for i in range(3)]
    assert torch.equal(answers(model.generate(**together, **GREEDY), together), torch.stack(expected))


@pytest.mark.parametrize("what", ["world_frames", "pixel_values"])
def test_what_is_shown_reaches_every_step(model: TheWorld, processor: TheWorldProcessor, what: str):
    inputs = prompts(processor, 0)
    before = model.generate(**inputs, **GREEDY)
    inputs[what] = -inputs[what]
    after = model.generate(**inputs, **GREEDY)
    same = (before.sequences == after.sequences)[0]
    steps = [(a - b).abs().max() for a, b in zip(before.logits, after.logits, strict=True)]
    assert min(steps) > 1e-3
    assert same[: inputs["input_ids"].shape[1]].all()


@pytest.mark.parametrize("use_cache", [True, False])
def test_visual_inputs_are_encoded_once_with_a_cache(
    model: TheWorld, processor: TheWorldProcessor, monkeypatch: pytest.MonkeyPatch, use_cache: bool
):
    seen: list[tuple[int, bool]] = []
    forward = type(model).forward

    def spy(self: TheWorld, *args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["input_ids"].shape[1], kwargs.get("world_frames") is not None))
        return forward(self, *args, **kwargs)

    spy.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined] # generate looks at it
    monkeypatch.setattr(type(model), "forward", spy)
    inputs = prompts(processor, 0)
    model.generate(**inputs, **GREEDY, use_cache=use_cache)
    length = inputs["input_ids"].shape[1]
    later = [(1, False)] * 5 if use_cache else [(length + step, True) for step in range(1, 6)]
    assert seen == [(length, True), *later]


@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"do_sample": True}, {"do_sample": False, "num_beams": 3}], ids=str
)
def test_placeholders_are_never_generated(model: TheWorld, processor: TheWorldProcessor, settings: dict[str, Any]):
    inputs, world = prompts(processor, 0, 1), (*model.config.world_token_ids, model.config.image_token_id)
    favoured = LogitsProcessorList([Favour(world)])
    output = model.generate(**inputs, max_new_tokens=4, **settings, logits_processor=favoured)
    assert not torch.isin(output[:, inputs["input_ids"].shape[1] :], torch.tensor(world)).any()
    assert len(favoured) == 1, "the caller's list was changed"


def test_the_callers_processors_are_kept(model: TheWorld, processor: TheWorldProcessor):
    inputs = prompts(processor, 1)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False, logits_processor=[Favour((42,))])
    assert output[0, -4:].tolist() == [42] * 4


def test_world_tokens_are_not_generated_when_the_weights_prefer_them(
    tiny: TinyCheckpoint, processor: TheWorldProcessor
):
    model, inputs = tiny.theworld(), prompts(processor, 0)
    world = list(model.config.world_token_ids)
    with torch.no_grad():
        first = answers(model.generate(**inputs, **GREEDY), inputs)[0, 0]
        model.lm_head.weight[world] = 3 * model.lm_head.weight[first]
        assert int(model(**inputs).logits[0, -1].argmax()) in world
    output = model.generate(**inputs, **GREEDY)
    assert not set(answers(output, inputs)[0].tolist()) & set(world)


def test_without_world_path_images_alone_are_suppressed(tiny: TinyCheckpoint):
    model, processor = tiny.theworld(enable_world=False), tiny.processor(enable_world=False)
    token, image = model.config.world_token_id, model.config.image_token_id
    inputs = prompts(processor, 1)
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False, logits_processor=[Favour((token, image))])
    assert output[0, -2:].tolist() == [token] * 2


@pytest.mark.parametrize("beams", [1, 3])
def test_several_answers_each_see_their_own_pictures(model: TheWorld, processor: TheWorldProcessor, beams: int):
    """Beams and samples repeat a prompt; with images per prompt unequal, each copy needs exactly its own."""
    settings = {"num_beams": 3, "num_return_sequences": beams, "do_sample": False, "max_new_tokens": 5}
    together = prompts(processor, 0, 1, 2)
    output = model.generate(**together, **settings)[:, together["input_ids"].shape[1] :].view(3, beams, -1)
    for index in range(3):
        one = prompts(processor, index)
        expected = model.generate(**one, **settings)[:, one["input_ids"].shape[1] :]
        assert torch.equal(output[index], expected)


def test_samples_of_one_prompt_start_from_the_same_logits(model: TheWorld, processor: TheWorldProcessor):
    inputs = prompts(processor, 2, 0, 1)
    greedy = model.generate(**inputs, **GREEDY).logits[0]
    torch.manual_seed(0)
    settings = GREEDY | {"do_sample": True, "num_return_sequences": 4}
    sampled = model.generate(**inputs, **settings)
    torch.testing.assert_close(sampled.logits[0], greedy.repeat_interleave(4, dim=0), rtol=0, atol=1e-4)
    assert sampled.sequences.shape[0] == 12


def test_expansion_repeats_blocks_conversation_by_conversation(model: TheWorld, processor: TheWorldProcessor):
    inputs = prompts(processor, 0, 1, 2)
    ids, rest = model._expand_inputs_for_generation(expand_size=2, **inputs)
    assert torch.equal(ids, inputs["input_ids"].repeat_interleave(2, dim=0))
    assert tuple(inputs["world_frame_counts"].tolist()) == (5, 1, 1, 9, 1)
    assert rest["world_frame_counts"] == (5, 1, 5, 1, 1, 9, 1, 1, 9, 1)
    first, last = inputs["world_frames"].split([6, 11])
    assert torch.equal(rest["world_frames"], torch.cat([first, first, last, last]))
    first, last = inputs["pixel_values"].split([2, 3])
    assert torch.equal(rest["pixel_values"], torch.cat([first, first, last, last]))
