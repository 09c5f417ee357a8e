"""Fingerprints of tensors, to tell whether one has changed by a single bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import xxhash
from torch import Tensor

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
