"""Other forms of Gemma's norms and gated activation: the same values, with less kept for the backward pass."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm

_Function = Callable[..., Any]


# -- the arithmetic ---------------------------------------------------------------------------------------------------


def _norm(inputs: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the normalised rows, and the fp32 number that each row was multiplied by."""
    exact = inputs.float()
    scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    normed = exact.mul_(scale) if exact is not inputs else exact * scale
    return normed.mul_(1.0 + weight.float()).to(inputs.dtype), scale


def _norm_backward(
    gradient: Tensor, inputs: Tensor, weight: Tensor, scale: Tensor, to_inputs: bool, to_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the gradients that are asked for."""
    gradient, normed = gradient.float(), inputs.float() * scale
    of_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype) if to_weight else None
    if not to_inputs:
        return None, of_weight
    weighted = gradient * (1.0 + weight.float())
    inner = (weighted * normed).mean(-1, keepdim=True)
    return weighted.addcmul_(normed, inner, value=-1).mul_(scale).to(inputs.dtype), of_weight


def _gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh").mul_(up)


def _gated_gelu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    to_up = functional.gelu(gate, approximate="tanh").mul_(gradient)
    return torch.ops.aten.gelu_backward(gradient * up, gate, approximate="tanh"), to_up


@cache
def _compiled(function: _Function) -> _Function:
    """Fuses a function's operations into one kernel or two; lengths may differ from call to call.

    Of more kinds of inputs than PyTorch compiles a function for, further ones run as they are written.
    """
    return torch.compile(function, dynamic=True)


def _as_written(function: _Function) -> _Function:
    return function


#: Makes of a function one that computes the same.
Make = Callable[[_Function], _Function]


# -- for autograd -----------------------------------------------------------------------------------------------------


class _RMSNorm(torch.autograd.Function):
    """Gemma's norm, computed in fp32; keeps its input as it came and one fp32 number for each row."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, eps: float, make: Make) -> Tensor:  # noqa: ANN401
        output, scale = make(_norm)(inputs, weight, eps)
        ctx.save_for_backward(inputs, weight, scale)
        ctx.make = make
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # noqa: ANN401
        to_inputs, to_weight = ctx.needs_input_grad[:2]
        return *ctx.make(_norm_backward)(gradients[0], *ctx.saved_tensors, to_inputs, to_weight), None, None


class _GatedGelu(torch.autograd.Function):
    """`gelu(gate) * up`, which keeps the two and computes the activation again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, make: Make) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(gate, up)
        ctx.make = make
        return make(_gated_gelu)(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        return *ctx.make(_gated_gelu_backward)(gradients[0], *ctx.saved_tensors), None


# -- as modules -------------------------------------------------------------------------------------------------------


class LeanRMSNorm(Gemma3RMSNorm):
    """`Gemma3RMSNorm` with another way to compute."""

    make: Make = staticmethod(_as_written)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of `x`, in its dtype."""
        result: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.make)
        return result


class LeanMLP(Gemma3MLP):
    """`Gemma3MLP` with another way to compute."""

    make: Make = staticmethod(_as_written)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, sequence, hidden)` to the same shape."""
        result: Tensor = self.down_proj(_GatedGelu.apply(self.gate_proj(x), self.up_proj(x), self.make))
        return result


class CompiledRMSNorm(LeanRMSNorm):
    """`LeanRMSNorm`, its arithmetic compiled."""

    make: Make = staticmethod(_compiled)


class CompiledMLP(LeanMLP):
    """`LeanMLP`, the arithmetic between its matrix products compiled."""

    make: Make = staticmethod(_compiled)


class Forms(NamedTuple):
    """Classes that a norm and a gated MLP can have instead of their own; same parameters, same values."""

    norm: type[Gemma3RMSNorm]
    mlp: type[Gemma3MLP]


#: Operations one by one.
LEAN = Forms(LeanRMSNorm, LeanMLP)
#: Compiled when they are first used; that needs a C++ compiler.
COMPILED = Forms(CompiledRMSNorm, CompiledMLP)


def find_compiler() -> str | None:
    """Returns the C++ compiler that kernels are built with, or None if there is none."""
    names = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def make_lean(module: nn.Module, forms: Forms = LEAN) -> None:
    """Gives the norms and gated MLPs inside of a module their lean forms, in place; parameters stay what they are.

    Args:
        module: The module.
        forms: The forms.

    Raises:
        ValueError: If a gated MLP has another activation than Gemma 3's.
    """
    for part in module.modules():
        if type(part) is Gemma3RMSNorm:
            part.__class__ = forms.norm
        elif type(part) is Gemma3MLP:
            activation = part.config.hidden_activation
            if activation != "gelu_pytorch_tanh":
                raise ValueError(f"the gated MLP's activation is {activation}, expected gelu_pytorch_tanh")
            part.__class__ = forms.mlp
