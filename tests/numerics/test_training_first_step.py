"""After one step of each stage, what is frozen is the same to the last bit and all that trains has moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from theworld_train.assemble import steps
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.train.groups import build_optimizer

STAGES: dict[str, tuple[str, ...]] = {
    "projection": ("world_projector",),
    "vision": ("world_projector", "model.vision_tower", "model.multi_modal_projector"),
    "language": ("world_projector", "model.language_model"),
    "full": (
        "world_projector",
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model",
        "world_encoder",
    ),
}
#: A constant that is added to every key changes no attention: these have no gradient, only its rounding.
KEY_BIASES = {f"model.vision_tower.encoder.layers.{layer}.self_attn.k_proj.bias" for layer in (0, 1)}
#: Single frames never reach the convolutions over time.
TIME_CONVS = {
    f"world_encoder.encoder.down_blocks.{block}.time_conv.{kind}" for block in (3, 5) for kind in ("weight", "bias")
}


def test_the_table_is_that_of_the_shipped_configs(shipped: Callable[..., RunConfig], tmp_path: Path):
    for stage, prefixes in STAGES.items():
        named = {component.value for component in shipped(stage, tmp_path).trainable}
        assert named == {prefix.removeprefix("model.") for prefix in prefixes}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("stage", STAGES)
def test_one_step(
    stage: str,
    precision: str,
    checkpointing: str,
    shipped: Callable[..., RunConfig],
    assembled: Callable[[RunConfig], Any],
    tmp_path: Path,
):
    overrides = {"precision": precision, "training__gradient_checkpointing": checkpointing}
    parts = assembled(shipped(stage, tmp_path, **overrides))
    before = {name: value.detach().clone() for name, value in parts.model.named_parameters()}
    (window,) = parts.windows(1)
    result = parts.trainer.step(window)
    assert result.clips_seen
    assert min(result.rates.values()) > 0
    after = dict(parts.model.named_parameters())
    for name, value in after.items():
        assert value.dtype == before[name].dtype
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    trainable = {name for name in after if name.startswith(STAGES[stage])}
    assert moved <= trainable, f"frozen tensors that moved: {sorted(moved - trainable)}"
    still = trainable - moved
    assert still <= KEY_BIASES, f"trainable tensors that stayed: {sorted(still - KEY_BIASES)}"
    assert parts.model.lm_head.weight is parts.model.get_input_embeddings().weight, "the head is not tied any more"


def test_one_step_without_clips(
    shipped: Callable[..., RunConfig], assembled: Callable[[RunConfig], Any], tmp_path: Path
):
    parts = assembled(shipped("full", tmp_path, data__train__frames=1, optimizer__weight_decay=0.1))
    before = {name: value.detach().clone() for name, value in parts.model.named_parameters()}
    (window,) = parts.windows(1)
    assert not parts.trainer.step(window).clips_seen
    still = {name for name, value in parts.model.named_parameters() if torch.equal(value, before[name])}
    assert still >= TIME_CONVS, "weights that no frame reached have moved, as by decay"
    assert still <= TIME_CONVS | KEY_BIASES, f"trainable tensors that stayed: {sorted(still - TIME_CONVS - KEY_BIASES)}"


def test_a_run_whose_optimizer_lacks_parameters_stops_after_its_first_step(
    shipped: Callable[..., RunConfig],
    finish: Callable[[RunConfig], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    def forgetful(*args: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*args)
        del optimizer.param_groups[0]
        return optimizer

    monkeypatch.setattr(steps, "build_optimizer", forgetful)
    with pytest.raises(ConfigError, match=r"did not move: model\.vision_tower"):
        finish(shipped("vision", tmp_path / "run"))
    assert not list((tmp_path / "run").glob("step-*"))
    finish(shipped("vision", tmp_path / "unchecked", training__verify_freezing=False))


def test_a_run_that_moves_frozen_parameters_stops_after_its_first_step(
    shipped: Callable[..., RunConfig],
    finish: Callable[[RunConfig], Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    def careless(model: Any, config: RunConfig) -> torch.optim.Optimizer:
        optimizer = build_optimizer(model, config)
        weight = model.model.language_model.layers[1].mlp.up_proj.weight
        optimizer.register_step_post_hook(lambda *_: weight.data.view(torch.int32)[0, 0].bitwise_xor_(1))
        return optimizer

    monkeypatch.setattr(steps, "build_optimizer", careless)
    with pytest.raises(
        ConfigError, match=r"frozen tensors that changed: model\.language_model\.layers\.1\.mlp\.up_proj"
    ):
        finish(shipped("projection", tmp_path / "run"))
