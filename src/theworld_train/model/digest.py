"""Fingerprints of tensors, to tell whether one has changed by a single bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from theworld_train.config.components import Component
from theworld_train.model.components import component_parameters

if TYPE_CHECKING:
    from theworld_train.model.modeling import TheWorldForConditionalGeneration

_CHUNK = 1 << 26


@torch.no_grad()
def tensor_digest(tensor: Tensor) -> str:
    """Returns a 128-bit digest of a tensor's dtype, shape and bytes, wherever it lies."""
    digest = xxhash.xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for chunk in flat.split(_CHUNK):
        digest.update(chunk.cpu().numpy())
    return str(digest.hexdigest())


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns the digest of each tensor by name."""
    return {name: tensor_digest(tensor) for name, tensor in tensors.items()}


def combined_digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns one digest of several named tensors, independent of their order."""
    lines = sorted(f"{name} {value}" for name, value in digests(tensors).items())
    return str(xxhash.xxh3_128("\n".join(lines).encode()).hexdigest())


def base_digests(model: TheWorldForConditionalGeneration, without: Collection[str] = ()) -> dict[str, str]:
    """Returns the digest of each component as its base holds it; the world projector has no base.

    Args:
        model: The model as it was loaded from its bases, in their own dtypes.
        without: Names of components that are of no interest.
    """
    return {
        component.value: combined_digest(dict(parameters))
        for component, parameters in component_parameters(model).items()
        if component is not Component.WORLD_PROJECTOR and component.value not in without
    }
