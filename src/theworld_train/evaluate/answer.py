"""One question, answered by a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig

from theworld_train.accounting.tokens import TEMPORAL_COMPRESSION
from theworld_train.assemble.run import load_run
from theworld_train.batch import ROLLOUT, KnownEncodings
from theworld_train.checkpoint_files import resolve_checkpoint
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.rollout import RolloutRules
from theworld_train.data.rollouts import state_rollouts
from theworld_train.encoded_files import frames_digest
from theworld_train.model import TheWorld, TheWorldProcessor
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.world_generator import (
    Fit,
    Prompt,
    UnsafeRolloutError,
    WorldGenerator,
    load_generator,
    noise_seed,
)


@dataclass(frozen=True)
class AnsweringModel:
    """A model on disk that can be asked.

    Attributes:
        path: Its directory.
        enable_world: Whether it sees world tokens.
        max_frames: Most frames of a clip that it takes, or None if any number will do.
    """

    path: Path
    enable_world: bool
    max_frames: int | None


@dataclass(frozen=True)
class Future:
    """What is generated before a model answers.

    Attributes:
        steps: Latent frames that follow the present.
        rules: How they are generated.
    """

    steps: int
    rules: RolloutRules


def find_rules(path: Path) -> RolloutRules:
    """Returns how the run that a checkpoint belongs to generates futures.

    Args:
        path: A checkpoint's directory.

    Raises:
        ConfigError: If it belongs to no run.
    """
    try:
        config, _ = load_run(path)
    except ConfigError as error:
        hint = "name a run's config by --config"
        message = "belongs to no run, whose config would say how futures are generated"
        raise ConfigError(Problem(message, source=str(path), key="--rollout", hint=hint)) from error
    return config.data.world.rollout


def find_model(checkpoint: Path, enable_world: bool | None = None) -> AnsweringModel:
    """Finds out what a directory holds; no weights are read.

    Args:
        checkpoint: A checkpoint, a run directory, or a directory that `save_pretrained` wrote.
        enable_world: Whether the model sees world tokens; by default whether it has a world path.

    Raises:
        ConfigError: If there is no model, or world tokens are asked for and it has no world path.
    """
    path = checkpoint if (checkpoint / "config.json").is_file() else resolve_checkpoint(checkpoint)
    try:
        values, _ = PreTrainedConfig.get_config_dict(str(path))
        kind = values.get("model_type")
        config = TheWorldConfig.from_pretrained(str(path)) if kind == TheWorldConfig.model_type else None
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"cannot be read: {error}", source=str(path / "config.json"))) from error
    if config is None and kind != "gemma3":
        message = f"holds a model of type {kind!r}, expected 'theworld' or 'gemma3'"
        raise ConfigError(Problem(message, source=str(path)))
    has_world = config is not None and config.enable_world
    if enable_world and not has_world:
        raise ConfigError(Problem("the model has no world path", source=str(path), hint="leave out --world"))
    if config is None or not has_world or enable_world is False:
        return AnsweringModel(path, enable_world=False, max_frames=None)
    return AnsweringModel(path, enable_world=True, max_frames=1 + TEMPORAL_COMPRESSION * config.max_world_steps)


def answer(
    source: AnsweringModel, content: list[dict[str, Any]], *, max_new_tokens: int, future: Future | None = None
) -> str:
    """Returns a model's greedy answer to one question.

    Args:
        source: The model.
        content: The parts of the user's turn, visual parts loaded.
        max_new_tokens: Longest answer.
        future: How to generate what follows each image or clip, if it shall be.

    Raises:
        ConfigError: If weights cannot be loaded, the prompt cannot be encoded, or the guardrail refuses it.
    """
    path, enable_world = str(source.path), source.enable_world
    try:
        processor = TheWorldProcessor.from_pretrained(path, enable_world=enable_world)
        model = TheWorld.from_pretrained(path, enable_world=enable_world, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"the model cannot be loaded: {error}", source=path)) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model, device)
    messages = [{"role": "user", "content": content}]
    known: KnownEncodings = {}
    if future is not None:
        messages, rollouts = _with_futures(messages, future, model, processor)
        known = {ROLLOUT: rollouts}
    try:
        inputs = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, known=known)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    inputs = inputs.to(device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode_answer(output[0, inputs["input_ids"].shape[1] :].tolist())


class _Rollouts:
    """Generates what follows a picture when it is looked up."""

    def __init__(
        self, future: Future, generator: WorldGenerator, model: TheWorld, processor: TheWorldProcessor
    ) -> None:
        self._future, self._generator = future, generator
        self._encoder, self._fit = model.world_encoder, Fit(processor.world_resolution, processor.world_resize)
        self._prompts: dict[str, Prompt | None] = {}

    def find(self, frames: Sequence[Image.Image], prompt: str = "") -> Tensor:
        """Returns latents of the picture and of what follows it.

        Raises:
            ConfigError: If the guardrail refuses prompt or future.
        """
        if prompt not in self._prompts:
            self._prompts |= self._generator.encode_prompts([prompt])
        encoded = self._prompts[prompt]
        if encoded is None:
            raise ConfigError(Problem("the guardrail refuses it", key="--prompt", value=prompt))
        seed = noise_seed(self._future.rules.seed, frames_digest(frames, prompt))
        try:
            return self._generator.latents(frames[-1], encoded, seed, self._future.steps, self._encoder, self._fit)
        except UnsafeRolloutError as error:
            raise ConfigError(Problem(str(error), key="--rollout")) from error


def _with_futures(
    messages: list[dict[str, Any]], future: Future, model: TheWorld, processor: TheWorldProcessor
) -> tuple[list[dict[str, Any]], _Rollouts]:
    """Returns messages whose visual parts ask for a future, and what generates it."""
    rollouts = _Rollouts(future, load_generator(future.rules, model.device), model, processor)
    return state_rollouts(messages, future.steps, future.rules), rollouts
