"""Protects the vocabulary of components: every parameter belongs to exactly one, ties are counted once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config.components import Component
from theworld_train.model.components import COMPONENT_PATHS, TRAITS, component_modules, component_parameters

WORLD = {Component.WORLD_ENCODER, Component.WORLD_PROJECTOR}


@pytest.mark.parametrize("enable_world", [True, False])
def test_every_parameter_belongs_to_one_component(tiny: TinyCheckpoint, enable_world: bool):
    model = tiny.theworld(enable_world=enable_world)
    parameters = component_parameters(model)
    assert parameters.keys() == set(Component) - (set() if enable_world else WORLD)
    named = dict(model.named_parameters())
    handed_out = {name: parameter for part in parameters.values() for name, parameter in part.items()}
    assert handed_out.keys() == named.keys()
    assert all(handed_out[name] is named[name] for name in named)
    assert sum(len(part) for part in parameters.values()) == len(named)


def test_the_tied_head_is_the_language_models(tiny: TinyCheckpoint):
    model = tiny.theworld()
    owners = [
        component
        for component, part in component_parameters(model).items()
        if any(parameter is model.lm_head.weight for parameter in part.values())
    ]
    assert owners == [Component.LANGUAGE_MODEL]


def test_a_parameter_without_component_is_noticed(tiny: TinyCheckpoint):
    model = tiny.theworld()
    model.stray = nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="stray"):
        component_parameters(model)


def test_a_parameter_of_two_components_is_noticed(tiny: TinyCheckpoint):
    model = tiny.theworld()
    model.world_projector.boundary = model.get_input_embeddings().weight
    with pytest.raises(AssertionError, match="belongs to two components"):
        component_parameters(model)


def test_every_component_has_a_place_and_traits(tiny: TinyCheckpoint):
    assert COMPONENT_PATHS.keys() == TRAITS.keys() == set(Component)
    assert component_modules(tiny.theworld()).keys() == set(Component)


def test_every_trait_names_parameters_that_exist(tiny: TinyCheckpoint):
    parameters = component_parameters(tiny.theworld())
    for component, traits in TRAITS.items():
        names = list(parameters[component])
        for ending in (*traits.zero_gradient, *traits.never_decayed):
            assert any(name.endswith(ending) for name in names), f"{component}: {ending}"
        for part in traits.clip_only:
            assert any(part in name for name in names), f"{component}: {part}"


def test_single_frames_leave_what_is_for_clips_alone(tiny: TinyCheckpoint):
    """The declared exceptions to "every trainable tensor moves" are exactly those of a single frame."""
    encoder = tiny.theworld(freeze_cosmos_vae=False).world_encoder
    (clip_only,) = TRAITS[Component.WORLD_ENCODER].clip_only
    for frames, expected in ((1, True), (5, False)):
        encoder.zero_grad()
        pixels = torch.rand(1, 3, frames, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
        encoder(pixels[0].transpose(0, 1), (frames,))[0].pow(2).sum().backward()
        still = {name for name, value in encoder.named_parameters() if value.grad is None or not value.grad.any()}
        assert still == (
            {name for name, _ in encoder.named_parameters() if clip_only in f".{name}"} if expected else set()
        )


def test_a_key_bias_has_no_gradient(tiny: TinyCheckpoint):
    (ending,) = TRAITS[Component.VISION_TOWER].zero_gradient
    model = tiny.theworld(freeze_gemma_vision=False).double()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model.encode_images(pixels).pow(3).sum().backward()
    sizes = {name: float(value.grad.abs().max()) for name, value in model.model.vision_tower.named_parameters()}
    assert any(name.endswith(ending) for name in sizes)
    for name, size in sizes.items():
        assert (size < 1e-9) == name.endswith(ending), name
