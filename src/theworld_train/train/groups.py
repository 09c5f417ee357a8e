"""The optimizer: AdamW, in fp32 or 8 bits, with a group for each component and decay rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import OptimizerName, RunConfig
from theworld_train.model.adapters import INSTALL_HINT
from theworld_train.model.components import TRAITS, component_parameters
from theworld_train.model.modeling import TheWorldForConditionalGeneration

#: bitsandbytes' blockwise 8-bit states: numbers to a scale, and the smallest parameter that is kept in them.
BLOCK_8BIT = 256
SMALLEST_8BIT = 4096
#: Its slot of the first moment, and its slots of the tables that all states share, by the tables' names.
MOMENT_8BIT = "state1"
SHARED_TABLES = {"qmap1": "dynamic", "qmap2": "udynamic"}
#: What a checkpoint keeps of a parameter's step counter.
STEP_BYTES = 4


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


def optimizer_class(name: OptimizerName) -> type[torch.optim.Optimizer]:
    """Returns the class of an optimizer.

    Raises:
        ConfigError: If its library is not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            Problem(
                f"needs the package 'bitsandbytes', which cannot be imported: {error}",
                key="optimizer.name",
                value=name,
                hint=INSTALL_HINT,
            )
        ) from error
    return AdamW8bit


def adamw_implementation(device_type: str) -> dict[str, bool]:
    """Returns the arguments by which torch's AdamW takes the kernel that is chosen for a device.

    On CUDA it is the fused one: torch's own choice there, `foreach`, makes temporaries as large as a group's weights.

    Args:
        device_type: Where the parameters are, such as `cuda`.
    """
    return {"fused": True} if device_type == "cuda" else {}


def build_optimizer(model: TheWorldForConditionalGeneration, config: RunConfig) -> torch.optim.Optimizer:
    """Returns the optimizer over the trainable parameters."""
    section = config.optimizer
    groups = parameter_groups(model, config)
    arguments: dict[str, Any] = {"betas": section.betas, "eps": section.eps}
    if section.name == "adamw":
        (device_type,) = {parameter.device.type for group in groups for parameter in group["params"]}
        arguments |= adamw_implementation(device_type)
    return optimizer_class(section.name)(groups, **arguments)


def step_counter(optimizer: torch.optim.Optimizer, value: Tensor, device: torch.device) -> Tensor:
    """Returns AdamW's step counter of a parameter: beside it for the fused kernel, else on the CPU.

    Args:
        optimizer: The optimizer.
        value: What it counts, a scalar.
        device: Where the parameter is.
    """
    return value.to(device if optimizer.defaults.get("fused") else "cpu", copy=True)


def state_bytes(size: int, itemsize: int, name: OptimizerName) -> int:
    """Returns the bytes of the optimizer's state of a parameter: two moments and a step counter.

    AdamW keeps them in the parameter's dtype. The 8-bit one keeps a byte for each number and an fp32 scale for each
    block of them, but fp32 for small parameters; two tables of 1 KiB, which all parameters share, are not counted.

    Args:
        size: Numbers in the parameter.
        itemsize: Bytes of each.
        name: The optimizer.
    """
    if name == "adamw":
        return 2 * itemsize * size + STEP_BYTES
    if size < SMALLEST_8BIT:
        return 2 * 4 * size + STEP_BYTES
    return 2 * (size + 4 * math.ceil(size / BLOCK_8BIT)) + STEP_BYTES


def is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is bitsandbytes' one."""
    return hasattr(optimizer, "name2qmap")


def saved_slots(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns an optimizer's state of a parameter as tensors, without the tables that all 8-bit states share."""
    # bitsandbytes counts steps in Python.
    return {
        slot: value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int32)
        for slot, value in state.items()
        if slot not in SHARED_TABLES
    }


def restore_slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, slots: Mapping[str, Tensor]) -> None:
    """Gives an optimizer what `saved_slots` returned."""
    state: dict[str, Any] = {slot: value.to(parameter.device) for slot, value in slots.items() if slot != "step"}
    # bitsandbytes counts in Python.
    counts_in_tensor = slots["step"].is_floating_point()
    state["step"] = step_counter(optimizer, slots["step"], parameter.device) if counts_in_tensor else int(slots["step"])
    if is_8bit(optimizer) and state[MOMENT_8BIT].dtype == torch.uint8:
        tables: dict[str, Tensor] = cast(Any, optimizer).name2qmap
        for slot, table in SHARED_TABLES.items():
            state[slot] = tables[table] = tables[table].to(parameter.device)
    optimizer.state[parameter] = state


def has_stepped(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state of a parameter holds a first moment that is not zero."""
    # In 8 bits a moment is zero where the scale of its block is.
    moment = next((state[slot] for slot in ("exp_avg", "absmax1", MOMENT_8BIT) if slot in state), None)
    return moment is not None and bool(moment.any())


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Sets each group's rate to its peak times `factor` and returns the rates by component."""
    rates = {}
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
        rates[group["name"].split("/")[0]] = group["lr"]
    return rates
