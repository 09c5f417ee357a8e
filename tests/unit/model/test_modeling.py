"""Protects how world tokens enter the sequence: what is replaced, what is refused, and where gradients flow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BatchFeature

from tests.helpers.tiny import TinyCheckpoint, assistant, clip, image, user
from theworld_train.model import TheWorld, TheWorldProcessor


@pytest.fixture(scope="module")
def model(tiny: TinyCheckpoint) -> TheWorld:
    return tiny.theworld()


@pytest.fixture(scope="module")
def processor(tiny: TinyCheckpoint) -> TheWorldProcessor:
    return tiny.processor()


@pytest.fixture
def batch(processor: TheWorldProcessor) -> BatchFeature:
    """Two conversations, of two blocks (5 frames, 1 frame) and of one (1 frame)."""
    conversations = [[user("left", clip(1), image(2)), assistant("5")], [user(image(3), "up")]]
    return processor.apply_chat_template(conversations, tokenize=True)


@torch.no_grad()
def features(model: TheWorld, batch: BatchFeature) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    latents, counts = model.world_encoder(batch["world_frames"], tuple(batch["world_frame_counts"].tolist()))
    return model.model.multi_modal_projector(model.encode_images(batch["pixel_values"])), latents, counts


def test_placeholders_are_replaced_and_text_is_not(model: TheWorld, batch: BatchFeature):
    ids, config = batch["input_ids"], model.config
    images, latents, counts = features(model, batch)
    with torch.no_grad():
        embeddings = model.embed(ids, images, latents, counts)
        tokens, brackets = model.world_projector(latents, counts)
        world = tokens.flatten(0, 1)
    assert torch.equal(embeddings[ids == config.world_token_id], world)
    assert torch.equal(embeddings[ids == config.image_token_id], images.flatten(0, 1))
    for token, bracket in zip((config.start_of_world_token_id, config.end_of_world_token_id), brackets, strict=True):
        assert (ids == token).sum() == 3
        assert (embeddings[ids == token] == bracket).all()
    text = ~torch.isin(ids, torch.tensor([config.image_token_id, *config.world_token_ids]))
    assert torch.equal(embeddings[text], model.get_input_embeddings()(ids)[text])


def test_the_rows_of_the_world_tokens_are_never_read(tiny: TinyCheckpoint, batch: BatchFeature):
    model = tiny.theworld()
    with torch.no_grad():
        before = model(**batch).logits
        rows = list(model.config.world_token_ids)
        model.get_input_embeddings().weight[rows] = 1e4
        after = model(**batch).logits
    other = [token for token in range(before.shape[-1]) if token not in rows]  # the head's rows are the same rows
    assert torch.equal(before[..., other], after[..., other])


def test_encoded_latents_and_frames_give_the_same_embeddings(model: TheWorld, batch: BatchFeature):
    images, latents, counts = features(model, batch)
    assert torch.equal(model.encode_world(batch["world_frames"], tuple(batch["world_frame_counts"].tolist())), latents)
    with torch.no_grad():
        embeddings = model.embed(batch["input_ids"], images, latents, counts)
        masks = {name: batch[name] for name in ("attention_mask", "token_type_ids")}
        from_embeddings = model(inputs_embeds=embeddings, **masks).logits
        assert torch.equal(from_embeddings, model(**batch).logits)


def test_a_gradient_reaches_the_projector_and_nothing_else(tiny: TinyCheckpoint, batch: BatchFeature):
    model = tiny.theworld().train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {f"world_projector.{name}" for name, _ in model.world_projector.named_parameters()}
    for name, parameter in model.world_projector.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name


def test_a_gradient_reaches_every_part_that_trains(tiny: TinyCheckpoint, batch: BatchFeature):
    model = tiny.theworld(freeze_gemma_vision=False, freeze_gemma_language=False, freeze_cosmos_vae=False).train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    still = {name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()}
    # Softmax ignores a bias of the keys; what is left of its gradient is rounding, or nothing.
    assert {name for name in still if not name.endswith("k_proj.bias")} == set()


def without(batch: BatchFeature, *names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in names} | changes


def test_placeholders_and_features_must_agree(model: TheWorld, batch: BatchFeature):
    for names, message in [
        (("world_frames", "world_frame_counts"), "<world> placeholders, but no world_frames"),
        (("pixel_values",), "image placeholders, but no pixel_values"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**without(batch, *names))
    with pytest.raises(ValueError, match="48 image placeholders in input_ids, but 32 image features"):
        model(**without(batch, pixel_values=batch["pixel_values"][1:]))
    fewer = {"world_frames": batch["world_frames"][:-1], "world_frame_counts": batch["world_frame_counts"][:-1]}
    with pytest.raises(ValueError, match="3 offsets were given for 2 world blocks"):
        model(**without(batch, **fewer))
    fewer["world_offsets"] = batch["world_offsets"][:-1]
    with pytest.raises(ValueError, match="64 world placeholders in input_ids, but 48 world features"):
        model(**without(batch, **fewer))
    ids = batch["input_ids"].clone()
    ids[ids == model.config.world_token_id] = 0
    with pytest.raises(ValueError, match="0 world placeholders in input_ids, but 64 world features"):
        model(**without(batch, input_ids=ids))


def test_a_model_without_world_path_refuses_world_frames(tiny: TinyCheckpoint, batch: BatchFeature):
    with pytest.raises(ValueError, match="enable_world=True"):
        tiny.theworld(enable_world=False)(**batch)


def test_text_alone_needs_no_visual_inputs(model: TheWorld, processor: TheWorldProcessor):
    batch = processor.apply_chat_template([[user("Which digit is it?")]], tokenize=True)
    assert not {"pixel_values", "world_frames"} & batch.keys()
    with torch.no_grad():
        assert model(**batch).logits.isfinite().all()


def test_attention_implementations_agree(tiny: TinyCheckpoint, batch: BatchFeature):
    sdpa, eager = (tiny.theworld(attn_implementation=name) for name in ("sdpa", "eager"))
    with torch.no_grad():
        expected, actual = sdpa(**batch).logits, eager(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-4)
