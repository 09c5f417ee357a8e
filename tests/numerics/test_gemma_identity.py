"""Without its world path TheWorld is Gemma 3, to the last bit; with it, what it adds stays where world tokens are."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import BatchFeature, Gemma3ForConditionalGeneration

from tests.helpers.tiny import TinyCheckpoint, assistant, image, user
from theworld_train.model import TheWorld

IMAGES = [
    [user(image(1), "Which digit is it?"), assistant("5"), user(image(2), "Which way does it move?")],
    [user("Which of ", image(3), " is it?")],
]
TEXT = [[user("Which digit is it?")], [user("Which way does it move?"), assistant("left"), user("Which digit is it?")]]
CONVERSATIONS = {"images": IMAGES, "text": TEXT}


@dataclass
class Pair:
    gemma3: Gemma3ForConditionalGeneration
    theworld: TheWorld


@pytest.fixture(
    scope="module",
    params=[(dtype, attention) for dtype in (torch.float32, torch.bfloat16) for attention in ("sdpa", "eager")],
    ids=lambda param: f"{str(param[0]).removeprefix('torch.')}-{param[1]}",
)
def pair(request: pytest.FixtureRequest, tiny: TinyCheckpoint) -> Pair:
    dtype, attention = request.param
    settings = {"dtype": dtype, "attn_implementation": attention}
    pair = Pair(tiny.gemma3(**settings), TheWorld.from_pretrained(tiny.gemma, enable_world=False, **settings))
    for model in (pair.gemma3, pair.theworld):
        assert model.dtype == dtype
        assert model.config.get_text_config()._attn_implementation == attention
    return pair


def batch(tiny: TinyCheckpoint, kind: str) -> BatchFeature:
    """Returns prompts of unequal length, padded on the left, from Gemma 3's own processor."""
    return tiny.gemma3_processor().apply_chat_template(
        CONVERSATIONS[kind],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_logits_are_gemmas(pair: Pair, tiny: TinyCheckpoint, kind: str):
    inputs = batch(tiny, kind)
    assert ("pixel_values" in inputs) == (kind == "images")
    with torch.no_grad():
        expected, actual = (model(**inputs).logits for model in (pair.gemma3, pair.theworld))
    assert (expected - actual).abs().max() == 0
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_greedy_generation_is_gemmas(pair: Pair, tiny: TinyCheckpoint, kind: str):
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    inputs = batch(tiny, kind)
    expected, actual = (model.generate(**inputs, **settings) for model in (pair.gemma3, pair.theworld))
    assert torch.equal(expected.sequences, actual.sequences)
    assert len(expected.logits) == len(actual.logits) == 8
    assert max((a - b).abs().max() for a, b in zip(expected.logits, actual.logits, strict=True)) == 0


def test_loss_and_gradients_are_gemmas(tiny: TinyCheckpoint):
    inputs = batch(tiny, "images")
    gradients = []
    for model in (tiny.gemma3(), TheWorld.from_pretrained(tiny.gemma, enable_world=False)):
        model.requires_grad_(True).train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    expected, actual = gradients
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_without_world_blocks_the_world_path_changes_nothing(tiny: TinyCheckpoint):
    gemma3, theworld = tiny.gemma3(), tiny.theworld()
    with torch.no_grad():
        for kind in CONVERSATIONS:
            inputs = batch(tiny, kind)
            assert (gemma3(**inputs).logits - theworld(**inputs).logits).abs().max() == 0


def test_every_weight_of_gemma_is_there_unchanged(tiny: TinyCheckpoint):
    expected = tiny.gemma3().state_dict()
    for enable_world in (True, False):
        actual = tiny.theworld(enable_world=enable_world).state_dict()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)
        added = {name.split(".")[0] for name in actual.keys() - expected.keys()}
        assert added == ({"world_encoder", "world_projector"} if enable_world else set())
