"""Ablations of the moments that a world block holds: other frames of the same samples, or the same out of order."""

from __future__ import annotations

import zlib
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch

from theworld_train.accounting.frames import reach, with_frames
from theworld_train.accounting.tokens import TEMPORAL_COMPRESSION, latent_frames
from theworld_train.assemble.encoded import check_rollouts
from theworld_train.assemble.inputs import open_processor
from theworld_train.batch import Batch
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import ABLATIONS, FRAME_ABLATIONS, WORLDLESS_ABLATIONS, Ablation, RunConfig
from theworld_train.train.stage import Features, StageModule


def fitting_ablations(config: RunConfig) -> list[Ablation]:
    """Returns the ablations that take something away from a run: those of its model, and of the frames of its data."""
    if not config.model.world.enabled:
        return [*WORLDLESS_ABLATIONS]
    own = reach(config, config.data.world)
    fitting: list[Ablation] = []
    for ablation, choice in FRAME_ABLATIONS.items():
        if choice is None:
            changes = own > 0 and lacks_order(config) is None
        elif choice == config.data.world.frames:
            changes = False
        else:
            try:
                changed = with_frames(config, choice)
                if choice == "rollout":
                    check_rollouts(changed, open_processor(changed))
            except ConfigError:
                continue
            changes = max(own, reach(changed, changed.data.world)) > 0
        fitting += [ablation] if changes else []
    return [*ABLATIONS, *fitting]


def lacks_order(config: RunConfig) -> str | None:
    """Returns why the later frames of a run's rollouts have no other order; None if they have, or none are read."""
    world = config.data.world
    if world.frames != "rollout" or world.steps != 1:
        return None
    return "data.world.steps of 1 holds one generated latent frame besides the present, which has no other order"


def shuffled(stage: StageModule, batch: Batch, features: Features) -> Features:
    """Returns the features of a batch whose world blocks hold their frames in another order, but for the present.

    The order depends on the sample alone, and is never the given one if there is another. Pixels are shuffled, and
    encoded anew; where there are none, latent frames.

    Args:
        stage: Encodes the frames.
        batch: The batch, a sample in each row.
        features: What the stage has made of it.
    """
    counts = batch.world_frame_counts
    offsets = batch.world_offsets or tuple(1 - latent_frames(count) for count in counts)
    start = stage.model.config.start_of_world_token_id
    blocks = (batch.input_ids == start).sum(-1).tolist()
    keys = [f"{name}/{number}" for name, count in zip(batch.sample_ids, blocks, strict=True) for number in range(count)]
    if batch.world_frames is None or any(batch.blocks_known):
        assert features.world_latents is not None, "what is known comes as latents"
        order = _order([latent_frames(count) for count in counts], [-offset for offset in offsets], keys)
        return replace(features, world_latents=features.world_latents[order.to(features.world_latents.device)])
    order = _order(counts, [-offset * TEMPORAL_COMPRESSION for offset in offsets], keys)
    frames = batch.world_frames[order.to(batch.world_frames.device)]
    encoded = stage.encode(replace(batch, pixel_values=None, world_frames=frames))
    return replace(features, world_latents=encoded.world_latents)


def _order(counts: tuple[int, ...] | list[int], presents: list[int], keys: list[str]) -> torch.Tensor:
    """Returns where each frame of all blocks is taken from, `(sum(counts),)`; the presents stay in their places."""
    order: list[int] = []
    for count, present, key, first in zip(counts, presents, keys, [0, *accumulate(counts)], strict=False):
        others = [frame for frame in range(count) if frame != present]
        generator = np.random.default_rng(zlib.crc32(key.encode()))
        drawn = generator.permutation(others).tolist()
        while drawn == others and len(others) > 1:
            drawn = generator.permutation(others).tolist()
        order += [first + frame for frame in (*drawn[:present], present, *drawn[present:])]
    return torch.tensor(order)
