"""The optimizer holds every trainable parameter once, at its component's rate, decayed where that means something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config.components import Component
from theworld_train.config.schema import RunConfig
from theworld_train.model.components import component_parameters
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.groups import (
    adamw_implementation,
    build_optimizer,
    is_decayed,
    parameter_groups,
    set_rates,
    step_counter,
)

Config = Callable[..., RunConfig]
FULL = tuple(Component)


def test_every_trainable_parameter_is_in_one_group(
    tiny: TinyCheckpoint, run_config: Config, trainable: tuple[Component, ...]
):
    model = tiny.theworld().requires_grad_(True)
    apply_trainable(model, trainable, "fp32")
    groups = parameter_groups(model, run_config(*trainable))
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members)), "a parameter is in two groups"
    assert set(members) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    names = dict(model.named_parameters())
    for group in groups:
        assert [id(names[name]) for name in group["parameter_names"]] == [id(member) for member in group["params"]]
    assert {group["name"].split("/")[0] for group in groups} == {component.value for component in trainable}


def test_tied_head_is_stepped_once(tiny: TinyCheckpoint, run_config: Config):
    model = tiny.theworld().requires_grad_(True)
    groups = parameter_groups(model, run_config("language_model"))
    embeddings = [name for group in groups for name in group["parameter_names"] if "embed_tokens" in name]
    assert embeddings == ["model.language_model.embed_tokens.weight"]
    assert not [name for group in groups for name in group["parameter_names"] if "lm_head" in name]


def test_rates_and_decay_are_the_components_own_or_the_optimizers(tiny: TinyCheckpoint, run_config: Config):
    table = {
        "world_projector": {"lr": 3e-3},
        "vision_tower": {"weight_decay": 0.5},
        "language_model": {"lr": 1e-5, "weight_decay": 0.0},
        "multi_modal_projector": {},
    }
    optimizer = {"lr": 1e-4, "weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-7}
    config = run_config(optimizer=optimizer).model_copy(
        update={"trainable": run_config(trainable=table).trainable}  # the table, with rates
    )
    built = build_optimizer(tiny.theworld().requires_grad_(True), config)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in built.param_groups} == {
        "world_projector/decay": (3e-3, 0.1),
        "world_projector/no_decay": (3e-3, 0.0),
        "vision_tower/decay": (1e-4, 0.5),
        "vision_tower/no_decay": (1e-4, 0.0),
        "language_model/decay": (1e-5, 0.0),
        "language_model/no_decay": (1e-5, 0.0),
        "multi_modal_projector/decay": (1e-4, 0.1),
        "multi_modal_projector/no_decay": (1e-4, 0.0),
    }
    assert all((group["betas"], group["eps"]) == ((0.8, 0.95), 1e-7) for group in built.param_groups)


def test_only_matrices_of_products_decay(tiny: TinyCheckpoint, run_config: Config):
    groups = parameter_groups(tiny.theworld().requires_grad_(True), run_config(*FULL))
    decayed = {name for group in groups if group["name"].endswith("/decay") for name in group["parameter_names"]}
    others = {name for group in groups if group["name"].endswith("/no_decay") for name in group["parameter_names"]}
    assert not [name for name in decayed if name.endswith("bias") or "norm" in name]
    assert {name for name in others if not name.endswith("bias") and "norm" not in name} == {
        "model.vision_tower.embeddings.position_embedding.weight",
        "world_projector.temporal",
        "world_projector.boundary",
        "world_encoder.encoder.down_blocks.3.time_conv.weight",  # idle on single frames: decay would shrink it
        "world_encoder.encoder.down_blocks.5.time_conv.weight",
    }
    assert "model.language_model.embed_tokens.weight" in decayed
    assert "model.multi_modal_projector.mm_input_projection_weight" in decayed


@pytest.mark.parametrize(
    ("component", "name", "shape", "expected"),
    [
        (Component.LANGUAGE_MODEL, "layers.0.mlp.up_proj.weight", (4, 4), True),
        (Component.LANGUAGE_MODEL, "layers.0.input_layernorm.weight", (4,), False),
        (Component.VISION_TOWER, "embeddings.patch_embedding.weight", (4, 3, 2, 2), True),
        (Component.VISION_TOWER, "embeddings.position_embedding.weight", (4, 4), False),
        (Component.WORLD_PROJECTOR, "world_projector.temporal", (9, 4), False),
        (Component.WORLD_PROJECTOR, "world_projector.projection.0.weight", (4, 4), True),
        (Component.WORLD_ENCODER, "encoder.down_blocks.3.time_conv.weight", (4, 4, 3, 1, 1), False),
        (Component.WORLD_ENCODER, "encoder.conv_in.weight", (4, 3, 3, 3, 3), True),
    ],
)
def test_decay_rule(component: Component, name: str, shape: tuple[int, ...], expected: bool):
    assert is_decayed(component, name, torch.nn.Parameter(torch.zeros(shape))) is expected


def test_rates_are_a_factor_of_each_peak(tiny: TinyCheckpoint, run_config: Config):
    config = run_config(trainable={"world_projector": {"lr": 1e-2}, "multi_modal_projector": {"lr": 1e-3}})
    optimizer = build_optimizer(tiny.theworld().requires_grad_(True), config)
    assert set_rates(optimizer, 0.5) == pytest.approx({"world_projector": 5e-3, "multi_modal_projector": 5e-4})
    set_rates(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {2.5e-3, 2.5e-4}, "factors do not pile up"


def test_every_component_has_its_parameters(tiny: TinyCheckpoint):
    assert set(component_parameters(tiny.theworld().requires_grad_(True))) == set(FULL)


def test_step_counters_are_where_the_chosen_kernel_reads_them():
    parameter = torch.nn.Parameter(torch.zeros(2, device="meta"))
    counted = torch.tensor(3.0)
    devices = {}
    for device_type in ("cuda", "cpu"):
        optimizer = torch.optim.AdamW([parameter], **adamw_implementation(device_type))
        devices[device_type] = step_counter(optimizer, counted, parameter.device).device.type
    assert devices == {"cuda": "meta", "cpu": "cpu"}, "beside the parameter for the fused kernel, else on the CPU"
    kept = step_counter(optimizer, counted, parameter.device)
    kept += 1
    assert counted == 3, "what was loaded is not counted on"
