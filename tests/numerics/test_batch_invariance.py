"""The logits of a conversation depend on that conversation alone, however it is batched, padded and ordered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.tiny import Message, TinyCheckpoint, assistant, clip, image, logits, user
from theworld_train.batch import Batch
from theworld_train.data.collator import Collator
from theworld_train.data.source import Sample
from theworld_train.model import TheWorld, TheWorldProcessor

#: Clips and images, none, one and several, at the beginning, in the middle and at the end; the first reaches beyond the
#: sliding window of 128 tokens.
CONVERSATIONS: list[list[Message]] = [
    [user("Which way", clip(1, frames=9), "does it move?", image(2), image(3)), assistant("left")],
    [user("Which digit is it?"), assistant("5")],
    [user(image(4), "Which digit is it?"), assistant("7"), user("Which way does it move?", clip(5)), assistant("up")],
    [{"role": "system", "content": "right"}, user(clip(6)), assistant("down")],
]
#: Largest difference, as a share of the largest logit: fp32 itself is no finer.
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=["spatial", "channel"])
def setup(request: pytest.FixtureRequest, tiny: TinyCheckpoint) -> tuple[TheWorld, TheWorldProcessor]:
    model = tiny.theworld(tokens=request.param)
    torch.nn.init.normal_(model.world_projector.temporal)  # large, so that a frame in another's place is seen
    return model, tiny.processor(world_tokens=request.param)


def collate(processor: TheWorldProcessor, indices: list[int], side: Any = "right") -> Batch:
    samples = [Sample(str(index), "any", CONVERSATIONS[index]) for index in indices]
    return Collator(processor, 4096, side)(samples)


def logits_at_real_tokens(model: TheWorld, batch: Batch, **kwargs: Any) -> list[Tensor]:
    rows = zip(logits(model, batch, **kwargs), batch.attention_mask, strict=True)
    return [row[mask.bool()] for row, mask in rows]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))


@pytest.fixture(scope="module")
def alone(setup: tuple[TheWorld, TheWorldProcessor]) -> list[Tensor]:
    """The logits of each conversation in a batch of its own."""
    model, processor = setup
    return [logits_at_real_tokens(model, collate(processor, [index]))[0] for index in range(len(CONVERSATIONS))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [1, 0], [2, 2, 3]], ids=str)
def test_padding_and_neighbours_change_nothing(
    setup: tuple[TheWorld, TheWorldProcessor], alone: list[Tensor], side: str, order: list[int]
):
    model, processor = setup
    batch = collate(processor, order, side)
    assert batch.input_ids.shape[1] > model.config.text_config.sliding_window or 0 not in order
    assert not batch.attention_mask.all()
    for index, row in zip(order, logits_at_real_tokens(model, batch), strict=True):
        assert_same(row, alone[index])


def test_in_fp64_nothing_but_rounding_is_left(tiny: TinyCheckpoint):
    model, processor = tiny.theworld().double(), tiny.processor()
    batched = logits_at_real_tokens(model, collate(processor, [0, 1, 2, 3]))
    for index, row in enumerate(batched):
        single = logits_at_real_tokens(model, collate(processor, [index]))[0]
        torch.testing.assert_close(row, single, rtol=0, atol=1e-11)


def test_token_types_are_found_when_they_are_left_out(setup: tuple[TheWorld, TheWorldProcessor], alone: list[Tensor]):
    model, processor = setup
    batch = collate(processor, [2])
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids,
            pixel_values=batch.pixel_values,
            world_frames=batch.world_frames,
            world_frame_counts=torch.tensor(batch.world_frame_counts),
        ).logits
    assert_same(logits[0], alone[2])


def test_pixels_and_frames_go_to_their_own_conversation(setup: tuple[TheWorld, TheWorldProcessor]):
    """Two conversations of the same text that swap what they show swap their logits."""
    model, processor = setup
    batch = collate(processor, [3, 3])
    assert batch.pixel_values is not None
    assert batch.world_frames is not None
    generator = torch.Generator().manual_seed(0)
    pixels = batch.pixel_values + torch.randn(batch.pixel_values.shape, generator=generator) / 4
    frames = batch.world_frames + torch.randn(batch.world_frames.shape, generator=generator) / 4
    (pixel_halves, frame_halves) = (values.chunk(2) for values in (pixels, frames))
    swapped = replace(batch, pixel_values=torch.cat(pixel_halves[::-1]), world_frames=torch.cat(frame_halves[::-1]))
    first, second = logits_at_real_tokens(model, replace(batch, pixel_values=pixels, world_frames=frames))
    second_after, first_after = logits_at_real_tokens(model, swapped)
    assert_same(first, first_after)
    assert_same(second, second_after)
    assert (first - second).abs().max() > 1e-2


@pytest.mark.parametrize("what", ["pixel_values", "world_frames"])
def test_images_and_clips_each_have_an_effect(setup: tuple[TheWorld, TheWorldProcessor], what: str):
    model, processor = setup
    batch = collate(processor, [0, 3])
    before = logits_at_real_tokens(model, batch)
    values = getattr(batch, what).clone()
    values[-1] = -values[-1]  # of the last conversation
    after = logits_at_real_tokens(model, replace(batch, **{what: values}))
    assert_same(before[0], after[0])
    assert (before[1][-1] - after[1][-1]).abs().max() > 1e-3


def test_world_tokens_are_causal_and_images_are_not(setup: tuple[TheWorld, TheWorldProcessor]):
    """What a block shows reaches back to the block's beginning for an image, and not at all for world tokens."""
    model, processor = setup
    batch = collate(processor, [3])
    ids = batch.input_ids[0]
    before = logits_at_real_tokens(model, batch)[0]
    assert batch.world_frames is not None
    frames = batch.world_frames.clone()
    frames[-1] = -frames[-1]
    moved = (logits_at_real_tokens(model, replace(batch, world_frames=frames))[0] - before).abs().amax(-1)
    world = (ids == model.config.world_token_id).nonzero().flatten()
    first_of_last_frame = int(world[-16])
    if model.config.world_tokens == "spatial":
        assert not moved[:first_of_last_frame].any()
    assert moved[first_of_last_frame] > 0
    assert batch.pixel_values is not None
    pixels = batch.pixel_values.clone()
    pixels[..., 40:, :] *= -1  # a part that the first image tokens do not cover
    moved = (logits_at_real_tokens(model, replace(batch, pixel_values=pixels))[0] - before).abs().amax(-1)
    first = int((ids == model.config.image_token_id).nonzero()[0])
    assert not moved[:first].any()
    assert moved[first] > 0


def test_bf16_differs_by_its_rounding_alone(tiny: TinyCheckpoint, tmp_path: Path):
    tiny.theworld().save_pretrained(tmp_path)
    batch = collate(tiny.processor(), [0, 1, 2])
    high, low = (
        logits_at_real_tokens(TheWorld.from_pretrained(tmp_path, dtype=dtype), batch)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert low[0].dtype == torch.bfloat16
    for expected, actual in zip(high, low, strict=True):
        assert torch.nn.functional.cosine_similarity(expected.flatten(), actual.float().flatten(), dim=0) > 0.998
