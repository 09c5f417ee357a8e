"""Adapters in a chain of stages: they train alone, merge into what they computed, and no stage loses one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.tiny import held_out, logits
from theworld_train.accounting.ledger import ParameterLedger
from theworld_train.assemble.model import ledger_of, load_model
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.model import TheWorld
from theworld_train.model.adapters import adapter_parameters, base_parameters
from theworld_train.model.components import component_modules

Shipped = Callable[..., RunConfig]
Finish = Callable[[RunConfig], Any]

LORA: dict[str, Any] = {"adapter": "lora", "r": 16, "alpha": 32, "lr": 1e-2}
ADAPTED = {"world_projector": {"lr": 1e-3}, "language_model": LORA}
#: The largest difference of merged and run, as a share of the largest logit: what summing in another order leaves.
TOLERANCE = 1e-5


def language(run: Any) -> torch.nn.Module:
    return component_modules(run.model)[Component.LANGUAGE_MODEL]


def record(checkpoint: Path) -> dict[str, dict[str, str]]:
    return json.loads((checkpoint / "components.json").read_text())["components"]


def difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


@pytest.fixture
def adapted(shipped: Shipped, finish: Finish, tmp_path: Path) -> Any:
    """A finished run in fp32 that trained an adapter of the language model."""
    return finish(shipped("language", tmp_path / "adapted", trainable=ADAPTED, training__max_steps=4))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("component", ["language_model", "vision_tower"])
def test_an_adapter_trains_and_its_component_does_not(
    component: str, optimizer: str, precision: str, shipped: Shipped, finish: Finish, tmp_path: Path
):
    settings = {
        "trainable": {component: LORA},
        "optimizer__name": optimizer,
        "precision": precision,
        "training__max_steps": 3,
    }
    config = shipped("language", tmp_path / "run", **settings)
    start = load_model(config, (Component(component),)).model
    run = finish(config)  # the freezing check is part of it
    before, after = (component_modules(model)[Component(component)] for model in (start, run.model))
    own, theirs = base_parameters(before), base_parameters(after)
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert {parameter.dtype for parameter in theirs.values()} == {
        torch.float32 if precision == "fp32" else torch.bfloat16
    }
    factors, moved = adapter_parameters(before), adapter_parameters(after)
    assert {parameter.dtype for parameter in moved.values()} == {torch.float32}
    assert not any(torch.equal(factors[name], moved[name]) for name in factors)
    ledger: ParameterLedger = ledger_of(config)
    row = next(row for row in ledger.rows if row.component == component)
    number = sum(parameter.numel() for parameter in factors.values())
    assert row.trainable == row.parts["adapter"] == ledger.trainable == number
    assert row.total == number + sum(parameter.numel() for parameter in own.values())
    assert json.loads((run.checkpoint / "ledger.json").read_text()) == json.loads(json.dumps(ledger.to_dict()))


def test_the_loss_falls(shipped: Shipped, finish: Finish, tmp_path: Path):
    run = finish(shipped("language", tmp_path / "run", trainable={"language_model": LORA}, training__max_steps=30))
    losses = [row["train/loss"] for row in run.train]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_a_checkpoint_loads_merged_and_computes_what_the_run_does(adapted: Any, shipped: Shipped, tmp_path: Path):
    files = record(adapted.checkpoint)
    assert files.keys() == {"world_projector", "language_model.adapter"}
    assert (
        load_file(adapted.checkpoint / files["language_model.adapter"]["file"]).keys()
        == adapter_parameters(language(adapted)).keys()
    )
    merged = TheWorld.from_pretrained(adapted.checkpoint, dtype=torch.float32)
    batch = held_out(adapted.checkpoint, shipped("language", tmp_path / "other"))
    own = logits(adapted.model, batch)
    assert difference(logits(merged, batch), own) < TOLERANCE
    assert not adapter_parameters(component_modules(merged)[Component.LANGUAGE_MODEL])
    merged.save_pretrained(tmp_path / "exported")
    exported = TheWorld.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert torch.equal(logits(exported, batch), logits(merged, batch))


def test_merged_in_bf16_is_rounded_once(shipped: Shipped, finish: Finish, tmp_path: Path):
    config = shipped("language", tmp_path / "run", trainable=ADAPTED, training__max_steps=4, precision="bf16")
    run = finish(config)
    factors = load_file(run.checkpoint / "language_model.adapter.safetensors")
    merged = component_modules(TheWorld.from_pretrained(run.checkpoint, dtype=torch.bfloat16))[Component.LANGUAGE_MODEL]
    layer = "layers.0.mlp.up_proj"
    change = factors[f"{layer}.lora_B.weight"] @ factors[f"{layer}.lora_A.weight"] * (32 / 16)
    base = base_parameters(language(run))[f"{layer}.weight"]
    assert torch.equal(dict(merged.named_parameters())[f"{layer}.weight"], (base.float() + change).bfloat16())


# -- the next stage ---------------------------------------------------------------------------------------------------


def test_the_same_adapter_goes_on(adapted: Any, shipped: Shipped, finish: Finish, tmp_path: Path):
    config = shipped("language", tmp_path / "next", trainable=ADAPTED, init_from=str(adapted.directory))
    before = load_model(config, tuple(config.trainable), adapted.checkpoint).model
    for name, parameter in adapter_parameters(component_modules(before)[Component.LANGUAGE_MODEL]).items():
        assert torch.equal(parameter, adapter_parameters(language(adapted))[name]), name
    run = finish(config)
    assert record(run.checkpoint)["language_model.adapter"]["trained_by"] == "language"
    assert record(run.checkpoint)["language_model.adapter"] != record(adapted.checkpoint)["language_model.adapter"]


def test_training_in_full_starts_from_the_merged_weights(
    adapted: Any, shipped: Shipped, finish: Finish, tmp_path: Path
):
    config = shipped("language", tmp_path / "next", init_from=str(adapted.directory))
    before = load_model(config, tuple(config.trainable), adapted.checkpoint).model
    batch = held_out(adapted.checkpoint, config)
    assert difference(logits(before, batch), logits(adapted.model, batch)) < TOLERANCE
    run = finish(config)
    assert record(run.checkpoint).keys() == {"world_projector", "language_model"}, "the adapter is part of the weights"
    again = TheWorld.from_pretrained(run.checkpoint, dtype=torch.float32)
    assert torch.equal(logits(again, batch), logits(run.model, batch))


def test_a_frozen_component_keeps_its_adapter(adapted: Any, shipped: Shipped, finish: Finish, tmp_path: Path):
    config = shipped("projection", tmp_path / "next", init_from=str(adapted.directory))
    before = load_model(config, tuple(config.trainable), adapted.checkpoint).model
    batch = held_out(adapted.checkpoint, config)
    assert difference(logits(before, batch), logits(adapted.model, batch)) < TOLERANCE
    run = finish(config)
    adapter = "language_model.adapter"
    assert record(run.checkpoint)[adapter] == record(adapted.checkpoint)[adapter], "carried byte for byte"
    again = TheWorld.from_pretrained(run.checkpoint, dtype=torch.float32)
    assert torch.equal(logits(again, batch), logits(run.model, batch))
    on = shipped("language", tmp_path / "last", trainable=ADAPTED, init_from=str(run.directory))
    last = load_model(on, tuple(on.trainable), run.checkpoint).model
    for name, parameter in adapter_parameters(component_modules(last)[Component.LANGUAGE_MODEL]).items():
        assert torch.equal(parameter, adapter_parameters(language(adapted))[name]), name


def test_an_adapter_on_weights_trained_in_full_keeps_both_files(shipped: Shipped, finish: Finish, tmp_path: Path):
    full = finish(shipped("language", tmp_path / "full"))
    run = finish(shipped("language", tmp_path / "next", trainable=ADAPTED, init_from=str(full.directory)))
    assert record(run.checkpoint).keys() == {"world_projector", "language_model", "language_model.adapter"}
    assert record(run.checkpoint)["language_model"] == record(full.checkpoint)["language_model"]
    batch = held_out(run.checkpoint, shipped("language", tmp_path / "other"))
    merged = TheWorld.from_pretrained(run.checkpoint, dtype=torch.float32)
    assert difference(logits(merged, batch), logits(run.model, batch)) < TOLERANCE


def test_another_adapter_and_another_optimizer_are_refused(
    adapted: Any, shipped: Shipped, finish: Finish, tmp_path: Path
):
    other = {"language_model": LORA | {"r": 8}}
    with pytest.raises(ConfigError, match="holds another adapter than the run's: 28 layers of rank 16 with alpha 32"):
        finish(shipped("language", tmp_path / "next", trainable=other, init_from=str(adapted.directory)))
    same = {"trainable": ADAPTED, "training__max_steps": 5, "resume": "latest"}
    with pytest.raises(ConfigError, match=r"optimizer\.name: was 'adamw' up to step-\d+ and is 'adamw_8bit' now"):
        finish(shipped("language", adapted.directory, optimizer__name="adamw_8bit", **same))
    with pytest.raises(ConfigError, match=r"trainable\.language_model\.adapter: was 'lora'"):
        finish(shipped("language", adapted.directory, training__max_steps=5, resume="latest"))
