"""Ablations of the moments that a world block holds: other frames of the same samples, or the same out of order."""

from __future__ import annotations

import zlib
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch

from theworld_train.accounting.tokens import TEMPORAL_COMPRESSION, latent_frames
from theworld_train.assemble.encoded import check_rollouts
from theworld_train.assemble.inputs import open_processor
from theworld_train.batch import Batch
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import ABLATIONS, FRAME_ABLATIONS, Ablation, RunConfig
from theworld_train.config.sources import FrameChoice, WorldFrames, frames_of, frames_problem
from theworld_train.train.stage import Features, StageModule


def with_frames(config: RunConfig, choice: FrameChoice) -> RunConfig:
    """Returns a run's config whose held-out samples hold other frames around the same present.

    Args:
        config: The run config; as many steps are taken as in it, or as many as the clips give if it states none.
        choice: Where the frames come from.

    Raises:
        ConfigError: If the held-out clips have no such frames, or more than the model takes; if there are no rollouts,
            or the run trains the world encoder, of whose latents they are.
    """
    own = config.data.world
    steps = None if choice == "image" else own.steps or None
    if choice == "rollout" and steps is None:
        steps = _reach(config, own)
    world = own.model_copy(update={"frames": choice, "steps": steps})
    reach, most = _reach(config, world), config.model.world.max_world_steps
    problem = frames_problem(config.data.eval, world, "data.eval")
    if problem is None and choice == "rollout":
        problem = _lacks_rollouts(config, steps)
    if problem is None and reach > most:
        problem = f"data.eval has {reach} latent frames besides the present, and model.world.max_world_steps is {most}"
    if problem is not None:
        raise ConfigError(Problem(problem, key="--ablation", value=f"frames_{choice}"))
    return config.model_copy(update={"data": config.data.model_copy(update={"world": world})})


def _reach(config: RunConfig, world: WorldFrames) -> int:
    """Returns the latent frames that held-out samples hold besides the present, at most."""
    return (frames_of(config.data.eval, world) - 1) // TEMPORAL_COMPRESSION


def _lacks_rollouts(config: RunConfig, steps: int | None) -> str | None:
    """Returns why no rollouts can be read, as far as the config tells."""
    if config.data.encoded is None:
        return "rollouts are read from data.encoded, which is not set"
    if Component.WORLD_ENCODER in config.trainable:
        return "rollouts are latents of a frozen world encoder, and the run trains world_encoder"
    return None if steps else "of images alone no number of latent frames follows: set data.world.steps"


def fitting_ablations(config: RunConfig) -> list[Ablation]:
    """Returns the ablations that take something away from a run: those of its model, and of the frames of its data."""
    if not config.model.world.enabled:
        return ["as_trained", "image_blanked"]
    own = _reach(config, config.data.world)
    fitting: list[Ablation] = []
    for ablation, choice in FRAME_ABLATIONS.items():
        if choice is None:
            changes = own > 0
        elif choice == config.data.world.frames:
            changes = False
        else:
            try:
                changed = with_frames(config, choice)
                if choice == "rollout":
                    check_rollouts(changed, open_processor(changed))
            except ConfigError:
                continue
            changes = max(own, _reach(changed, changed.data.world)) > 0
        fitting += [ablation] if changes else []
    return [*ABLATIONS, *fitting]


def shuffled(stage: StageModule, batch: Batch, features: Features) -> Features:
    """Returns the features of a batch whose world blocks hold their frames in another order, but for the present.

    The order depends on the sample alone. Pixels are shuffled, and encoded anew; where there are none, latent frames.

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
        drawn = np.random.default_rng(zlib.crc32(key.encode())).permutation(others).tolist()
        order += [first + frame for frame in (*drawn[:present], present, *drawn[present:])]
    return torch.tensor(order)
