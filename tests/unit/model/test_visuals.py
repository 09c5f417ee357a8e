"""Protects which frames a world block holds, which of them is the present, and which generated ones are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint, assistant, clip
from theworld_train.accounting.tokens import first_offset
from theworld_train.batch import ROLLOUT, Blank
from theworld_train.config.components import Component
from theworld_train.config.sources import MovingDigitsSource, WorldFrames
from theworld_train.data import open_source
from theworld_train.model import TheWorldProcessor
from theworld_train.model.processing import fit_frame

WORLD = Component.WORLD_ENCODER


@pytest.fixture(scope="module")
def processor(tiny: TinyCheckpoint) -> TheWorldProcessor:
    return tiny.processor()


def turn(**part: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}, assistant("left")]


@pytest.mark.parametrize(
    ("frames", "present", "offset"), [(1, 0, 0), (9, 8, -2), (9, 0, 0), (9, 4, -1), (17, 16, -4), (17, 12, -3)]
)
def test_offsets_count_latent_frames_from_the_present(frames: int, present: int, offset: int):
    assert first_offset(frames, present) == offset


@pytest.mark.parametrize(("frames", "present"), [(9, 3), (9, 9), (9, -1), (5, 2)])
def test_a_present_in_which_no_latent_frame_ends_is_refused(processor: TheWorldProcessor, frames: int, present: int):
    with pytest.raises(ValueError, match=rf"the present must be frame 0, 4, 8, \.\.\. of {frames}, got {present}"):
        processor.encode(turn(type="video", video=clip(1, frames), present=present))


@pytest.mark.parametrize(("present", "offset"), [(None, -2), (8, -2), (4, -1), (0, 0)])
def test_the_vision_tower_sees_the_present_alone(processor: TheWorldProcessor, present: int | None, offset: int):
    frames = clip(1, 9)
    sample = processor.encode(turn(type="video", video=frames, **({} if present is None else {"present": present})))
    alone = processor.encode(turn(type="image", image=frames[8 if present is None else present]))
    assert torch.equal(sample.pixel_values, alone.pixel_values)
    assert sample.world_offsets == (offset,)
    assert alone.world_offsets == (0,)
    assert sample.world_frames[0].shape == (9, 3, RESOLUTION, RESOLUTION)
    first = torch.tensor(list(fit_frame(frames[0], RESOLUTION, "pad").tobytes())).view(RESOLUTION, RESOLUTION, 3)
    torch.testing.assert_close(sample.world_frames[0][0], first.permute(2, 0, 1) / 127.5 - 1)
    assert sample.world_tokens == 3 * alone.world_tokens


def test_a_blank_has_the_same_tokens_and_offset(processor: TheWorldProcessor):
    frames = clip(1, 9)
    for stated in ({}, {"present": 0}):
        sample = processor.encode(turn(type="video", video=frames, **stated))
        blank = processor.encode(turn(type="video", video=Blank(9), **stated))
        assert torch.equal(blank.input_ids, sample.input_ids)
        assert (blank.world_offsets, blank.pixel_values) == (sample.world_offsets, None)


# -- generated futures ------------------------------------------------------------------------------------------------


class Generated:
    """Futures of every picture, and which pictures were asked for."""

    def __init__(self, steps: int | None) -> None:
        self.latents = None if steps is None else torch.randn(1 + steps, 16, 4, 4)
        self.asked: list[list[bytes]] = []

    def find(self, frames: Sequence[Image.Image], *_: object) -> Tensor | None:
        self.asked.append([frame.tobytes() for frame in frames])
        return self.latents


def samples(steps: int) -> Any:
    source = MovingDigitsSource(source="moving_digits", split="train", samples=4)
    image = open_source(source, WorldFrames(frames="image"))[0]
    rollout = open_source(source, WorldFrames(frames="rollout", steps=steps))[0]
    return image.messages, rollout.messages


def test_a_rollout_is_looked_up_by_its_present(processor: TheWorldProcessor):
    image, rollout = samples(2)
    known = {ROLLOUT: Generated(4), WORLD: Generated(0)}
    sample = processor.encode(rollout, known=known)
    alone = processor.encode(image)
    assert torch.equal(sample.world_latents[0], known[ROLLOUT].latents[:3])
    assert known[ROLLOUT].asked == [[image[0]["content"][0]["video"][0].tobytes()]]
    assert known[WORLD].asked == []
    assert (sample.world_frames, sample.world_offsets) == ((), (0,))
    assert sample.world_tokens == 3 * alone.world_tokens
    assert torch.equal(sample.pixel_values, alone.pixel_values)


def test_the_tokens_of_a_rollout_are_known_without_it(processor: TheWorldProcessor):
    _, rollout = samples(2)
    sample = processor.encode(rollout, known={ROLLOUT: Generated(2)})
    unknown = processor.encode(rollout)
    assert torch.equal(unknown.input_ids, sample.input_ids)
    assert (unknown.world_latents, unknown.world_frames, unknown.world_offsets) == ((), (), (0,))


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (None, "data.encoded holds no rollout of its image"),
        (1, "its image has 1 steps, and 2 are asked"),
    ],
)
def test_a_rollout_that_is_missing_or_short_is_refused(processor: TheWorldProcessor, there: int | None, message: str):
    _, rollout = samples(2)
    with pytest.raises(ValueError, match=message):
        processor.encode(rollout, known={ROLLOUT: Generated(there)})
