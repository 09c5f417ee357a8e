"""A frozen language model on the gradient path is checkpointed like one that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from theworld_train.config.schema import RunConfig


def saved_bytes(stage: Any, batch: Any) -> int:
    """Returns the bytes that a forward pass keeps for the backward pass, the model's own tensors not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*stage.model.parameters(), *stage.model.buffers()]}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    features = stage.encode(batch)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        stage(batch, features, 1)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", ["projection", "vision"])
def test_frozen_language_model_saves_what_a_checkpointed_one_saves(
    stage: str, precision: str, shipped: Callable[..., RunConfig], assembled: Callable[[RunConfig], Any], tmp_path: Path
):
    overrides = {"precision": precision, "training__global_batch_size": 8, "training__micro_batch_size": 8}
    sizes = {}
    for checkpointing in ("full", "none"):
        parts = assembled(shipped(stage, tmp_path, training__gradient_checkpointing=checkpointing, **overrides))
        (window,) = parts.windows(1)
        (batch,) = window.micro_batches
        language_model = parts.model.model.language_model
        assert not language_model.training
        sizes["frozen", checkpointing] = saved_bytes(parts.stage, batch)
        language_model.train()
        sizes["train mode", checkpointing] = saved_bytes(parts.stage, batch)
        language_model.eval()
        sizes["eval mode", checkpointing] = saved_bytes(parts.stage, batch)
    assert sizes["frozen", "full"] == sizes["train mode", "full"]
    assert sizes["frozen", "full"] < 0.2 * sizes["frozen", "none"]
    assert sizes["eval mode", "full"] > 3 * sizes["frozen", "full"], (
        "a model in eval mode is not checkpointed: the trap"
    )
    assert sizes["frozen", "none"] == sizes["train mode", "none"] == sizes["eval mode", "none"]


def test_frozen_encoders_save_nothing(
    shipped: Callable[..., RunConfig], assembled: Callable[[RunConfig], Any], tmp_path: Path
):
    parts = assembled(shipped("language", tmp_path))
    (window,) = parts.windows(1)
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        features = parts.stage.encode(window.micro_batches[0])
    assert not saved
    assert not features.image_states.requires_grad
    assert not features.world_latents.requires_grad
    assert torch.is_grad_enabled()
