"""One question, answered by a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from theworld_train.config.errors import ConfigError
from theworld_train.model import TheWorld, TheWorldProcessor
from theworld_train.train.checkpoint import resolve_checkpoint


def answer(checkpoint: Path, content: list[dict[str, Any]], *, max_new_tokens: int, enable_world: bool = True) -> str:
    """Returns a model's greedy answer to one question.

    Args:
        checkpoint: A checkpoint, a run directory, or a directory that `save_pretrained` wrote.
        content: The parts of the user's turn, visual parts loaded.
        max_new_tokens: Longest answer.
        enable_world: Whether the model sees world tokens.

    Raises:
        ConfigError: If there is no model, or the prompt cannot be encoded.
    """
    path = checkpoint if (checkpoint / "config.json").is_file() else resolve_checkpoint(checkpoint)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TheWorld.from_pretrained(str(path), enable_world=enable_world, dtype="auto")
    torch.nn.Module.to(model, device)
    processor = TheWorldProcessor.from_pretrained(str(path), enable_world=enable_world)
    try:
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    inputs = inputs.to(device)
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return str(processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
