"""FLOPs from formulas against PyTorch's counter on the step that training runs.

The counter sees matrix products, convolutions and attention, forward and backward. It does not know the attention
operator that PyTorch takes on a CPU (`_scaled_dot_product_flash_attention_for_cpu`) and would count nothing there: so
the math backend is forced, which computes `eager` attention, or CUDA's operators are called over fake tensors.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.accounting.flops import StepModel, StepSettings, StepShape, step_work
from theworld_train.assemble.model import attention_of
from theworld_train.batch import IGNORE_INDEX, Batch
from theworld_train.config import load_run_config
from theworld_train.config.components import Component
from theworld_train.config.schema import RunConfig
from theworld_train.model import TheWorld, modeling
from theworld_train.model.adapters import adapter_parameters
from theworld_train.model.build import build_on_meta, gemma_4b_config
from theworld_train.model.components import component_modules
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.last_layers import make_trimmed
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.ledger import add_adapters, trainable_components
from theworld_train.train.loss import num_chunks
from theworld_train.train.stage import StageModule

CONFIGS = Path(__file__).parents[2] / "configs"
PHASES = ("encode", "forward", "recompute")
STAGES = ("projection", "vision", "language", "full")


class FakeStepMode(FakeTensorMode):
    """Fake tensors for a step, of whose values only the number of supervised positions is needed."""

    def __init__(self, supervised: int) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.supervised = supervised

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.index.Tensor and args[1][0].dtype is torch.bool:
            with self:
                return args[0].new_empty((self.supervised, *args[0].shape[args[1][0].ndim :]))
        return super().__torch_dispatch__(func, types, args, kwargs or {})


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the check that placeholders and features agree in number: fake tensors have no values to compare."""

    def scatter(embeds: Tensor, places: Tensor, features: Tensor, kind: str) -> Tensor:
        features = features.reshape(-1, embeds.shape[-1])
        return embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.dtype))

    monkeypatch.setattr(modeling, "_scatter", scatter)


def materialise(model: nn.Module) -> None:
    """Gives a model on the meta device fake storages; ties stay."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), fake)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


@contextmanager
def fused_attention() -> Generator[None]:
    """CUDA's memory-efficient attention in place of PyTorch's choice."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        dtype = torch.bfloat16
        bias = None if kwargs.get("attn_mask") is None else torch.zeros_like(kwargs["attn_mask"], dtype=dtype)
        if bias is not None:
            bias = bias.expand(*query.shape[:3], key.shape[2])
        operator = torch.ops.aten._scaled_dot_product_efficient_attention
        result: Tensor = operator(query.to(dtype), key.to(dtype), value.to(dtype), bias, True, 0.0, False)[0]
        return result.to(query.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", attention)
        yield


def batch(architecture: TheWorldConfig, shape: StepShape) -> Batch:
    """A batch of exact shapes."""
    world = StepModel.from_config(architecture.to_dict()).world_tokens(shape.frames)
    image: Any = architecture.image_token_index
    ids = [architecture.start_of_world_token_id, *[architecture.world_token_id] * world]
    ids += [architecture.end_of_world_token_id, *[image] * int(architecture.mm_tokens_per_image)]
    ids += [0] * (shape.positions - len(ids))
    labels = [IGNORE_INDEX] * (shape.positions - shape.supervised) + [0] * shape.supervised
    size, side = shape.micro_batch_size, architecture.world_resolution
    input_ids = torch.tensor([ids] * size)
    vision: Any = architecture.vision_config
    return Batch(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        token_type_ids=(input_ids == image).long(),
        labels=torch.tensor([labels] * size),
        pixel_values=torch.zeros(size, 3, vision.image_size, vision.image_size),
        world_frames=torch.zeros(size * shape.frames, 3, side, side),
        world_frame_counts=(shape.frames,) * size,
        sample_ids=("sample",) * size,
        kinds=("test",) * size,
    )


def counted(config: RunConfig, model: TheWorld, shape: StepShape, *, trims: bool = False) -> dict[str, int]:
    """FLOPs of a training step by PyTorch's operators."""
    trainable = trainable_components(config)
    if trims:
        make_trimmed(model.model.language_model)
    apply_trainable(model, trainable, config.precision)
    chunk_size = config.training.loss_chunk_size
    stage = StageModule(
        model,
        trainable,
        precision=config.precision,
        chunk_size=chunk_size,
        gradient_checkpointing=config.training.gradient_checkpointing,
        trims=trims,
    )
    stage.set_training_modes()
    inputs = batch(model.config, shape)
    with FlopCounterMode(display=False) as counter:
        features = stage.encode(inputs)
        chunks = num_chunks(shape.micro_batch_size * shape.supervised, chunk_size)
        stage(inputs, features, chunks).loss_sum.backward()
    return {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}


def assert_agree(
    config: RunConfig,
    architecture: TheWorldConfig,
    shape: StepShape,
    attention: Any,
    truth: Any,
    adapters: dict[Component, int] | None = None,
) -> None:
    """Formulas and counter agree to the last FLOP: in all, and in convolutions and fused attention each."""
    settings = StepSettings(
        trainable=frozenset(trainable_components(config)),
        gradient_checkpointing=config.training.gradient_checkpointing.language_model == "full",
        attention=attention,
        chunk_size=config.training.loss_chunk_size,
        precision=config.precision,
        adapters=adapters or {},
    )
    kinds = step_work(StepModel.from_config(architecture.to_dict()), shape, settings).flops_by("kind")
    assert sum(kinds.values()) == sum(truth.values())
    for kind, operator in (("convolution", "convolution"), ("sdpa", "scaled_dot_product")):
        assert kinds.get(kind, 0) == sum(flops for name, flops in truth.items() if operator in name), kind


def stage_config(folder: str, name: str, enabled: bool) -> RunConfig:
    """A shipped stage, with or without gradient checkpointing."""
    return load_run_config(
        CONFIGS / folder / f"{name}.yaml", [f"training.gradient_checkpointing={'full' if enabled else 'none'}"]
    )


checkpointed = pytest.mark.parametrize("enabled", [True, False], ids=["checkpointed", "plain"])


@checkpointed
@pytest.mark.parametrize("name", ["projection", *(pytest.param(name, marks=pytest.mark.slow) for name in STAGES[1:])])
@pytest.mark.usefixtures("unchecked")
def test_the_shipped_stages_at_full_size(name: str, enabled: bool):
    config = stage_config("stages", name, enabled)
    world = config.model.world
    architecture = gemma_4b_config(
        world_projection=world.projection, world_tokens=world.tokens, world_resolution=world.resolution
    )
    positions = config.data.max_sequence_length
    assert positions is not None
    shape = StepShape(config.training.micro_batch_size, positions, supervised=3000)
    model = build_on_meta(architecture)
    with FakeStepMode(shape.supervised * shape.micro_batch_size), sdpa_kernel(SDPBackend.MATH):
        materialise(model)
        truth = counted(config, model, shape)
    assert sum(truth.values()) > 1e14
    assert_agree(config, architecture, shape, "eager", truth)


@checkpointed
@pytest.mark.parametrize("name", STAGES)
def test_a_real_step_of_the_tiny_model(name: str, enabled: bool, quickstart_model: TinyCheckpoint):
    config = stage_config("quickstart", name, enabled)
    model = quickstart_model.theworld()
    with sdpa_kernel(SDPBackend.MATH):
        shape = StepShape(2, 90, supervised=20, frames=5)
        truth = counted(config, model, shape)
    assert_agree(config, model.config, shape, "eager", truth)


@checkpointed
@pytest.mark.parametrize("positions", [90, 260])
def test_last_layers_that_compute_what_is_needed(enabled: bool, positions: int, quickstart_model: TinyCheckpoint):
    config = stage_config("quickstart", "projection", enabled)
    model = quickstart_model.theworld(attn_implementation=attention_of(config))
    shape = StepShape(2, positions, supervised=20, frames=5)
    with sdpa_kernel(SDPBackend.MATH):
        truth = counted(config, model, shape, trims=True)
    settings = StepSettings(
        trainable=frozenset(trainable_components(config)),
        gradient_checkpointing=enabled,
        attention="banded",
        trims=True,
    )
    work = step_work(StepModel.from_config(model.config.to_dict()), shape, settings)
    products = sum(flops for name, flops in truth.items() if "convolution" not in name)
    # Without a fused kernel attention takes two products backward for each forward.
    scores = {phase: sum(o.flops for o in work.operations if (o.kind, o.phase) == ("sdpa", phase)) for phase in PHASES}
    attention = scores["encode"] + 3 * scores["forward"] + scores["recompute"]
    assert products == work.flops_by("kind")["matmul"] + attention


@checkpointed
@pytest.mark.usefixtures("unchecked")
def test_clips_and_fused_attention(enabled: bool, quickstart_model: TinyCheckpoint):
    config = stage_config("quickstart", "full", enabled)
    real = quickstart_model.theworld()
    shape = StepShape(3, 120, supervised=40, frames=9)
    model = build_on_meta(real.config)
    with FakeStepMode(shape.supervised * shape.micro_batch_size), fused_attention():
        materialise(model)
        truth = counted(config, model, shape)
    assert_agree(config, real.config, shape, "sdpa", truth)


@checkpointed
def test_an_adapter_costs_no_gradients_of_the_weights_beside_it(enabled: bool, quickstart_model: TinyCheckpoint):
    config = load_run_config(
        CONFIGS / "quickstart" / "language.yaml",
        {
            "trainable.language_model.adapter": "lora",
            "expect_trainable": None,
            "training.gradient_checkpointing": "full" if enabled else "none",
        },
    )
    model = quickstart_model.theworld()
    add_adapters(model, config)
    shape = StepShape(2, 90, supervised=20, frames=5)
    with sdpa_kernel(SDPBackend.MATH):
        truth = counted(config, model, shape)
    factors = adapter_parameters(component_modules(model)[Component.LANGUAGE_MODEL]).values()
    adapters = {Component.LANGUAGE_MODEL: sum(parameter.numel() for parameter in factors)}
    assert_agree(config, model.config, shape, "eager", truth, adapters)
