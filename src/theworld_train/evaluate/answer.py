"""One question, answered by a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from theworld_train.accounting.tokens import TEMPORAL_COMPRESSION
from theworld_train.checkpoint_files import resolve_checkpoint
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.model import TheWorld, TheWorldProcessor
from theworld_train.model.configuration import TheWorldConfig


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


def answer(source: AnsweringModel, content: list[dict[str, Any]], *, max_new_tokens: int) -> str:
    """Returns a model's greedy answer to one question.

    Args:
        source: The model.
        content: The parts of the user's turn, visual parts loaded.
        max_new_tokens: Longest answer.

    Raises:
        ConfigError: If the weights cannot be loaded, or the prompt cannot be encoded.
    """
    path, enable_world = str(source.path), source.enable_world
    try:
        processor = TheWorldProcessor.from_pretrained(path, enable_world=enable_world)
        model = TheWorld.from_pretrained(path, enable_world=enable_world, dtype="auto")
    except (OSError, ValueError) as error:
        raise ConfigError(Problem(f"the model cannot be loaded: {error}", source=path)) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.nn.Module.to(model, device)
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    inputs = inputs.to(device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode_answer(output[0, inputs["input_ids"].shape[1] :].tolist())
