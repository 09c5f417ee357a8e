"""What a GPU does otherwise than a CPU, done to fake CPU tensors, so that a plan for a GPU can be made anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from theworld_train.model import attention as attention_module
from theworld_train.model.attention import SequenceLayout
from theworld_train.train import recompute

_ATEN = torch.ops.aten
#: Largest head of flash attention on CUDA, and the multiple that it is padded to.
_FLASH_HEAD, _FLASH_MULTIPLE = 256, 8
#: Elements that the last dimension of a mask is padded to for memory-efficient attention.
_MASK_MULTIPLE = 16


@contextmanager
def cuda_semantics() -> Generator[None]:
    """Replaces, while the context is open, what CUDA does otherwise and what shows in memory.

    - Scaled dot product attention calls CUDA's operators (flash without a mask, memory-efficient with one), whose own
      shape functions say what they make; a boolean mask becomes an additive one in the dtype of the queries, padded
      as the kernel wants it, and is kept for the backward pass.
    - Autocast runs layer norm in fp32 on CUDA, and in bf16 on a CPU.
    - What waits on the host takes none of the GPU's memory.

    The functions themselves are replaced, for all attention of transformers and diffusers calls them by name; a
    `TorchFunctionMode` would not see what checkpointing recomputes inside of the backward pass.
    """
    replaced: dict[tuple[ModuleType, str], Callable[..., Any]] = {
        (functional, "scaled_dot_product_attention"): attention,
        (functional, "layer_norm"): layer_norm,
        (attention_module, "flex_attention"): _flex,
        (recompute, "to_host"): to_host,
        (recompute, "from_host"): from_host,
    }
    originals = {place: getattr(*place) for place in replaced}
    for place, function in replaced.items():
        setattr(*place, function)
    try:
        yield
    finally:
        for place, function in originals.items():
            setattr(*place, function)


def to_host(tensor: Tensor) -> recompute.OnHost:
    """Stands in for a copy to the host: a tensor of the same shape without memory."""
    return recompute.OnHost(tensor.new_empty(1).as_strided(tensor.shape, [0] * tensor.ndim), tensor.device)


def from_host(kept: recompute.OnHost) -> Tensor:
    """Stands in for the copy back."""
    return torch.empty_like(kept.copy, memory_format=torch.contiguous_format)


_layer_norm = functional.layer_norm


def layer_norm(
    tensor: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Stands in for `layer_norm` under CUDA's autocast."""
    if torch.is_autocast_enabled("cpu"):
        tensor = tensor.float()
        weight, bias = (None if value is None else value.float() for value in (weight, bias))
    return _layer_norm(tensor, normalized_shape, weight, bias, eps)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in for `scaled_dot_product_attention` as CUDA dispatches it.

    Args:
        query: `(batch, heads, positions, head size)`.
        key: `(batch, key-value heads, positions, head size)`.
        value: Like `key`.
        attn_mask: Boolean or additive, broadcastable to `(batch, heads, positions, positions)`.
        dropout_p: Dropout on the attention weights.
        is_causal: Whether a position sees only those before it.
        scale: Factor on the scores.
        enable_gqa: Whether there are fewer key-value heads than heads.

    Returns:
        `(batch, heads, positions, head size)`.
    """
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    half = query.dtype in (torch.float16, torch.bfloat16)
    if attn_mask is None and half and query.shape[-1] <= _FLASH_HEAD:
        return _flash(query, key, value, dropout_p, is_causal, scale)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    bias = None if attn_mask is None else _additive(attn_mask, query, key)
    result: Tensor = _ATEN._scaled_dot_product_efficient_attention(
        query, key, value, bias, _needs_gradient(query, key, value), dropout_p, is_causal, scale=scale
    )[0]
    return result


def _flex(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, *, window: int | None, scale: float
) -> Tensor:
    """Stands in for FlexAttention, whose kernel keeps what flash attention keeps; block masks are small."""
    return _flash(query, key, value, 0.0, True, scale).transpose(1, 2)


def _flash(query: Tensor, key: Tensor, value: Tensor, dropout: float, is_causal: bool, scale: float | None) -> Tensor:
    """Flash attention; heads are padded to a multiple of eight."""
    size = query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    if missing := -size % _FLASH_MULTIPLE:
        query, key, value = (functional.pad(tensor, (0, missing)) for tensor in (query, key, value))
    result: Tensor = _ATEN._scaled_dot_product_flash_attention(
        query, key, value, dropout, is_causal, False, scale=scale
    )[0]
    return result[..., :size]


def _additive(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Returns the mask as the memory-efficient kernel takes it: additive, padded, and seen over all heads."""
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    positions = mask.shape[-1]
    if missing := -positions % _MASK_MULTIPLE:
        mask = functional.pad(mask, (0, missing))[..., :positions]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
