"""Lean forms of Gemma's norms and gated activation: the same values, with less kept for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm


class _RMSNorm(torch.autograd.Function):
    """Gemma's norm, computed in fp32; keeps its input as it came and one fp32 number for each row."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN401
        exact = inputs.float()
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(inputs, weight, scale)
        return (exact.mul_(scale) if exact is not inputs else exact * scale).mul_(1.0 + weight.float()).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN401
        inputs, weight, scale = ctx.saved_tensors
        gradient = gradients[0].float()
        normed = inputs.float() * scale
        to_inputs = to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            weighted = gradient * (1.0 + weight.float())
            inner = (weighted * normed).mean(-1, keepdim=True)
            to_inputs = weighted.addcmul_(normed, inner, value=-1).mul_(scale).to(inputs.dtype)
        return to_inputs, to_weight, None


class _GatedGelu(torch.autograd.Function):
    """`gelu(gate) * up`, which keeps the two and computes the activation again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(gate, up)
        return functional.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        to_up = functional.gelu(gate, approximate="tanh").mul_(gradient)
        to_gate = torch.ops.aten.gelu_backward(gradient * up, gate, approximate="tanh")
        return to_gate, to_up


class LeanRMSNorm(Gemma3RMSNorm):
    """`Gemma3RMSNorm` with another way to compute."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of `x`, in its dtype."""
        result: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return result


class LeanMLP(Gemma3MLP):
    """`Gemma3MLP` with another way to compute."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, sequence, hidden)` to the same shape."""
        result: Tensor = self.down_proj(_GatedGelu.apply(self.gate_proj(x), self.up_proj(x)))
        return result


def make_lean(module: nn.Module) -> None:
    """Gives the norms and gated MLPs inside of a module their lean forms, in place; parameters stay what they are.

    Raises:
        ValueError: If a gated MLP has another activation than Gemma 3's.
    """
    for part in module.modules():
        if type(part) is Gemma3RMSNorm:
            part.__class__ = LeanRMSNorm
        elif type(part) is Gemma3MLP:
            activation = part.config.hidden_activation
            if activation != "gelu_pytorch_tanh":
                raise ValueError(f"the gated MLP's activation is {activation}, expected gelu_pytorch_tanh")
            part.__class__ = LeanMLP
