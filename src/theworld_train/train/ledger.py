"""Counts a model into the parameter ledger, and holds a run to the number that its config expects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from theworld_train.accounting.ledger import LedgerRow, ParameterLedger
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import OptimizerName, RunConfig
from theworld_train.model.adapters import ADAPTER_SUFFIX, Adapter, adapter_parameters, add_adapter, base_parameters
from theworld_train.model.components import component_modules, component_parameters
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.train.groups import parameter_groups, state_bytes


def build_ledger(model: TheWorldForConditionalGeneration, config: RunConfig) -> ParameterLedger:
    """Counts a model that `apply_trainable` has prepared; works on the meta device too."""
    modules = {component.value: module for component, module in component_modules(model).items()}
    return count_parameters(
        model,
        modules,
        parameter_groups(model, config),
        masters=config.precision == "bf16",
        optimizer=config.optimizer.name,
    )


def count_parameters(
    model: nn.Module,
    components: Mapping[str, nn.Module],
    groups: Sequence[Mapping[str, Any]] = (),
    *,
    masters: bool = False,
    optimizer: OptimizerName = "adamw",
) -> ParameterLedger:
    """Counts any model by its components.

    Args:
        model: The model, before an engine wraps it: ties are known by the identity of its parameters.
        components: Modules of the model by name; each parameter has to belong to exactly one of them.
        groups: What an optimizer is given: `params`, `lr` (or `peak_lr`) and `weight_decay`.
        masters: Whether what trains is computed with in another dtype than it is stored in.
        optimizer: Which optimizer it is.

    Raises:
        AssertionError: If a parameter belongs to no component or to two.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    strays = {key: first for key, (first, *_) in names.items()}
    rows = []
    for component, module in components.items():
        for parameter in module.parameters():
            assert strays.pop(id(parameter), None), f"{component} holds a parameter of another component"
        rows.append(_row(component, module, names, group_of, masters=masters, optimizer=optimizer))
    assert not strays, f"parameters without a component: {list(strays.values())}"
    return ParameterLedger(tuple(rows), sum(global_size(parameter) for parameter in model.parameters()))


def _row(
    component: str,
    module: nn.Module,
    names: Mapping[int, Sequence[str]],
    group_of: Mapping[int, Mapping[str, Any]],
    *,
    masters: bool,
    optimizer: OptimizerName,
) -> LedgerRow:
    """Counts the parameters of one component; the factors of an adapter are one part."""
    factors = adapter_parameters(module)
    parameters = base_parameters(module) | factors
    columns: Counter[str] = Counter()
    parts: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    groups = []
    for name, parameter in parameters.items():
        size, group = global_size(parameter), group_of.get(id(parameter))
        stored = size * parameter.element_size()
        parts["adapter" if name in factors else name.split(".")[0]] += size
        dtypes[str(parameter.dtype).removeprefix("torch.")] += size
        columns["total"] += size
        columns["master_bytes" if masters and parameter.requires_grad else "weight_bytes"] += stored
        if parameter.requires_grad:
            columns["trainable"] += size
            columns["gradient_bytes"] += stored
        if group is not None:
            groups.append(group)
            columns["decayed"] += size if group["weight_decay"] else 0
            columns["optimizer_bytes"] += state_bytes(size, parameter.element_size(), optimizer)
    return LedgerRow(
        component=component,
        total=columns["total"],
        trainable=columns["trainable"],
        parts=dict(parts),
        dtypes=dict(dtypes),
        ties=tuple(tuple(names[id(p)]) for p in parameters.values() if len(names[id(p)]) > 1),
        lr=max((group.get("peak_lr", group["lr"]) for group in groups), default=None),
        weight_decay=max((group["weight_decay"] for group in groups), default=None),
        decayed=columns["decayed"],
        weight_bytes=columns["weight_bytes"],
        master_bytes=columns["master_bytes"],
        gradient_bytes=columns["gradient_bytes"],
        optimizer_bytes=columns["optimizer_bytes"],
    )


def global_size(parameter: nn.Parameter) -> int:
    """Returns the numbers in a parameter over all ranks, of which an engine may have left only a shard here.

    A DTensor's own size is the global one; ZeRO-3 leaves an empty tensor and keeps the size beside it.
    """
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def check_expectation(ledger: ParameterLedger, config: RunConfig) -> None:
    """Refuses a model whose trainable parameters are not as many as the config says.

    Raises:
        ConfigError: With both numbers, if they differ.
    """
    expected = config.expect_trainable
    if expected is not None and ledger.trainable != expected:
        parts = ", ".join(f"{row.component} {row.trainable:,}" for row in ledger.rows if row.trainable)
        raise ConfigError(
            Problem(
                f"the trainable table makes {ledger.trainable} parameters trainable ({parts}), not {expected}",
                key="expect_trainable",
                hint=f"if that is what you want, state expect_trainable: {ledger.trainable}",
            )
        )


def check_wrapped(ledger: ParameterLedger, wrapped: nn.Module, model: TheWorldForConditionalGeneration) -> None:
    """Refuses a model that an engine has changed: other sizes than the ledger's, or trainable parts left outside.

    Args:
        ledger: Of the model before it was wrapped.
        wrapped: What the engine returned.
        model: The model, whose components the engine may have given other parameters, such as shards.

    Raises:
        ConfigError: With all numbers that differ.
    """
    problems = []
    parameters = component_parameters(model)
    for row in ledger.rows:
        own = parameters[Component(row.component)].values()
        total = sum(global_size(parameter) for parameter in own)
        trainable = sum(global_size(parameter) for parameter in own if parameter.requires_grad)
        if (total, trainable) != (row.total, row.trainable):
            problems.append(
                Problem(
                    f"the ledger counts {row.trainable} trainable of {row.total} parameters, "
                    f"the wrapped model has {trainable} of {total}",
                    key=row.component,
                )
            )
    inside = sum(global_size(parameter) for parameter in wrapped.parameters() if parameter.requires_grad)
    if inside != ledger.trainable:
        problems.append(
            Problem(f"the ledger counts {ledger.trainable} trainable parameters, the engine wraps {inside} of them")
        )
    if problems:
        raise ConfigError(problems)


def trainable_components(config: RunConfig) -> tuple[Component, ...]:
    """Returns the components that a config trains, in the order of the vocabulary."""
    return tuple(component for component in Component if component in config.trainable)


def adapters(config: RunConfig) -> dict[Component, Adapter]:
    """Returns the adapters of a config by component, with defaults where it leaves something open."""
    result = {}
    for component, entry in config.trainable.items():
        if entry.adapter is not None:
            stated = {name: getattr(entry, name) for name in ("r", "alpha", "dropout", "target_modules")}
            result[component] = Adapter(**{name: value for name, value in stated.items() if value is not None})
    return result


def add_adapters(model: TheWorldForConditionalGeneration, config: RunConfig) -> None:
    """Puts the adapters of a config into a model, before `apply_trainable`; works on the meta device too.

    Raises:
        ConfigError: If an adapter does not fit its component.
    """
    modules = component_modules(model)
    for component, adapter in adapters(config).items():
        add_adapter(modules[component], adapter, f"trainable.{component}")


def saved_names(config: RunConfig) -> tuple[str, ...]:
    """Returns what a run trains by the names of a checkpoint's record: components, and adapters of components."""
    names = (f"{component}{ADAPTER_SUFFIX if entry.adapter else ''}" for component, entry in config.trainable.items())
    return tuple(sorted(names))
