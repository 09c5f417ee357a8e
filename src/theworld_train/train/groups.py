"""The optimizer: AdamW with a group for each component and decay rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from theworld_train.config.components import Component
from theworld_train.config.schema import RunConfig
from theworld_train.model.components import TRAITS, component_parameters
from theworld_train.model.modeling import TheWorldForConditionalGeneration


def is_decayed(component: Component, name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices of products, not to norms, biases, positions or idle parameters."""
    traits = TRAITS[component]
    idle = any(part in name for part in traits.clip_only)
    return parameter.ndim >= 2 and not idle and not name.endswith(traits.never_decayed)


def parameter_groups(model: TheWorldForConditionalGeneration, config: RunConfig) -> list[dict[str, Any]]:
    """Returns the optimizer's groups, two at most for each trainable component.

    Each group carries `name`, `parameter_names` and `peak_lr` besides the optimizer's own keys.
    """
    groups: list[dict[str, Any]] = []
    for component, parameters in component_parameters(model).items():
        if component not in config.trainable:
            continue
        entry = config.trainable[component]
        lr = config.optimizer.lr if entry.lr is None else entry.lr
        decay = config.optimizer.weight_decay if entry.weight_decay is None else entry.weight_decay
        for decayed in (True, False):
            members = {
                n: p for n, p in parameters.items() if p.requires_grad and is_decayed(component, n, p) == decayed
            }
            if members:
                groups.append(
                    {
                        "name": f"{component.value}/{'decay' if decayed else 'no_decay'}",
                        "params": list(members.values()),
                        "parameter_names": list(members),
                        "lr": lr,
                        "peak_lr": lr,
                        "weight_decay": decay if decayed else 0.0,
                    }
                )
    return groups


def build_optimizer(model: TheWorldForConditionalGeneration, config: RunConfig) -> torch.optim.AdamW:
    """Returns AdamW over the trainable parameters."""
    section = config.optimizer
    return torch.optim.AdamW(parameter_groups(model, config), betas=section.betas, eps=section.eps)


def state_bytes(size: int) -> int:
    """Returns the bytes of AdamW's state of a parameter of so many numbers: two fp32 moments, and a step counter."""
    return 2 * 4 * size + 4


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Sets each group's rate to its peak times `factor` and returns the rates by component."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["name"].split("/")[0]] = group["lr"]
    return rates
