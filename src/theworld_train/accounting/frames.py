"""Other frames around the same present: whether a run's held-out samples have them, as far as its config tells."""

from __future__ import annotations

from collections.abc import Sequence

from theworld_train.accounting.tokens import TEMPORAL_COMPRESSION
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import FRAME_ABLATIONS, WORLDLESS_ABLATIONS, Ablation, RunConfig
from theworld_train.config.sources import FrameChoice, WorldFrames, frames_of, frames_problem


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
        steps = reach(config, own)
    world = own.model_copy(update={"frames": choice, "steps": steps})
    furthest, most = reach(config, world), config.model.world.max_world_steps
    problem = frames_problem(config.data.eval, world, "data.eval")
    if problem is None and choice == "rollout":
        problem = _lacks_rollouts(config, steps)
    if problem is None and furthest > most:
        there = f"data.eval has {furthest} latent frames besides the present"
        problem = f"{there}, and model.world.max_world_steps is {most}"
    if problem is not None:
        raise ConfigError(Problem(problem, key="--ablation", value=f"frames_{choice}"))
    return config.model_copy(update={"data": config.data.model_copy(update={"world": world})})


def reach(config: RunConfig, world: WorldFrames) -> int:
    """Returns the latent frames that held-out samples hold besides the present, at most."""
    return (frames_of(config.data.eval, world) - 1) // TEMPORAL_COMPRESSION


def _lacks_rollouts(config: RunConfig, steps: int | None) -> str | None:
    """Returns why no rollouts can be read, as far as the config tells."""
    if config.data.encoded is None:
        return "rollouts are read from data.encoded, which is not set"
    if Component.WORLD_ENCODER in config.trainable:
        return "rollouts are latents of a frozen world encoder, and the run trains world_encoder"
    return None if steps else "of images alone no number of latent frames follows: set data.world.steps"


def unfit_ablations(config: RunConfig, ablations: Sequence[Ablation]) -> list[Problem]:
    """Returns why a run cannot be measured with ablations, as far as its config tells.

    Args:
        config: The run config.
        ablations: Those that are asked for by name.
    """
    if not config.model.world.enabled:
        unfit = [name for name in ablations if name not in WORLDLESS_ABLATIONS]
        there = "there is no world path, so there is nothing to take away"
        return [Problem(there, value=", ".join(unfit))] if unfit else []
    problems: list[Problem] = []
    for name in ablations:
        try:
            if (choice := FRAME_ABLATIONS.get(name)) is not None:
                with_frames(config, choice)
        except ConfigError as error:
            problems += error.problems
    return problems
