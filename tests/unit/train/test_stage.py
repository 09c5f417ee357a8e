"""The module that an engine wraps: what is in it, and gradients for all that trains, whatever a batch holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.tiny import Message, TinyCheckpoint, assistant, clip, image, user
from theworld_train.batch import Batch
from theworld_train.config.components import Component
from theworld_train.config.schema import CheckpointingMode, GradientCheckpointing
from theworld_train.model import TheWorld
from theworld_train.model.components import TRAITS, component_parameters
from theworld_train.train import recompute
from theworld_train.train.freeze import Precision, exempt_parameters
from theworld_train.train.loss import num_chunks
from theworld_train.train.stage import StageModule

Stage = Callable[..., StageModule]
Batches = Callable[..., Batch]
FULL = tuple(Component)

TEXT = [user("Which digit is it?"), assistant("5")]
IMAGE = [user(image(1), "Which digit is it?"), assistant("7")]
CLIP = [user(clip(2), "Which way does it move?"), assistant("left")]
BATCHES: dict[str, list[list[Message]]] = {
    "text": [TEXT],
    "image": [IMAGE],
    "clip": [CLIP],
    "text-and-clip": [TEXT, CLIP],
    "images-and-clip": [IMAGE, CLIP, IMAGE],
}


def backward(stage: StageModule, batch: Batch, chunks: int = 1) -> Tensor:
    """Runs a step's forward and backward pass and returns the loss."""
    loss = stage(batch, stage.encode(batch), chunks).loss_sum
    loss.backward()
    return loss.detach()


# -- what is wrapped --------------------------------------------------------------------------------------------------


def test_frozen_encoders_are_outside_and_training_ones_inside(make_stage: Stage, trainable: tuple[Component, ...]):
    stage = make_stage(trainable)
    inside = {id(parameter) for parameter in stage.parameters()}
    for component, parameters in component_parameters(stage.model).items():
        outside = TRAITS[component].is_encoder and component not in trainable
        members = {id(parameter) for parameter in parameters.values()}
        assert members.isdisjoint(inside) if outside else members <= inside, component


def test_all_that_trains_is_inside_once(make_stage: Stage, trainable: tuple[Component, ...]):
    stage = make_stage(trainable)
    inside = [id(parameter) for parameter in stage.parameters() if parameter.requires_grad]
    assert len(inside) == len(set(inside))
    assert set(inside) == {id(parameter) for parameter in stage.model.parameters() if parameter.requires_grad}
    names = [name for name, _ in stage.named_modules()]
    assert stage.model not in list(stage.modules()), "the whole model would bring the frozen encoders back in"
    assert "parts.lm_head" in names


# -- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BATCHES)
def test_loss_is_that_of_the_models_own_forward(
    make_stage: Stage, make_batch: Batches, trainable: tuple[Component, ...], kind: str
):
    batch = make_batch(*BATCHES[kind])
    stage = make_stage(trainable, chunk_size=2)
    with torch.no_grad():
        loss = stage(batch, stage.encode(batch), num_chunks(batch.num_supervised, 2)).loss_sum
        expected = stage.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
            pixel_values=batch.pixel_values,
            world_frames=batch.world_frames,
            world_frame_counts=batch.world_frame_counts,
            labels=batch.labels,
        ).loss
    assert loss.item() / batch.num_supervised == pytest.approx(expected.item(), rel=1e-6)


def test_checkpointing_and_offload_change_no_gradient(
    make_stage: Stage, make_batch: Batches, trainable: tuple[Component, ...], monkeypatch: pytest.MonkeyPatch
):
    batch = make_batch(*BATCHES["images-and-clip"])
    monkeypatch.setattr(recompute, "SMALLEST_MOVED", 0)
    table = GradientCheckpointing(language_model="selective", vision_tower="none")
    cases = [("none", False), ("full", False), ("selective", False), ("full", True), ("selective", True), (table, True)]
    losses, gradients, moved = [], [], 0
    original = recompute.to_host

    def to_host(tensor: torch.Tensor) -> recompute.OnHost:
        nonlocal moved
        moved += 1
        return original(tensor)

    monkeypatch.setattr(recompute, "to_host", to_host)
    for mode, offload in cases:
        before = moved
        stage = make_stage(trainable, gradient_checkpointing=mode, activation_offload=offload)
        losses.append(backward(stage, batch))
        gradients.append({name: p.grad for name, p in stage.model.named_parameters() if p.requires_grad})
        assert (moved - before >= 4) is offload, "the inputs of four layers of language wait on the host"
    for (mode, offload), loss, other in zip(cases, losses, gradients, strict=True):
        assert torch.equal(loss, losses[0]), (mode, offload)
        for name, gradient in gradients[0].items():
            assert gradient is not None
            assert torch.equal(gradient, other[name]), (mode, offload, name)


def test_selective_checkpointing_computes_no_product_twice(make_stage: Stage, make_batch: Batches):
    """Counts matrix products and attention in the backward pass: what a forward pass runs again adds to them."""
    batch = make_batch(*BATCHES["images-and-clip"])
    everything = list(Component)

    def counted(mode: CheckpointingMode) -> tuple[int, int]:
        stage = make_stage(everything, gradient_checkpointing=mode)
        loss = stage(batch, stage.encode(batch), 1).loss_sum
        with Counting() as counting:
            loss.backward()
        return counting.products, counting.others

    none, full, selective = counted("none"), counted("full"), counted("selective")
    assert none[0] == selective[0] < full[0]
    assert none[1] < selective[1], "the rest is computed again"


class Counting(TorchDispatchMode):
    """Counts operators that `selective` keeps the outputs of, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.others = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in recompute.KEPT
        self.others += func not in recompute.KEPT
        return func(*args, **(kwargs or {}))


def test_predictions_are_never_world_tokens(make_stage: Stage, make_batch: Batches):
    stage = make_stage([Component.WORLD_PROJECTOR])
    batch = make_batch(CLIP, IMAGE)
    ids = stage.model.config.world_token_ids
    with torch.no_grad():
        # Point the head at the three ids: whatever the states are, one of them has the largest logit.
        states = stage.model.model(
            inputs_embeds=stage.model.get_input_embeddings()(batch.input_ids),
            attention_mask=batch.attention_mask,
            token_type_ids=batch.token_type_ids,
        ).last_hidden_state
        stage.model.lm_head.weight.zero_()
        for index, token in enumerate(ids):
            stage.model.lm_head.weight[token] = states[0, index] * 100
        output = stage(batch, stage.encode(batch), 1, want_predictions=True)
    assert output.predictions is not None
    assert len(output.predictions) == batch.num_supervised
    assert not set(output.predictions.tolist()) & set(ids)


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "gradient_checkpointing"), [("fp32", "none"), ("bf16", "full")])
def test_gradient_reaches_all_that_trains_and_nothing_else(
    make_stage: Stage,
    make_batch: Batches,
    trainable: tuple[Component, ...],
    precision: Precision,
    gradient_checkpointing: CheckpointingMode,
):
    stage = make_stage(trainable, precision, gradient_checkpointing=gradient_checkpointing)
    backward(stage, make_batch(*BATCHES["images-and-clip"]))
    exempt = exempt_parameters(stage.model, clips_seen=True)
    for name, parameter in stage.model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.dtype == torch.float32, name
        assert name in exempt or parameter.grad.any(), name


def idle_prefixes(kind: str) -> tuple[str, ...]:
    """Returns the parts of the model that a kind of batch does not use."""
    visual = ("model.vision_tower", "model.multi_modal_projector", "world_encoder", "world_projector")
    clips_only = ("world_encoder.encoder.down_blocks.3.time_conv", "world_encoder.encoder.down_blocks.5.time_conv")
    return {"text": visual, "image": clips_only}.get(kind, ())


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(("precision", "gradient_checkpointing"), [("fp32", "none"), ("bf16", "full")])
def test_idle_parts_have_gradients_of_zero_and_not_none(
    make_stage: Stage,
    make_batch: Batches,
    trainable: tuple[Component, ...],
    kind: str,
    precision: Precision,
    gradient_checkpointing: CheckpointingMode,
):
    stage = make_stage(trainable, precision, gradient_checkpointing=gradient_checkpointing)
    backward(stage, make_batch(*BATCHES[kind]))
    idle = idle_prefixes(kind)
    for name, parameter in stage.model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"{name}: ranks that have the part would wait for this one"
        if name.startswith(idle) and idle:
            assert not parameter.grad.any(), name


def test_images_without_world_blocks_leave_the_world_path_idle(
    tiny: TinyCheckpoint, make_stage: Stage, make_batch: Batches
):
    plain = tiny.processor(enable_world=False).encode(IMAGE)
    assert not plain.world_frames
    batch = Batch(
        input_ids=plain.input_ids[None],
        attention_mask=torch.ones_like(plain.input_ids)[None],
        token_type_ids=plain.token_type_ids[None],
        labels=plain.input_ids.masked_fill(~plain.supervised, -100)[None],
        pixel_values=plain.pixel_values,
        world_frames=None,
        world_frame_counts=(),
        sample_ids=("0",),
        kinds=("all",),
    )
    stage = make_stage(FULL)
    backward(stage, batch)
    for name, parameter in stage.model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith(("world_encoder", "world_projector")):
            assert not parameter.grad.any(), name
    assert stage.model.model.vision_tower.embeddings.patch_embedding.weight.grad.any()


@pytest.mark.parametrize("kind", ["text", "image"])
def test_idle_parts_do_not_change_the_loss(make_stage: Stage, make_batch: Batches, kind: str):
    batch = make_batch(*BATCHES[kind])
    trained = backward(make_stage(FULL), batch)
    frozen = make_stage([Component.WORLD_PROJECTOR])
    with torch.no_grad():
        expected = frozen(batch, frozen.encode(batch), 1).loss_sum
    assert trained.item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradients_of_a_mixed_batch_are_the_sum_of_its_samples(make_stage: Stage, make_batch: Batches):
    together = make_stage(FULL)
    backward(together, make_batch(TEXT, CLIP, IMAGE))
    apart = make_stage(FULL)
    for conversation in (TEXT, CLIP, IMAGE):
        backward(apart, make_batch(conversation))
    expected = {name: parameter.grad for name, parameter in together.model.named_parameters()}
    for name, parameter in apart.model.named_parameters():
        if not name.endswith("k_proj.bias"):
            scale = expected[name].abs().max()
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=float(scale) * 1e-4 + 1e-9)


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_residual_stream_has_the_dtype_of_the_precision(
    make_stage: Stage,
    make_batch: Batches,
    trainable: tuple[Component, ...],
    precision: Precision,
    dtype: torch.dtype,
):
    stage = make_stage(trainable, precision)
    seen: dict[str, set[torch.dtype]] = {"vision": set(), "language": set()}
    layers = {
        "vision": stage.model.model.vision_tower.encoder.layers,
        "language": stage.model.model.language_model.layers,
    }
    for name, stack in layers.items():
        for layer in stack:
            layer.register_forward_pre_hook(
                lambda _module, args, kwargs, name=name: seen[name].add(
                    (args[0] if args else kwargs["hidden_states"]).dtype
                ),
                with_kwargs=True,
            )
    loss = backward(stage, make_batch(CLIP, IMAGE))
    assert seen == {"vision": {dtype}, "language": {dtype}}
    assert loss.dtype == torch.float32


def test_world_encoder_runs_in_fp32_under_bf16(make_stage: Stage, make_batch: Batches):
    batch = make_batch(CLIP)
    latents = []
    for precision in ("fp32", "bf16"):
        stage = make_stage([Component.WORLD_PROJECTOR], precision)
        latents.append(stage.encode(batch).world_latents)
    assert latents[1].dtype == torch.float32
    assert torch.equal(*latents)


def test_frozen_features_carry_no_graph(make_stage: Stage, make_batch: Batches):
    features = make_stage([Component.WORLD_PROJECTOR]).encode(make_batch(CLIP))
    assert features.pixel_values is None
    assert features.world_frames is None
    assert not features.image_states.requires_grad
    assert not features.world_latents.requires_grad
    trained = make_stage(FULL).encode(make_batch(CLIP))
    assert trained.image_states is None
    assert trained.world_latents is None
    assert trained.pixel_values is not None
    assert trained.world_frames is not None


def test_a_model_without_a_world_path_trains(tiny: TinyCheckpoint, make_stage: Stage):
    model = TheWorld.from_pretrained(tiny.gemma, enable_world=False)
    stage = make_stage([Component.LANGUAGE_MODEL, Component.VISION_TOWER], model=model)
    sample = tiny.processor(enable_world=False).encode(IMAGE)
    batch = Batch(
        input_ids=sample.input_ids[None],
        attention_mask=torch.ones_like(sample.input_ids)[None],
        token_type_ids=sample.token_type_ids[None],
        labels=sample.input_ids.masked_fill(~sample.supervised, -100)[None],
        pixel_values=sample.pixel_values,
        world_frames=None,
        world_frame_counts=(),
        sample_ids=("0",),
        kinds=("all",),
    )
    backward(stage, batch)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
