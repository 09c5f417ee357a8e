"""Known pictures travel from the processor over the batch to the stage, in the order of the conversations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.tiny import TinyCheckpoint, assistant, clip, image, user
from theworld_train.batch import Batch, Encoder
from theworld_train.config.components import Component
from theworld_train.data import Collator, Sample
from theworld_train.encoded_files import frames_digest
from theworld_train.train.freeze import Precision
from theworld_train.train.stage import StageModule

Stage = Callable[..., StageModule]
TOWER, WORLD = Component.VISION_TOWER, Component.WORLD_ENCODER
CONVERSATIONS = [
    [user(image(1), "Which digit is it?", clip(2), image(3)), assistant("7")],
    [user("Which digit is it?"), assistant("5")],
    [user(clip(4, frames=9), image(5, (20, 70)), "Which way does it move?"), assistant("left")],
]
#: The present of each visual, and all of its frames, in order.
VISUALS = [[image(1)], clip(2), [image(3)], clip(4, frames=9), [image(5, (20, 70))]]


class Remembered(dict[str, Tensor]):
    """Entries by digest, and what was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def find(self, frames: Sequence[Image.Image]) -> Tensor | None:
        self.asked.append(frames_digest(frames))
        return self.get(self.asked[-1])


def collate(processor: Encoder, known: dict[Component, Remembered] | None) -> Batch:
    samples = [Sample(str(index), "any", turns) for index, turns in enumerate(CONVERSATIONS)]
    return Collator(processor, 4096, known=known)(samples)


def remember(stage: StageModule, processor: Encoder) -> dict[Component, Remembered]:
    """Returns entries of all visuals, each encoded alone."""
    batch = collate(processor, None)
    known = {TOWER: Remembered(), WORLD: Remembered()}
    for visual, pixels, frames in zip(
        VISUALS, batch.pixel_values.split(1), batch.world_frames.split(list(batch.world_frame_counts)), strict=True
    ):
        known[TOWER][frames_digest(visual[-1:])] = stage.encode_alone(TOWER, pixels)
        known[WORLD][frames_digest(visual)] = stage.encode_alone(WORLD, frames)
    return known


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("missing", [(), (0,), (1, 3), (4,), (0, 1, 2, 3, 4)], ids=str)
def test_what_is_known_and_what_is_not_give_the_same_features(
    tiny: TinyCheckpoint, make_stage: Stage, precision: Precision, missing: tuple[int, ...]
):
    stage, processor = make_stage([Component.WORLD_PROJECTOR], precision), tiny.processor()
    known = remember(stage, processor)
    complete = stage.encode(collate(processor, known))
    for number in missing:
        del known[TOWER][frames_digest(VISUALS[number][-1:])]
        del known[WORLD][frames_digest(VISUALS[4 - number])]
    batch = collate(processor, known)
    assert batch.images_known == tuple(number not in missing for number in range(5))
    assert batch.blocks_known == tuple(4 - number not in missing for number in range(5))
    assert batch.num_images == 5
    assert batch.world_frame_counts == (1, 5, 1, 9, 1)
    features = stage.encode(batch)
    assert torch.equal(features.image_states, complete.image_states)
    assert torch.equal(features.world_latents, complete.world_latents)
    whole = stage.encode(collate(processor, None))
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    torch.testing.assert_close(features.image_states, whole.image_states, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(features.world_latents, whole.world_latents, rtol=1e-4, atol=1e-4)


def test_pixels_are_made_of_nothing_that_is_known(tiny: TinyCheckpoint, make_stage: Stage):
    processor = tiny.processor()
    known = remember(make_stage([Component.WORLD_PROJECTOR]), processor)
    batch = collate(processor, known)
    assert batch.pixel_values is None
    assert batch.world_frames is None
    assert known[TOWER].asked == [frames_digest(visual[-1:]) for visual in VISUALS]
    assert known[WORLD].asked == [frames_digest(visual) for visual in VISUALS]


def test_encoder_that_is_not_looked_up_gets_all_pixels(tiny: TinyCheckpoint, make_stage: Stage):
    stage, processor = make_stage([Component.WORLD_PROJECTOR, TOWER]), tiny.processor()
    known = remember(stage, processor)
    batch = collate(processor, {WORLD: known[WORLD]})
    assert len(batch.pixel_values) == batch.num_images == 5
    assert batch.images_known == ()
    assert batch.world_frames is None
    stage(batch, stage.encode(batch), 1).loss_sum.backward()


def test_stage_takes_nothing_known_of_an_encoder_that_trains(tiny: TinyCheckpoint, make_stage: Stage):
    processor = tiny.processor()
    known = remember(make_stage([Component.WORLD_PROJECTOR]), processor)
    batch = collate(processor, known)
    for component in (TOWER, WORLD):
        stage = make_stage([Component.WORLD_PROJECTOR, component])
        with pytest.raises(AssertionError, match="what trains is encoded anew"):
            stage.encode(batch)


def test_world_blocks_are_not_looked_up_without_a_world_path(tiny: TinyCheckpoint, make_stage: Stage):
    known = {TOWER: Remembered(), WORLD: Remembered()}
    encoded = tiny.processor().encode(CONVERSATIONS[0], world=False, known=known)
    assert known[WORLD].asked == []
    assert encoded.world_latents == ()
    assert len(encoded.image_states) == len(known[TOWER].asked) == 3


def test_batch_of_text_alone_has_nothing_to_look_up(tiny: TinyCheckpoint, make_stage: Stage):
    known = {TOWER: Remembered(), WORLD: Remembered()}
    batch = Collator(tiny.processor(), 4096, known=known)([Sample("0", "any", CONVERSATIONS[1])])
    assert batch.num_images == 0
    assert batch.images_known == batch.blocks_known == ()
    stage = make_stage([Component.WORLD_PROJECTOR])
    assert stage.encode(batch).num_images == 0
