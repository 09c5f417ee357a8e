"""Which parameters belong to which component: by handle on the module, never by a pattern over names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import nn

from theworld_train.config.components import Component

if TYPE_CHECKING:
    from theworld_train.model.modeling import TheWorldForConditionalGeneration

#: Where each component hangs in the model.
COMPONENT_PATHS: dict[Component, str] = {
    Component.VISION_TOWER: "model.vision_tower",
    Component.MULTI_MODAL_PROJECTOR: "model.multi_modal_projector",
    Component.LANGUAGE_MODEL: "model.language_model",
    Component.WORLD_ENCODER: "world_encoder",
    Component.WORLD_PROJECTOR: "world_projector",
}


#: What a conversation may hold; every one holds text.
Input = Literal["text", "image", "world"]


@dataclass(frozen=True)
class ComponentTraits:
    """What training has to know of a component.

    Attributes:
        input: What a batch has to hold for the component to act on the loss.
        is_encoder: It turns inputs into features, and nothing trainable feeds it; frozen, it may run outside autograd.
        zero_gradient: Name endings of parameters whose gradient is zero by mathematics.
        clip_only: Name parts of parameters that act only on clips of several frames.
        never_decayed: Name endings of matrices that are no weights of a product (positions, temporal offsets).
    """

    input: Input = "text"
    is_encoder: bool = False
    zero_gradient: tuple[str, ...] = ()
    clip_only: tuple[str, ...] = ()
    never_decayed: tuple[str, ...] = ()


TRAITS: dict[Component, ComponentTraits] = {
    # A constant added to every key shifts all scores of a query alike, which softmax ignores.
    Component.VISION_TOWER: ComponentTraits(
        input="image",
        is_encoder=True,
        zero_gradient=("k_proj.bias",),
        never_decayed=("position_embedding.weight",),
    ),
    Component.MULTI_MODAL_PROJECTOR: ComponentTraits(input="image"),
    Component.LANGUAGE_MODEL: ComponentTraits(),
    # Single frames never reach the strided convolutions over time.
    Component.WORLD_ENCODER: ComponentTraits(
        input="world", is_encoder=True, clip_only=(".time_conv.",), never_decayed=(".gamma",)
    ),
    Component.WORLD_PROJECTOR: ComponentTraits(input="world", never_decayed=("temporal", "boundary")),
}


def component_modules(model: TheWorldForConditionalGeneration) -> dict[Component, nn.Module]:
    """Returns the module of each component that the model has; without a world path the two of the world are absent."""
    modules: dict[Component, nn.Module] = {}
    for component, path in COMPONENT_PATHS.items():
        module: nn.Module | None = model
        for name in path.split("."):
            module = getattr(module, name, None)
        if module is not None:
            modules[component] = module
    return modules


def component_parameters(model: TheWorldForConditionalGeneration) -> dict[Component, dict[str, nn.Parameter]]:
    """Returns the parameters of each component by their names in the whole model, tied ones once.

    Raises:
        AssertionError: If a parameter belongs to no component or to two.
    """
    result: dict[Component, dict[str, nn.Parameter]] = {}
    seen: set[int] = set()
    for component, module in component_modules(model).items():
        path = COMPONENT_PATHS[component]
        result[component] = {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
        for name, parameter in result[component].items():
            assert id(parameter) not in seen, f"{name} belongs to two components"
            seen.add(id(parameter))
    strays = [name for name, parameter in model.named_parameters() if id(parameter) not in seen]
    assert not strays, f"parameters without a component: {strays}"
    return result
