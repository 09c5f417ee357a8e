"""Protects low-rank adapters: which layers they adapt, that they begin as nothing, and what they merge into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.model.adapters import (
    Adapter,
    adapted_layers,
    adapter_metadata,
    adapter_parameters,
    add_adapter,
    base_parameters,
    load_adapter,
    without_gradient,
)
from theworld_train.model.components import component_modules

Make = Callable[..., nn.Module]


@pytest.fixture
def component(tiny: TinyCheckpoint) -> Make:
    """Makes a component of the tiny model in fp32."""

    def make(name: str = "language_model") -> nn.Module:
        return component_modules(tiny.theworld(dtype=torch.float32))[Component(name)]

    return make


def shake(module: nn.Module, seed: int = 1) -> None:
    """Gives both factors values as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(module).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def save(module: nn.Module, path: Path) -> Path:
    save_file({n: p.detach() for n, p in adapter_parameters(module).items()}, path, adapter_metadata(module))
    return path


def hidden(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = module(input_ids=torch.arange(12)[None], use_cache=False).last_hidden_state
    return states


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("language_model", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("vision_tower", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_every_linear_layer_is_adapted_and_nothing_else(component: Make, name: str, layers: set[str]):
    module = component(name)
    linear = {path for path, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    before = dict(module.named_parameters())
    add_adapter(module, Adapter(r=3))
    assert set(adapted_layers(module)) == linear
    assert {path.split(".")[-1] for path in linear} == layers
    base = base_parameters(module)
    assert base.keys() == before.keys(), "the component's own parameters keep their names"
    assert all(base[path] is before[path] for path in before)
    assert len(adapter_parameters(module)) == 2 * len(linear)
    every = {id(parameter) for parameter in module.parameters()}
    assert every == {id(p) for p in [*base.values(), *adapter_parameters(module).values()]}


def test_named_layers_alone_are_adapted(component: Make):
    module = component()
    add_adapter(module, Adapter(target_modules=("q_proj", "1.self_attn.v_proj")))
    ends = [".".join(path.split(".")[-2:]) for path in adapted_layers(module)]
    assert ends.count("self_attn.q_proj") == 4
    assert [path for path in adapted_layers(module) if path.endswith("v_proj")] == ["layers.1.self_attn.v_proj"]
    assert len(ends) == 5


def test_names_that_match_nothing_are_refused_with_the_nearest(component: Make):
    with pytest.raises(ConfigError) as caught:
        add_adapter(component(), Adapter(target_modules=("q_proj", "kproj", "embed_tokens", "proj")), "trainable.x")
    assert [problem.value for problem in caught.value.problems] == ["kproj", "embed_tokens", "proj"]
    assert {problem.key for problem in caught.value.problems} == {"trainable.x.target_modules"}
    assert caught.value.problems[0].hint == "did you mean 'k_proj'?"


def test_a_new_adapter_changes_nothing_and_a_moved_one_does(component: Make):
    module = component()
    before = hidden(module)
    add_adapter(module, Adapter(r=4))
    assert torch.equal(hidden(module), before)
    shake(module)
    assert not torch.allclose(hidden(module), before, atol=1e-2)


def test_alpha_over_rank_scales_the_product(component: Make):
    states = []
    for r, alpha in ((4, 8.0), (8, 16.0)):
        module = component()
        add_adapter(module, Adapter(r=r, alpha=alpha, target_modules=("0.self_attn.q_proj",)))
        factors = adapter_parameters(module)
        with torch.no_grad():
            for parameter in factors.values():
                parameter.zero_()
            factors["layers.0.self_attn.q_proj.lora_A.weight"][0] = 0.3
            factors["layers.0.self_attn.q_proj.lora_B.weight"][:, 0] = torch.linspace(-1, 1, 96)
        states.append(hidden(module))
    torch.testing.assert_close(*states)


def test_first_factors_have_no_gradient_until_the_second_has_moved(component: Make):
    module = component()
    add_adapter(module, Adapter())
    factors = adapter_parameters(module)
    firsts = {id(p) for name, p in factors.items() if name.endswith("lora_A.weight")}
    assert without_gradient(module) == firsts
    module(input_ids=torch.arange(12)[None], use_cache=False).last_hidden_state.square().sum().backward()
    assert all(bool(parameter.grad.any()) is (id(parameter) not in firsts) for parameter in factors.values())
    with torch.no_grad():
        factors["layers.0.mlp.up_proj.lora_B.weight"][0, 0] = 1e-6
    assert firsts - without_gradient(module) == {id(factors["layers.0.mlp.up_proj.lora_A.weight"])}


def test_the_same_adapter_comes_back_bit_for_bit(component: Make, tmp_path: Path):
    module = component()
    add_adapter(module, Adapter(r=4, alpha=24.0))
    shake(module)
    path = save(module, tmp_path / "language_model.adapter.safetensors")
    fresh = component()
    add_adapter(fresh, Adapter(r=4, alpha=24.0, dropout=0.5))
    load_adapter(fresh, path)
    for name, parameter in adapter_parameters(fresh).items():
        assert torch.equal(parameter, load_file(path)[name]), name


@pytest.mark.parametrize(
    "other", [Adapter(r=8, alpha=24.0), Adapter(r=4, alpha=25.0), Adapter(r=4, alpha=24.0, target_modules=("q_proj",))]
)
def test_another_adapter_is_refused(component: Make, tmp_path: Path, other: Adapter):
    module = component()
    add_adapter(module, Adapter(r=4, alpha=24.0))
    path = save(module, tmp_path / "language_model.adapter.safetensors")
    fresh = component()
    add_adapter(fresh, other)
    with pytest.raises(ConfigError, match=r"28 layers of rank 4 with alpha 24, not .* alpha .*in full"):
        load_adapter(fresh, path)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_merged_weights_compute_what_the_adapter_did(
    tiny: TinyCheckpoint, tmp_path: Path, dtype: torch.dtype, tolerance: float
):
    module = component_modules(tiny.theworld(dtype=dtype))[Component.LANGUAGE_MODEL]
    add_adapter(module, Adapter(r=4))
    shake(module)
    path = save(module, tmp_path / "language_model.adapter.safetensors")
    merged = component_modules(tiny.theworld(dtype=dtype))[Component.LANGUAGE_MODEL]
    base = hidden(merged)
    load_adapter(merged, path)
    expected = hidden(module).float()
    assert (hidden(merged).float() - expected).norm() <= tolerance * expected.norm()
    assert (base.float() - expected).norm() > 10 * tolerance * expected.norm(), "the adapter does something"
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}


def test_a_file_for_another_model_is_refused(component: Make, tmp_path: Path):
    module = component("vision_tower")
    add_adapter(module, Adapter(r=4))
    path = save(module, tmp_path / "vision_tower.adapter.safetensors")
    with pytest.raises(ConfigError, match="which the model does not have in that shape"):
        load_adapter(component(), path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match="no adapter of ours"):
        load_adapter(component("vision_tower"), path)
