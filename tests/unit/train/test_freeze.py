"""Freezing: exactly the table trains, in fp32; the rest keeps still, in its dtype, without dropout."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.helpers.tiny import TinyCheckpoint, assistant, clip, image, user
from theworld_train.batch import Batch
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import GradientCheckpointing
from theworld_train.model import TheWorld
from theworld_train.model.adapters import Adapter, adapter_parameters, add_adapter, base_parameters
from theworld_train.model.components import component_modules, component_parameters
from theworld_train.train.freeze import (
    FreezingCheck,
    Precision,
    apply_trainable,
    exempt_parameters,
    frozen_and_trainable,
    parameter_counts,
    refuse_violations,
    set_modes,
)
from theworld_train.train.stage import StageModule

Stage = Callable[..., StageModule]
Batches = Callable[..., Batch]
FULL = tuple(Component)


def flip_lowest_bit(parameter: nn.Parameter) -> None:
    """Changes one element by the least that its dtype can tell."""
    integers = torch.int32 if parameter.dtype == torch.float32 else torch.int16
    parameter.data.view(integers).view(-1)[-1] ^= 1


def nudge(parameters: dict[str, nn.Parameter]) -> None:
    """Changes each parameter a little, as a step would."""
    for parameter in parameters.values():
        flip_lowest_bit(parameter)


# -- gradients and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["from_fp32", "from_bf16"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_table_decides_gradients_and_dtypes(
    tiny: TinyCheckpoint, trainable: tuple[Component, ...], precision: Precision, stored: torch.dtype
):
    model = tiny.theworld(dtype=stored)
    apply_trainable(model, trainable, precision)
    for component, parameters in component_parameters(model).items():
        trains = component in trainable
        wide = trains or precision == "fp32" or component is Component.WORLD_ENCODER
        for name, parameter in parameters.items():
            assert parameter.requires_grad is trains, name
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name


def test_convenience_flags_of_loading_are_overruled(tiny: TinyCheckpoint):
    model = tiny.theworld(freeze_gemma_vision=False, freeze_gemma_language=True, freeze_cosmos_vae=False)
    apply_trainable(model, [Component.LANGUAGE_MODEL], "fp32")
    assert set(model.get_trainable_parameters()) == {"language_model"}


def test_second_table_replaces_the_first(tiny: TinyCheckpoint):
    model = tiny.theworld()
    apply_trainable(model, FULL, "bf16")
    apply_trainable(model, [Component.WORLD_PROJECTOR], "bf16")
    assert set(model.get_trainable_parameters()) == {"world_projector"}
    assert model.model.vision_tower.embeddings.patch_embedding.weight.dtype == torch.bfloat16
    assert not model.model.language_model.training


def test_masters_are_the_stored_weights_unrounded(tiny: TinyCheckpoint):
    expected = {name: value.clone() for name, value in tiny.theworld().named_parameters()}
    model = tiny.theworld()
    apply_trainable(model, FULL, "bf16")
    assert all(torch.equal(value, expected[name]) for name, value in model.named_parameters())


def test_frozen_world_encoder_is_rounded_only_on_request(tiny: TinyCheckpoint):
    model = tiny.theworld()
    apply_trainable(model, [Component.WORLD_PROJECTOR], "bf16", torch.bfloat16)
    assert model.world_encoder.quant_conv.weight.dtype == torch.bfloat16
    apply_trainable(model, FULL, "bf16", torch.bfloat16)
    assert model.world_encoder.quant_conv.weight.dtype == torch.float32


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["from_fp32", "from_bf16"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_buffers_keep_their_dtypes_and_values(tiny: TinyCheckpoint, precision: Precision, stored: torch.dtype):
    model = tiny.theworld(dtype=stored)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "embed_scale" not in name}
    frequencies = [name for name in before if name.endswith("inv_freq")]
    assert len(frequencies) >= 2
    apply_trainable(model, [Component.WORLD_PROJECTOR], precision)
    after = dict(model.named_buffers())
    assert all(after[name].dtype == torch.float32 for name in frequencies)
    for name, buffer in before.items():
        assert after[name].dtype == buffer.dtype, name
        assert torch.equal(after[name], buffer), name


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_head_stays_tied(tiny: TinyCheckpoint, trainable: tuple[Component, ...], precision: Precision):
    model = tiny.theworld()
    apply_trainable(model, trainable, precision)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_component_that_the_model_lacks_is_refused(tiny: TinyCheckpoint):
    with pytest.raises(ConfigError, match=r"world_projector.*without a world path"):
        apply_trainable(tiny.theworld(enable_world=False), [Component.WORLD_PROJECTOR], "fp32")


def test_counts_are_those_of_the_table(tiny: TinyCheckpoint):
    model = tiny.theworld()
    apply_trainable(model, [Component.VISION_TOWER], "fp32")
    counts = parameter_counts(model)
    assert sum(total for total, _ in counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert {component for component, (_, trains) in counts.items() if trains} == {Component.VISION_TOWER}
    assert counts[Component.VISION_TOWER][0] == counts[Component.VISION_TOWER][1]
    frozen, trainable = frozen_and_trainable(model)
    assert len(frozen) + len(trainable) == len(list(model.parameters()))
    assert not frozen.keys() & trainable.keys()


# -- modes ------------------------------------------------------------------------------------------------------------


def test_only_checkpointed_layers_of_frozen_parts_are_in_train_mode(
    tiny: TinyCheckpoint, trainable: tuple[Component, ...]
):
    model = tiny.theworld()
    apply_trainable(model, trainable, "fp32")
    for component, module in component_modules(model).items():
        for name, child in module.named_modules():
            checkpointed = isinstance(child, GradientCheckpointingLayer)
            assert child.training is (component in trainable or checkpointed), f"{component.value}.{name}"


def test_dropout_is_off_in_frozen_parts_and_on_in_what_trains(
    tiny: TinyCheckpoint, make_stage: Stage, make_batch: Batches
):
    model = tiny.theworld()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    batch = make_batch([user(image(1), "Which digit is it?"), assistant("5")])
    frozen = make_stage([Component.WORLD_PROJECTOR], model=model)
    assert len({loss_of(frozen, batch) for _ in range(3)}) == 1
    trained = make_stage([Component.LANGUAGE_MODEL], model=model)
    assert len({loss_of(trained, batch) for _ in range(3)}) == 3
    set_modes(model, [])
    assert len({loss_of(trained, batch) for _ in range(3)}) == 1


def loss_of(stage: StageModule, batch: Batch) -> float:
    return float(stage(batch, stage.encode(batch), 1).loss_sum.detach())


# -- adapters ---------------------------------------------------------------------------------------------------------

LANGUAGE = Component.LANGUAGE_MODEL


def adapted(tiny: TinyCheckpoint) -> TheWorld:
    model = tiny.theworld()
    add_adapter(component_modules(model)[LANGUAGE], Adapter(r=4, dropout=0.5))
    return model


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_of_a_component_with_an_adapter_the_adapter_alone_trains(tiny: TinyCheckpoint, precision: Precision):
    model = adapted(tiny)
    apply_trainable(model, [LANGUAGE, Component.WORLD_PROJECTOR], precision)
    module = component_modules(model)[LANGUAGE]
    for name, parameter in base_parameters(module).items():
        assert not parameter.requires_grad, name
        assert parameter.dtype == (torch.float32 if precision == "fp32" else torch.bfloat16), name
    assert adapter_parameters(module)
    for name, parameter in adapter_parameters(module).items():
        assert parameter.requires_grad, name
        assert parameter.dtype == torch.float32, name
    assert all(parameter.requires_grad for parameter in model.world_projector.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_dropout_is_on_in_an_adapter_and_off_beside_it(tiny: TinyCheckpoint, make_batch: Batches):
    model = adapted(tiny)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    apply_trainable(model, [LANGUAGE], "fp32")
    nothing = GradientCheckpointing.everywhere("none")
    stage = StageModule(model, [LANGUAGE], precision="fp32", chunk_size=1024, gradient_checkpointing=nothing)
    stage.set_training_modes()
    batch = make_batch([user(image(1), "Which digit is it?"), assistant("5")])
    assert len({loss_of(stage, batch) for _ in range(3)}) == 1, "what is dropped of a new adapter is zero"
    with torch.no_grad():
        for parameter in adapter_parameters(component_modules(model)[LANGUAGE]).values():
            parameter.fill_(0.01)
    assert len({loss_of(stage, batch) for _ in range(3)}) == 3
    set_modes(model, [])
    assert len({loss_of(stage, batch) for _ in range(3)}) == 1


def test_first_factors_may_stay_only_while_the_second_ones_are_zero(tiny: TinyCheckpoint):
    model = adapted(tiny)
    apply_trainable(model, [LANGUAGE], "bf16")
    firsts = {name for name in frozen_and_trainable(model)[1] if ".lora_A." in name}
    check = FreezingCheck(model)
    with pytest.raises(ConfigError, match=r"did not move: .*lora_B\.default\.weight.* and 20 more"):
        verify(check, clips_seen=True)
    nudge({name: value for name, value in frozen_and_trainable(model)[1].items() if name not in firsts})
    verify(check, clips_seen=True)
    check = FreezingCheck(model)  # of a run that goes on: the second factors are no longer zero
    nudge({name: value for name, value in frozen_and_trainable(model)[1].items() if name not in firsts})
    with pytest.raises(ConfigError, match=r"did not move: .*lora_A\.default\.weight.* and 20 more"):
        verify(check, clips_seen=True)


# -- the scale of token embeddings ------------------------------------------------------------------------------------


def test_embedding_scale_depends_on_the_precision_alone(tiny: TinyCheckpoint):
    exact = torch.tensor(96**0.5)
    scales: dict[str, set[float]] = {"fp32": set(), "bf16": set()}
    for stored in (torch.float32, torch.bfloat16):
        for trains in ((Component.LANGUAGE_MODEL,), (Component.WORLD_PROJECTOR,)):
            model = tiny.theworld(dtype=stored)
            for precision, seen in scales.items():
                apply_trainable(model, trains, precision)
                seen.add(float(model.get_input_embeddings().embed_scale))
    assert scales == {"fp32": {float(exact)}, "bf16": {float(exact.bfloat16())}}
    assert float(exact) != float(exact.bfloat16())


def test_fp32_masters_under_autocast_compute_what_bf16_weights_compute(
    tiny: TinyCheckpoint, make_stage: Stage, make_batch: Batches
):
    batch = make_batch(
        [user(image(1), "Which digit is it?"), assistant("5")], [user(clip(2), "Which way?"), assistant("left")]
    )
    # Weights that bf16 can hold, so that masters and their bf16 copies are the same numbers.
    masters = make_stage([Component.LANGUAGE_MODEL], "bf16", dtype=torch.bfloat16)
    rounded = make_stage([], "bf16", dtype=torch.bfloat16)
    masters.model.world_projector.load_state_dict(rounded.model.world_projector.state_dict())
    assert masters.model.lm_head.weight.dtype == torch.float32
    assert rounded.model.lm_head.weight.dtype == torch.bfloat16
    assert loss_of(masters, batch) == loss_of(rounded, batch)


# -- the check after the first step -----------------------------------------------------------------------------------


def checked(
    tiny: TinyCheckpoint, trainable: tuple[Component, ...], precision: Precision
) -> tuple[TheWorld, FreezingCheck]:
    model = tiny.theworld()
    apply_trainable(model, trainable, precision)
    return model, FreezingCheck(model)


def verify(check: FreezingCheck, *, stepped: Collection[str] = (), **seen: Any) -> None:
    """Does what the trainer does on one rank; a check that finds fault can be asked again."""
    before = dict(vars(check))
    found = check.compare(**seen)
    try:
        refuse_violations(found.changed, found.still - set(stepped))
    except ConfigError:
        vars(check).update(before)
        raise


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_check_passes_when_all_that_trains_has_moved(
    tiny: TinyCheckpoint, trainable: tuple[Component, ...], precision: Precision
):
    model, check = checked(tiny, trainable, precision)
    nudge(frozen_and_trainable(model)[1])
    verify(check, clips_seen=True)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_check_finds_one_bit_of_a_frozen_tensor(
    tiny: TinyCheckpoint, trainable: tuple[Component, ...], precision: Precision
):
    model, check = checked(tiny, trainable, precision)
    frozen, moved = frozen_and_trainable(model)
    nudge(moved)
    if not frozen:
        return
    name = sorted(frozen)[len(frozen) // 2]
    flip_lowest_bit(frozen[name])
    with pytest.raises(ConfigError, match=f"frozen tensors that changed: {name}[ ;]"):
        verify(check, clips_seen=True)


def test_check_finds_the_tensor_that_did_not_move(tiny: TinyCheckpoint):
    model, check = checked(tiny, FULL, "fp32")
    moved = frozen_and_trainable(model)[1]
    still = moved.pop("model.language_model.layers.2.mlp.up_proj.weight")
    nudge(moved)
    with pytest.raises(ConfigError, match=r"did not move: model\.language_model\.layers\.2\.mlp\.up_proj\.weight \("):
        verify(check, clips_seen=True)
    flip_lowest_bit(still)
    verify(check, clips_seen=True)


def test_check_counts_what_it_does_not_list(tiny: TinyCheckpoint):
    model, check = checked(tiny, (Component.VISION_TOWER,), "fp32")
    number = len(frozen_and_trainable(model)[1]) - len(
        exempt_parameters(model, clips_seen=False) & set(component_parameters(model)[Component.VISION_TOWER])
    )
    with pytest.raises(ConfigError, match=f"and {number - 8} more"):
        verify(check, clips_seen=False)


def test_gradient_that_was_too_small_to_change_a_bit_is_no_fault(tiny: TinyCheckpoint):
    model, check = checked(tiny, FULL, "fp32")
    moved = frozen_and_trainable(model)[1]
    small = {"model.vision_tower.post_layernorm.weight"}
    nudge({name: value for name, value in moved.items() if name not in small})
    with pytest.raises(ConfigError, match="post_layernorm"):
        verify(check, clips_seen=True)
    verify(check, clips_seen=True, stepped=small)


TIME_CONVS = {
    f"world_encoder.encoder.down_blocks.{block}.time_conv.{kind}" for block in (3, 5) for kind in ("weight", "bias")
}
KEY_BIASES = {f"model.vision_tower.encoder.layers.{layer}.self_attn.k_proj.bias" for layer in (0, 1)}


def test_exempt_tensors_are_few_and_known_by_name(tiny: TinyCheckpoint):
    model = tiny.theworld()
    assert exempt_parameters(model, clips_seen=False) == TIME_CONVS | KEY_BIASES
    assert exempt_parameters(model, clips_seen=True) == KEY_BIASES


def test_convolutions_over_time_may_stay_only_without_clips(tiny: TinyCheckpoint):
    model, check = checked(tiny, FULL, "fp32")
    nudge(
        {name: value for name, value in frozen_and_trainable(model)[1].items() if name not in TIME_CONVS | KEY_BIASES}
    )
    with pytest.raises(ConfigError, match=r"did not move: world_encoder\.encoder\.down_blocks\.3\.time_conv\.bias"):
        verify(check, clips_seen=True)
    verify(check, clips_seen=False)


def test_component_without_input_is_verified_by_the_first_step_that_has_some(tiny: TinyCheckpoint):
    model, check = checked(tiny, FULL, "fp32")
    parameters = component_parameters(model)
    nudge(parameters[Component.LANGUAGE_MODEL])
    verify(check, inputs=("text",), clips_seen=False)
    waiting = (
        Component.VISION_TOWER,
        Component.MULTI_MODAL_PROJECTOR,
        Component.WORLD_ENCODER,
        Component.WORLD_PROJECTOR,
    )
    assert set(check.pending) == set(waiting)
    with pytest.raises(ConfigError, match=r"did not move: model\.multi_modal_projector"):
        verify(check, inputs=("text", "image"), clips_seen=False)
    for component in waiting[:2]:
        nudge(parameters[component])
    verify(check, inputs=("text", "image"), clips_seen=False)
    assert set(check.pending) == set(waiting[2:])
    for component in waiting[2:]:
        nudge(parameters[component])
    verify(check, inputs=("text", "world"), clips_seen=True)
    assert check.pending == ()


def test_a_rank_compares_what_it_holds(tiny: TinyCheckpoint):
    model = tiny.theworld()
    apply_trainable(model, FULL, "fp32")
    check = FreezingCheck(model, held=lambda parameter: parameter.view(-1)[:1])
    for parameter in frozen_and_trainable(model)[1].values():
        parameter.data.view(torch.int32).view(-1)[-1] ^= 1
    moved = {name for name, parameter in model.named_parameters() if parameter.numel() == 1}
    still = check.compare(clips_seen=True).still
    assert still == set(dict(model.named_parameters())) - moved - KEY_BIASES, "the others hold what has moved"
