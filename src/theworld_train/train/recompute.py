"""Recomputation: what of a tower is kept for the backward pass, where it is kept, and what runs again instead."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from theworld_train.config.schema import GradientCheckpointing
from theworld_train.model.components import component_modules
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.model.world_encoder import WorldEncoder

_ATEN = torch.ops.aten
#: Operators whose outputs `selective` keeps, as the time goes into them: matrix products, convolutions and fused
#: attention. Batched products, those of eager attention, are as large as its mask and run again.
KEPT = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.convolution.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]
#: Bytes of the smallest tensor that is worth a copy to the host and back.
SMALLEST_MOVED = 2**20


class OnHost(NamedTuple):
    """A tensor that waits in host memory.

    Attributes:
        copy: It, on the host.
        device: Where it belongs.
    """

    copy: Tensor
    device: torch.device


def enable_checkpointing(
    model: TheWorldForConditionalGeneration, modes: GradientCheckpointing, *, offload: bool = False
) -> None:
    """Sets how each tower is checkpointed, non-reentrant: layer by layer, and the world encoder as a whole.

    Args:
        model: The model, in place.
        modes: How each tower is checkpointed.
        offload: Whether what a checkpointed layer starts from waits in host memory.
    """
    modules = component_modules(model)
    for component, mode in modes.by_component.items():
        for unit in modules[component].modules() if component in modules else ():
            if isinstance(unit, GradientCheckpointingLayer | WorldEncoder):
                unit.gradient_checkpointing = mode != "none"
                unit._gradient_checkpointing_func = partial(_run, mode == "selective", offload)


def _run(selective: bool, offload: bool, function: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401 (any layer)
    """Runs a layer so that it runs again in the backward pass."""
    how: dict[str, Any] = {"use_reentrant": False}
    if selective:
        how["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT)
    if not offload:
        return checkpoint(function, *args, **how)
    # Hooks see what is saved outside of the checkpoint: the layer's inputs.
    with saved_tensors_hooks(_leave, _fetch):
        return checkpoint(function, *args, **how)


def _leave(tensor: Tensor) -> Tensor | OnHost:
    return to_host(tensor) if tensor.nbytes >= SMALLEST_MOVED else tensor


def _fetch(kept: Tensor | OnHost) -> Tensor:
    return kept if isinstance(kept, Tensor) else from_host(kept)


def to_host(tensor: Tensor) -> OnHost:
    """Copies a tensor to the host; from a GPU without waiting, in the order of its stream."""
    copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    copy.copy_(tensor, non_blocking=True)
    return OnHost(copy, tensor.device)


def from_host(kept: OnHost) -> Tensor:
    """Copies a tensor back to where it belongs."""
    return kept.copy.to(kept.device, non_blocking=True)
