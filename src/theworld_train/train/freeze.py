"""Freezing: the one place where a stage's trainable table becomes gradients, dtypes and modes of the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.model.adapters import adapted_layers, adapter_parameters, without_gradient
from theworld_train.model.components import TRAITS, Input, component_modules, component_parameters
from theworld_train.model.digest import digests
from theworld_train.model.modeling import TheWorldForConditionalGeneration

Precision = Literal["bf16", "fp32", "bf16_pure"]


def apply_trainable(
    model: TheWorldForConditionalGeneration,
    trainable: Collection[Component],
    precision: Precision,
    world_encoder_dtype: torch.dtype = torch.float32,
) -> None:
    """Makes exactly the named components trainable, and stores every parameter in its dtype.

    Of a component that has an adapter, the adapter alone trains.

    What trains is stored in fp32 (its master weights); under `bf16` what is frozen is stored in bf16, but for the world
    encoder, whose latents shift in bf16. Under `bf16_pure` what trains is stored in bf16 too. Buffers keep their
    dtypes: rotary frequencies must stay fp32.

    Args:
        model: The model; loaded in the dtypes of its checkpoint, so that masters start unrounded.
        trainable: Components that train.
        precision: Of the run.
        world_encoder_dtype: Of the world encoder while it is frozen.

    Raises:
        ConfigError: If a component is named that the model does not have.
    """
    modules = component_modules(model)
    if absent := [component.value for component in trainable if component not in modules]:
        raise ConfigError(f"the model has no {', '.join(absent)}: it was built without a world path")
    for component, module in modules.items():
        factors = {id(parameter) for parameter in adapter_parameters(module).values()}
        for parameter in module.parameters():
            trains = component in trainable and (not factors or id(parameter) in factors)
            parameter.requires_grad_(trains)
            if precision == "fp32" or (trains and precision == "bf16"):
                dtype = torch.float32
            elif trains:
                dtype = torch.bfloat16
            else:
                dtype = world_encoder_dtype if component is Component.WORLD_ENCODER else torch.bfloat16
            parameter.data = parameter.data.to(dtype)
    _pin_embedding_scale(model, precision)
    set_modes(model, trainable)


def _pin_embedding_scale(model: TheWorldForConditionalGeneration, precision: Precision) -> None:
    """Gives the factor on token embeddings one value for a precision.

    Gemma 3 rounds it to the embedding's dtype, so that fp32 masters under autocast would compute with 50.596 where bf16
    weights compute with 50.5 (hidden size 2560).
    """
    embedding: Any = model.get_input_embeddings()
    scale = torch.tensor(embedding.scalar_embed_scale, dtype=torch.float32)
    if precision != "fp32":
        scale = scale.to(torch.bfloat16)
    embedding.embed_scale = scale.float().to(embedding.weight.device)


def set_modes(model: TheWorldForConditionalGeneration, trainable: Collection[Component]) -> None:
    """Sets train mode where something trains and eval mode, hence no dropout, where nothing does.

    Of a component with an adapter, only the adapted layers are in train mode. Transformers checkpoints a layer only
    while the layer itself is in train mode, so checkpointed layers of a frozen component are in train mode and
    everything inside of them, where dropout lives, is not.
    """
    for component, module in component_modules(model).items():
        adapted = adapted_layers(module).values()
        module.train(component in trainable and not adapted)
        for layer in adapted:
            layer.train(component in trainable)
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.training = True


def frozen_and_trainable(
    model: TheWorldForConditionalGeneration,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Returns the frozen and the trainable parameters of the whole model by name."""
    every = {name: parameter for group in component_parameters(model).values() for name, parameter in group.items()}
    frozen = {name: parameter for name, parameter in every.items() if not parameter.requires_grad}
    return frozen, {name: parameter for name, parameter in every.items() if parameter.requires_grad}


@dataclass(frozen=True)
class Violations:
    """Tensors that broke the contract of freezing, as far as one rank can tell.

    Attributes:
        changed: Frozen tensors of which this rank's part has changed.
        still: Trainable tensors of which this rank's part has not moved; a fault only if no rank's part has.
    """

    changed: frozenset[str]
    still: frozenset[str]


class FreezingCheck:
    """Compares the weights before and after a step: what is frozen is bit-identical, and all that trains has moved."""

    def __init__(
        self,
        model: TheWorldForConditionalGeneration,
        held: Callable[[nn.Parameter], Tensor] = lambda parameter: parameter,
    ) -> None:
        """Takes the fingerprints before the step.

        Args:
            model: The model, as an engine has wrapped it.
            held: What this rank holds of a parameter.
        """
        self._model = model
        self._held = held
        frozen, trainable = frozen_and_trainable(model)
        self._frozen, self._trainable = self._digests(frozen), self._digests(trainable)
        idle = {key for module in component_modules(model).values() for key in without_gradient(module)}
        self._without_gradient = {name for name, parameter in trainable.items() if id(parameter) in idle}
        self._pending = {
            component for component, parameters in component_parameters(model).items() if parameters.keys() & trainable
        }

    def _digests(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, str]:
        return digests({name: self._held(parameter) for name, parameter in parameters.items()})

    @property
    def pending(self) -> tuple[Component, ...]:
        """Trainable components that no step so far has held any input for."""
        return tuple(component for component in Component if component in self._pending)

    def compare(self, *, clips_seen: bool, inputs: Collection[Input] = ("text", "image", "world")) -> Violations:
        """Takes the fingerprints again, of frozen parts once and of each trainable component when it was first used.

        Args:
            clips_seen: Whether the step saw a clip of several frames; parameters that act on clips alone may stay
                otherwise.
            inputs: What the step has seen; components that act on nothing of it stay pending.
        """
        used = {component for component in self._pending if TRAITS[component].input in inputs}
        frozen, trainable = frozen_and_trainable(self._model)
        after = self._digests({name: frozen[name] for name in self._frozen})
        changed = {name for name, value in self._frozen.items() if after[name] != value}
        names = {name for component in used for name in component_parameters(self._model)[component]}
        after = self._digests({name: parameter for name, parameter in trainable.items() if name in names})
        exempt = exempt_parameters(self._model, clips_seen=clips_seen) | self._without_gradient
        still = {name for name, value in after.items() if self._trainable[name] == value and name not in exempt}
        self._pending = self._pending - used
        self._frozen = {}
        return Violations(frozenset(changed), frozenset(still))


def refuse_violations(changed: Collection[str], still: Collection[str]) -> None:
    """Stops a run that has trained something else than its config says.

    Args:
        changed: Frozen tensors that have changed.
        still: Trainable tensors that have neither moved nor had a gradient.

    Raises:
        ConfigError: If there are any.
    """
    parts = []
    if changed:
        parts.append(f"frozen tensors that changed: {_listed(changed)}")
    if still:
        parts.append(f"trainable tensors that did not move: {_listed(still)}")
    if parts:
        raise ConfigError(
            "a step did not train what the config says; "
            + "; ".join(parts)
            + " (training.verify_freezing: false switches this check off)"
        )


def exempt_parameters(model: TheWorldForConditionalGeneration, *, clips_seen: bool) -> frozenset[str]:
    """Returns trainable parameters that a step may leave alone, as their components declare it."""
    names = set()
    for component, parameters in component_parameters(model).items():
        traits = TRAITS[component]
        for name in parameters:
            idle = not clips_seen and any(part in name for part in traits.clip_only)
            if idle or name.endswith(traits.zero_gradient):
                names.add(name)
    return frozenset(names)


def _listed(names: Collection[str], most: int = 8) -> str:
    shown = sorted(names)[:most]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def parameter_counts(model: TheWorldForConditionalGeneration) -> Mapping[Component, tuple[int, int]]:
    """Returns total and trainable parameters of each component."""
    return {
        component: (
            sum(parameter.numel() for parameter in parameters.values()),
            sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
        )
        for component, parameters in component_parameters(model).items()
    }
