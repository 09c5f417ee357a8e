"""Counts a model into the parameter ledger, and holds a run to the number that its config expects."""

from __future__ import annotations

from torch import nn

from theworld_train.accounting.ledger import LedgerRow, ParameterLedger
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.model.components import component_parameters
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.train.groups import is_decayed


def build_ledger(model: TheWorldForConditionalGeneration, config: RunConfig) -> ParameterLedger:
    """Counts a model that `apply_trainable` has prepared; works on the meta device too.

    Gradients of what trains are fp32, as its masters are, and AdamW keeps two fp32 moments of it.
    """
    aliases = _aliases(model)
    rows = []
    for component, parameters in component_parameters(model).items():
        trains = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        trainable = sum(parameter.numel() for parameter in trains.values())
        dtypes = {str(parameter.dtype).removeprefix("torch.") for parameter in parameters.values()}
        entry = config.trainable.get(component) if trains else None
        lr = decay = None
        if entry is not None:
            lr = config.optimizer.lr if entry.lr is None else entry.lr
            decay = config.optimizer.weight_decay if entry.weight_decay is None else entry.weight_decay
        rows.append(
            LedgerRow(
                component=component.value,
                total=sum(parameter.numel() for parameter in parameters.values()),
                trainable=trainable,
                dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
                lr=lr,
                weight_decay=decay,
                decayed=sum(p.numel() for name, p in trains.items() if is_decayed(component, name, p)),
                weight_bytes=sum(p.numel() * p.element_size() for p in parameters.values()),
                gradient_bytes=sum(p.numel() * p.element_size() for p in trains.values()),
                optimizer_bytes=8 * trainable,
                ties=tuple(alias for name in parameters for alias in aliases.get(name, ())),
            )
        )
    return ParameterLedger(tuple(rows))


def _aliases(model: TheWorldForConditionalGeneration) -> dict[str, list[str]]:
    """Returns the further names of parameters that have several, by their first name."""
    names: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:
            aliases.setdefault(first, []).append(name)
    return aliases


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


def check_wrapped(ledger: ParameterLedger, wrapped: nn.Module) -> None:
    """Refuses a wrapped model that trains another number of parameters than the ledger says.

    Raises:
        ConfigError: With both numbers, if they differ.
    """
    number = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    if number != ledger.trainable:
        raise ConfigError(f"the ledger counts {ledger.trainable} trainable parameters, the wrapped model has {number}")


def trainable_components(config: RunConfig) -> tuple[Component, ...]:
    """Returns the components that a config trains, in the order of the vocabulary."""
    return tuple(component for component in Component if component in config.trainable)
