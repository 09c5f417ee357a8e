"""Low-rank adapters: the factors beside a component's linear layers, and the weights that they merge into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from theworld_train.config.errors import ConfigError, Problem, did_you_mean

#: What the name of a component's adapter ends with in a checkpoint's record, and its file before the suffix.
ADAPTER_SUFFIX = ".adapter"
INSTALL_HINT = "pip install 'theworld-train[adapters]'"
_NAME = "default"  # PEFT's name for the only adapter of a layer
_ALPHA = "lora_alpha"


@dataclass(frozen=True)
class Adapter:
    """The shape of a LoRA adapter.

    Attributes:
        r: Rank of the two factors.
        alpha: The product of the factors is scaled by `alpha / r`.
        dropout: Share of the inputs of the first factor that are dropped in training.
        target_modules: Ends of the names of the linear layers that are adapted; None for all of them.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] | None = None


def add_adapter(module: nn.Module, adapter: Adapter, key: str = "adapter") -> None:
    """Puts an adapter beside the linear layers of a component, in place.

    The first factor is drawn from torch's random state and the second is zero: the component computes what it did.

    Args:
        module: The component.
        adapter: Its shape.
        key: Where a config states it, for problems.

    Raises:
        ConfigError: If PEFT is not installed, or an end of a name matches no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        problem = Problem("needs the package 'peft', which is not installed", key=key, hint=INSTALL_HINT)
        raise ConfigError(problem) from error
    assert not adapted_layers(module), "a component has one adapter"
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type] # a ratio's numerator; PEFT only divides it
        lora_dropout=adapter.dropout,
        target_modules=_targets(module, adapter.target_modules, key),
    )
    inject_adapter_in_model(config, module, _NAME, low_cpu_mem_usage=next(module.parameters()).is_meta)
    for layer in adapted_layers(module).values():
        # PEFT casts a layer's input to the factors' dtype, which under autocast would keep a second, fp32 copy of it.
        layer.cast_input_dtype_enabled = False


def _targets(module: nn.Module, ends: tuple[str, ...] | None, key: str) -> list[str]:
    """Returns the names of the linear layers that are adapted."""
    linear = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    if ends is None:
        return linear
    problems = [
        Problem(
            "names no linear layer of the component",
            key=f"{key}.target_modules",
            value=end,
            hint=did_you_mean(end, sorted({name.split(".")[-1] for name in linear})),
        )
        for end in ends
        if not any(_ends_with(name, end) for name in linear)
    ]
    if problems:
        raise ConfigError(problems)
    return [name for name in linear if any(_ends_with(name, end) for end in ends)]


def _ends_with(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """Returns the layers of a component that have an adapter; PEFT's layers are known by their first factor."""
    layers = module.named_modules()
    return {name: layer for name, layer in layers if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict)}


def adapter_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the factors of a component's adapter by the names that a checkpoint gives them."""
    factors = {}
    for name, layer in adapted_layers(module).items():
        factors[f"{name}.lora_A.weight"] = layer.lora_A[_NAME].weight
        factors[f"{name}.lora_B.weight"] = layer.lora_B[_NAME].weight
    return factors


def base_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns a component's own parameters by the names that they have without an adapter."""
    factors = {id(parameter) for parameter in adapter_parameters(module).values()}
    return {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in module.named_parameters()
        if id(parameter) not in factors
    }


def without_gradient(module: nn.Module) -> set[int]:
    """Returns the identities of first factors whose gradient is zero, as it is a product with a second that is zero."""
    layers = adapted_layers(module).values()
    return {id(layer.lora_A[_NAME].weight) for layer in layers if not layer.lora_B[_NAME].weight.any()}


# -- files ------------------------------------------------------------------------------------------------------------


def adapter_metadata(module: nn.Module) -> dict[str, str]:
    """Returns what the file of an adapter says besides its tensors."""
    alphas = {float(layer.lora_alpha[_NAME]) for layer in adapted_layers(module).values()}
    assert len(alphas) == 1, "an adapter has one alpha"
    return {_ALPHA: repr(alphas.pop())}


@torch.no_grad()
def load_adapter(module: nn.Module, path: Path) -> None:
    """Takes an adapter over: into the component's own one, or else merged into the weights.

    Args:
        module: The component.
        path: The adapter's file.

    Raises:
        ConfigError: If the component has another adapter, or lacks a layer that the file adapts.
    """
    tensors, alpha = load_file(path), _alpha_of(path)
    own = adapter_parameters(module)
    if not own:
        _merge(module, tensors, alpha, path)
        return
    here, there = ({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (own, tensors))
    own_alpha = float(adapter_metadata(module)[_ALPHA])
    if here != there or own_alpha != alpha:
        raise ConfigError(
            Problem(
                f"{path} holds another adapter than the run's: {_described(tensors, alpha)}, not "
                f"{_described(own, own_alpha)}",
                hint="train on with the same adapter, or train the component in full, into which it is merged",
            )
        )
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def _alpha_of(path: Path) -> float:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if _ALPHA not in metadata:
        raise ConfigError(f"{path} is no adapter of ours: its header has no {_ALPHA}")
    return float(metadata[_ALPHA])


def _described(factors: dict[str, Any], alpha: float) -> str:
    ranks = sorted({tensor.shape[0] for name, tensor in factors.items() if name.endswith(".lora_A.weight")})
    return f"{len(factors) // 2} layers of rank {', '.join(map(str, ranks))} with alpha {alpha:g}"


def _merge(module: nn.Module, tensors: dict[str, Tensor], alpha: float, path: Path) -> None:
    """Adds the product of the factors to the weights, in fp32 and rounded once."""
    weights = dict(module.named_parameters())
    for layer in sorted({name.rsplit(".lora_", 1)[0] for name in tensors}):
        first, second = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        weight = weights.get(f"{layer}.weight")
        if weight is None or weight.shape != (second.shape[0], first.shape[1]):
            raise ConfigError(f"{path} adapts {layer}, which the model does not have in that shape")
        if weight.is_meta:
            raise ConfigError(f"{layer} is not in memory, so {path} cannot be merged into it; load without device_map")
        change = second.to(weight.device).float() @ first.to(weight.device).float() * (alpha / first.shape[0])
        weight.copy_(weight.float() + change)
