"""World blocks of 1 + k latent frames: as many tokens, at the same places, wherever they are counted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from tests.helpers.tiny import TinyCheckpoint, logits
from theworld_train.accounting.flops import StepModel
from theworld_train.accounting.tokens import clip_frames
from theworld_train.assemble.inputs import DEFAULT_TEXT, open_inputs
from theworld_train.assemble.model import describe_model
from theworld_train.batch import Batch
from theworld_train.config import parse_run_config
from theworld_train.config.schema import RunConfig
from theworld_train.data import measure_lengths
from theworld_train.plan.dry_run import sample_shape, synthetic_batch

STEPS = range(5)
RESOLUTIONS = (224, 512)
POOLS = (1, 2, 4)
#: What takes seconds is left out above: encoding pixels, and a language model, which does not know frames.
MOST_PIXELS, MOST_TOKENS = 5 * 224**2, 1024


@pytest.fixture(scope="module")
def patient(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """The tiny model, made for long sequences."""
    directory = tmp_path_factory.mktemp("patient") / "tiny"
    shutil.copytree(tiny.directory, directory)
    config = json.loads((directory / "gemma" / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 32768
    (directory / "gemma" / "config.json").write_text(json.dumps(config))
    return TinyCheckpoint(directory)


def run_config(tiny: TinyCheckpoint, resolution: int, pool: int, world: dict[str, Any]) -> RunConfig:
    """Returns a run over clips that have four latent frames before the present and four after it."""
    digits = {"source": "moving_digits", "split": "train", "samples": 1, "questions": ["direction"]}
    return parse_run_config(
        {
            "name": "steps",
            "output_dir": "unused",
            "precision": "fp32",
            "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": resolution, "pool": pool}},
            "trainable": {"world_projector": {}},
            "data": {"train": {**digits, "frames": 17, "later_frames": 16}, "world": world, "num_workers": 0},
            "training": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        }
    )


def blocks(batch: Batch, config: Any) -> list[tuple[int, int]]:
    """Returns where the world tokens of the first row begin and how many there are, by world block."""
    row = batch.input_ids[0].tolist()
    starts = [place for place, token in enumerate(row) if token == config.start_of_world_token_id]
    return [(start + 1, row.index(config.end_of_world_token_id, start) - start - 1) for start in starts]


@pytest.mark.parametrize(
    ("frames", "resolution", "pool"),
    [*product(["future"], RESOLUTIONS, POOLS), *product(["history"], RESOLUTIONS, [2])],
)
def test_collator_lengths_and_plan_agree_with_arithmetic(
    patient: TinyCheckpoint, frames: str, resolution: int, pool: int
):
    for steps in STEPS:
        config = run_config(patient, resolution, pool, {"frames": frames, "steps": steps})
        architecture = describe_model(config)
        expected = (1 + steps) * (resolution // 8 // pool) ** 2
        clip, first = clip_frames(1 + steps), -steps if frames == "history" else 0
        inputs = open_inputs(config)
        collated = inputs.collator([inputs.train[0]])
        assert [count for _, count in blocks(collated, architecture)] == [expected]
        assert (collated.world_frame_counts, collated.world_offsets) == ((clip,), (first,))

        length = collated.input_ids.shape[1]
        assert measure_lengths(inputs.train, inputs.collator, range(1), 0).tolist() == [length]
        assert inputs.max_length == inputs.processor.num_visual_tokens(clip) + DEFAULT_TEXT

        shape = sample_shape(config, architecture)
        assert (shape.positions, shape.frames, shape.offset) == (length, clip, first)
        assert sample_shape(config, architecture, length + 7) == replace(shape, positions=length + 7, supervised=ANY)
        planned = synthetic_batch(architecture, shape, 1)
        assert [count for _, count in blocks(planned, architecture)] == [expected]
        assert (planned.world_frame_counts, planned.world_offsets) == ((clip,), (first,))
        assert planned.input_ids.shape == collated.input_ids.shape
        assert StepModel.from_config(architecture.to_dict()).world_tokens(clip) == expected


@pytest.mark.parametrize(("resolution", "pool"), [*product(RESOLUTIONS, POOLS)])
def test_forward_takes_what_the_collator_gives(patient: TinyCheckpoint, resolution: int, pool: int):
    model = patient.theworld(resolution=resolution, pool=pool).eval()
    projector, most = model.world_projector, model.config.max_world_steps
    for steps in STEPS:
        inputs = open_inputs(run_config(patient, resolution, pool, {"frames": "future", "steps": steps}))
        batch = inputs.collator([inputs.train[0]])
        ((place, count),) = blocks(batch, model.config)
        assert batch.world_frames is not None
        latents = torch.randn(1 + steps, model.config.world_latent_channels, resolution // 8, resolution // 8)
        with torch.no_grad():
            if batch.world_frames[:, 0].numel() <= MOST_PIXELS:
                encoded = model.encode_world(batch.world_frames, batch.world_frame_counts)
                assert encoded.shape == latents.shape
                if count <= MOST_TOKENS:
                    assert logits(model, batch, world_offsets=batch.world_offsets).isfinite().all()
            embeds = model.embed(batch.input_ids, None, latents, (1 + steps,), batch.world_offsets)
            projected = projector(latents, (1 + steps,))[0]  # as history, whose last frame is the present
            times = projector.temporal * projector.scale
            projected += (times[most : most + 1 + steps] - times[most - steps : most + 1])[:, None]
        assert embeds.shape[:2] == batch.input_ids.shape
        torch.testing.assert_close(embeds[0, place : place + count].unflatten(0, (1 + steps, -1)), projected)
