"""The dry run: optimizer steps of the very trainer, over fake tensors, with every storage followed."""

from __future__ import annotations

import gc
import math
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from theworld_train.accounting.tokens import SPATIAL_COMPRESSION, latent_frames
from theworld_train.assemble.encoded import frozen_encoders
from theworld_train.assemble.inputs import open_inputs
from theworld_train.assemble.model import build_stage, describe_model
from theworld_train.batch import IGNORE_INDEX, Batch, EncodedSample
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import OptimizerName, RunConfig
from theworld_train.config.sources import HubSource, frames_of, leaf_sources
from theworld_train.data import UnreadableSampleError, Window, part_ends
from theworld_train.memory.following import PhasedEngine, following
from theworld_train.memory.timeline import CUDA_BLOCK, Timeline, spans
from theworld_train.memory.tracker import MemoryTracker, Trace
from theworld_train.model.build import build_on_meta
from theworld_train.model.components import component_parameters
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.plan.cuda import cuda_semantics
from theworld_train.plan.known_values import KnowingFakeMode
from theworld_train.train.engine import ReplicatedEngine, wrap_units
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.groups import adamw_implementation, build_optimizer
from theworld_train.train.ledger import add_adapters, build_ledger, trainable_components
from theworld_train.train.quarantine import Quarantine
from theworld_train.train.runtime import Runtime
from theworld_train.train.stage import StageModule
from theworld_train.train.trainer import Trainer

DeviceKind = Literal["cuda", "cpu"]
#: How weights come to be there when they are computed with: they always are, or layers are gathered one by one, in the
#: dtype of the computation (FSDP2) or as they are stored (ZeRO-3).
Gathering = Literal["none", "computed", "stored"]

#: Samples that are looked at where a config sets no limit to their length.
_MEASURED_SAMPLES = 64


@dataclass(frozen=True)
class SampleShape:
    """The shape of one row, which holds one image and, with a world path, one world block; packed, several of both.

    Attributes:
        positions: Tokens, image and world tokens included.
        supervised: Tokens that the model has to predict.
        frames: Frames of a world block, generated ones included.
        offset: Of the first latent frame of a world block from the present.
        images: Images, and world blocks.
    """

    positions: int
    supervised: int
    frames: int = 1
    images: int = 1
    offset: int = 0


@dataclass(frozen=True)
class PlannedParameter:
    """One parameter as training stores it.

    Attributes:
        name: Its name in the whole model.
        component: Whose it is.
        shape: Its shape.
        itemsize: Bytes of an element as stored.
        trains: Whether it has a gradient.
        unit: Path of the module that it is gathered with; empty for those that are gathered once for the whole step,
            and None outside of what an engine wraps.
    """

    name: str
    component: str
    shape: tuple[int, ...]
    itemsize: int
    trains: bool
    unit: str | None

    @property
    def numel(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class DryRun:
    """What a dry run has seen.

    Attributes:
        trace: Every storage of the two steps.
        device: Whose memory was modelled.
        shape: Shape of each sample.
        micro_batch_size: Samples in a micro-batch.
        steps: Optimizer steps.
        compute_size: Bytes of an element that is computed with.
        optimizer: Name of the optimizer.
        parameters: Every parameter of the model, tied ones once.
        gathering: How weights are there when they are computed with.
    """

    trace: Trace
    device: DeviceKind
    shape: SampleShape
    micro_batch_size: int
    steps: int
    compute_size: int
    optimizer: OptimizerName
    parameters: tuple[PlannedParameter, ...]
    gathering: Gathering = "none"

    def gathered_size(self, parameter: PlannedParameter) -> int:
        """Returns the bytes of an element of a parameter while it is computed with."""
        stored = self.gathering == "stored" or parameter.component == Component.WORLD_ENCODER
        return parameter.itemsize if stored else self.compute_size

    @property
    def block(self) -> int:
        """Bytes that every size is rounded up to."""
        return CUDA_BLOCK if self.device == "cuda" else 1

    def timeline(self) -> Timeline:
        """Returns what a single process holds over time."""
        return Timeline(self.trace.events, spans(self.trace), self.block)


# -- the step's inputs ------------------------------------------------------------------------------------------------


def sample_shape(
    config: RunConfig, architecture: TheWorldConfig, positions: int | None = None, supervised: int | None = None
) -> SampleShape:
    """Returns the shape of the largest sample that a config allows: one image or clip, and text up to the limit.

    A packed row may hold as many images as fit it, or as much text; it is given both. Without a limit the sample is the
    longest of the first ones, if they are at hand.

    Args:
        config: The run config.
        architecture: The model's config.
        positions: Tokens of a sample instead of `data.max_sequence_length`.
        supervised: Supervised tokens; all of the text if absent.

    Raises:
        ConfigError: If the config sets no limit and its data is on the hub, or nothing is left for text.
    """
    limit = positions or config.data.max_sequence_length
    if limit is None:
        return _longest_sample(config)
    frames = frames_of(config.data.train, config.data.world)
    visual = _visual_tokens(architecture, frames)
    text = limit - visual
    if text < 2:
        what = "image" if frames == 1 else f"clip of {frames} frames"
        raise ConfigError(
            Problem(
                f"too few for one {what}, which takes {visual} positions at a world resolution of "
                f"{architecture.world_resolution}",
                key="data.max_sequence_length",
                value=limit,
                hint="raise it, or lower model.world.resolution, or the frames that the source takes of a clip",
            )
        )
    packed = config.training.batching == "packed"
    most = limit - 1 if packed else text - 1  # other rows of a packed batch may hold text alone
    if supervised is not None and supervised > most:
        raise ConfigError(
            Problem(f"more supervised tokens than text: {most} positions of {limit} can be", value=supervised)
        )
    images = limit // visual if packed else 1
    # History ends in the present; whatever else there may be begins with it.
    offset = 1 - latent_frames(frames) if config.data.world.frames == "history" else 0
    return SampleShape(
        limit, text - 1 if supervised is None else supervised, frames=frames, images=images, offset=offset
    )


def _longest_sample(config: RunConfig) -> SampleShape:
    """Returns a shape that holds each of the first samples of a config's data."""
    if any(isinstance(data, HubSource) for data in leaf_sources(config.data.train, "data.train").values()):
        raise ConfigError(
            Problem(
                "says how long samples may get, and is not set",
                key="data.max_sequence_length",
                hint="set it, or give the plan a length with --positions",
            )
        )
    inputs = open_inputs(config)
    ends = part_ends(inputs.train)
    encoded: list[EncodedSample] = []
    for first, end in zip([0, *ends], ends, strict=False):
        count = min(_MEASURED_SAMPLES, end - first)
        for index in (first + number * (end - first) // count for number in range(count)):
            with suppress(UnreadableSampleError):
                sample = inputs.collator.encode(inputs.train[index])
                encoded += [] if sample is None else [sample]
    world = config.data.world
    generated = frames_of(config.data.train, world) if world.frames == "rollout" else 1
    if not encoded:
        raise ConfigError(Problem("none of the samples that were tried can be used", key="data.train"))
    return SampleShape(
        positions=max(len(sample.input_ids) for sample in encoded),
        supervised=max(int(sample.supervised.sum()) for sample in encoded),
        frames=max((len(frames) for sample in encoded for frames in sample.world_frames), default=generated),
        offset=min((offset for sample in encoded for offset in sample.world_offsets), default=0),
    )


def _visual_tokens(architecture: Any, frames: int) -> int:  # noqa: ANN401 (a config, whose fields may be absent)
    total: int = architecture.mm_tokens_per_image + 2
    if architecture.enable_world:
        total += 2 + latent_frames(frames) * architecture.world_tokens_per_frame
    return total


def synthetic_batch(architecture: Any, shape: SampleShape, size: int) -> Batch:  # noqa: ANN401 (as above)
    """Returns a batch of exact shapes whose text is one token again and again.

    Args:
        architecture: The model's config.
        shape: Shape of each sample.
        size: Samples.
    """
    ids: list[int] = []
    if architecture.enable_world:
        world = latent_frames(shape.frames) * architecture.world_tokens_per_frame
        ids += [architecture.start_of_world_token_id, *[architecture.world_token_id] * world]
        ids += [architecture.end_of_world_token_id]
    image = architecture.image_token_index
    ids += [architecture.boi_token_index, *[image] * architecture.mm_tokens_per_image, architecture.eoi_token_index]
    ids *= shape.images
    ids += [0] * (shape.positions - len(ids))
    labels = [IGNORE_INDEX] * (shape.positions - shape.supervised) + [0] * shape.supervised
    input_ids = torch.tensor([ids] * size)
    vision = architecture.vision_config
    side = architecture.world_resolution
    has_world = architecture.enable_world
    return Batch(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        token_type_ids=(input_ids == image).long(),
        labels=torch.tensor([labels] * size),
        pixel_values=torch.zeros(size * shape.images, 3, vision.image_size, vision.image_size),
        world_frames=torch.zeros(size * shape.images * shape.frames, 3, side, side) if has_world else None,
        world_frame_counts=(shape.frames,) * size * shape.images if has_world else (),
        world_offsets=(shape.offset,) * size * shape.images if has_world else (),
        sample_ids=tuple(str(index) for index in range(size)),
        kinds=("plan",) * size,
    )


def _looked_up(batch: Batch, config: RunConfig, architecture: Any) -> Batch:  # noqa: ANN401 (as above)
    """Marks pictures as looked up and missing if a run looks them up: those are encoded one by one.

    Rollouts are always there.
    """
    if config.data.encoded is None:
        return batch
    if config.data.world.frames == "rollout" and batch.world_frames is not None:
        counts, side = batch.world_frame_counts, architecture.world_resolution // SPATIAL_COMPRESSION
        shape = (sum(map(latent_frames, counts)), architecture.world_latent_channels, side, side)
        return replace(
            batch,
            images_known=(False,) * (batch.num_images if Component.VISION_TOWER in frozen_encoders(config) else 0),
            world_frames=None,
            world_latents=torch.zeros(shape, dtype=getattr(torch, config.model.world.encoder_dtype)),
            blocks_known=(True,) * len(counts),
        )
    frozen, blocks = frozen_encoders(config), len(batch.world_frame_counts)
    images = batch.num_images if Component.VISION_TOWER in frozen else 0
    blocks = blocks if Component.WORLD_ENCODER in frozen else 0
    return replace(batch, images_known=(False,) * images, blocks_known=(False,) * blocks)


# -- the step ---------------------------------------------------------------------------------------------------------


class PlannedRuntime(Runtime):
    """A rank on its own, without a process group."""

    def __init__(self) -> None:
        """Forms no process group."""

    rank = 0
    world_size = 1
    is_main = False
    device = torch.device("cpu")

    def close(self) -> None:
        """Does nothing: there is nothing to end."""


class PlannedEngine(ReplicatedEngine):
    """Takes fake tensors; what another engine does to memory is a matter of the strategy."""

    def gradient_norms(self) -> dict[str, Tensor]:
        """Returns none: fake numbers have no norm, and what it takes to compute them is nothing beside the step."""
        return {}

    def weight_norms(self) -> dict[str, Tensor]:
        """Returns none, likewise."""
        return {}

    def step(self, max_norm: float | None) -> Tensor:
        """Clips and steps in any case: whether the norm of fake gradients is finite is not known."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, torch.inf if max_norm is None else max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def materialise(model: nn.Module, dtype: torch.dtype) -> None:
    """Gives a model on the meta device storages on the CPU: fake ones under fake tensors. Ties stay.

    Args:
        model: The model, in place.
        dtype: Of the parameters, as a checkpoint has them; buffers keep theirs.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def dry_run(
    config: RunConfig,
    *,
    device: DeviceKind = "cuda",
    micro_batch_size: int | None = None,
    positions: int | None = None,
    supervised: int | None = None,
    architecture: TheWorldConfig | None = None,
    steps: int = 2,
    gathering: Gathering = "none",
) -> DryRun:
    """Runs optimizer steps over fake tensors on this machine's CPU.

    Args:
        config: The run config.
        device: Whose operators and optimizer are modelled.
        micro_batch_size: Samples in a micro-batch; the config's if absent.
        positions: Tokens of a sample instead of `data.max_sequence_length`.
        supervised: Supervised tokens of a sample; all of its text if absent.
        architecture: The model's config instead of the one that the run config names.
        steps: Optimizer steps; the optimizer's state comes with the first, so the second is the one that counts.
        gathering: How weights are there when they are computed with.
    """
    architecture = describe_model(config) if architecture is None else architecture
    shape = sample_shape(config, architecture, positions, supervised)
    size = config.training.micro_batch_size if micro_batch_size is None else micro_batch_size
    model = build_on_meta(architecture)
    add_adapters(model, config)
    with ExitStack() as stack:
        stack.enter_context(KnowingFakeMode(size, shape.positions))
        materialise(model, torch.bfloat16)
        if device == "cuda":
            stack.enter_context(cuda_semantics())
        batch = _looked_up(synthetic_batch(architecture, shape, size), config, architecture)
        return trace_steps(config, model, (batch,), shape, steps=steps, device=device, gathering=gathering)


def _traceable(config: RunConfig, size: int, batches: int) -> RunConfig:
    """Returns the config of steps of so many micro-batches, nothing fused: what kernels take inside is not followed."""
    loss = "chunked" if config.training.loss == "liger" else config.training.loss
    training = {"global_batch_size": size * batches, "micro_batch_size": size, "loss": loss}
    kernels = "plain" if config.model.kernels == "plain" else "lean"
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=training),
            "model": config.model.model_copy(update={"kernels": kernels}),
        }
    )


def trace_steps(
    config: RunConfig,
    model: TheWorldForConditionalGeneration,
    batches: Sequence[Batch],
    shape: SampleShape,
    *,
    steps: int,
    device: DeviceKind,
    gathering: Gathering = "none",
) -> DryRun:
    """Runs optimizer steps of the trainer with every storage followed; fake or real, as model and batches are.

    Args:
        config: The run config.
        model: With weights in the dtypes of a checkpoint, and the config's adapters.
        batches: Micro-batches of each step.
        shape: Shape of their samples.
        steps: Optimizer steps.
        device: Whose optimizer is taken.
        gathering: As in `dry_run`.
    """
    size = len(batches[0].sample_ids)
    config = _traceable(config, size, len(batches))
    dtype = getattr(torch, config.model.world.encoder_dtype)
    apply_trainable(model, trainable_components(config), config.precision, dtype)
    stage = build_stage(model, config)
    ledger = build_ledger(model, config)
    units = _units(stage, model)
    parameters = _parameters(stage, model, units)
    computed = torch.float32 if config.precision == "fp32" else torch.bfloat16
    stage.lockstep = gathering != "none"
    if gathering == "computed":
        for name, part in stage.parts.items():
            for parameter in () if name == Component.WORLD_ENCODER else part.parameters():
                parameter.data = parameter.data.to(computed)
    optimizer = build_optimizer(model, config)
    if config.optimizer.name == "adamw":
        for group in optimizer.param_groups:
            group |= adamw_implementation(device)
    tracker = MemoryTracker()
    trainer = Trainer(
        config=config,
        ledger=ledger,
        runtime=PlannedRuntime(),
        stage=stage,
        engine=PhasedEngine(PlannedEngine(stage, lambda: optimizer), tracker.enter_phase),
        max_steps=steps,
        first_step=0,
        windows=lambda _start, _number: (_ for _ in ()),
        quarantine=Quarantine(),
    )
    stage.set_training_modes()
    with _uncollected(), following(tracker, model, optimizer, batches, units):
        for step in range(steps):
            tracker.begin_step(step)
            trainer.step(Window(step, tuple(batches), ()))
        trace = tracker.finish()
    return DryRun(
        trace=trace,
        device=device,
        shape=shape,
        micro_batch_size=size,
        steps=steps,
        compute_size=computed.itemsize,
        optimizer=config.optimizer.name,
        parameters=parameters,
        gathering=gathering,
    )


@contextmanager
def _uncollected() -> Generator[None]:
    """Keeps Python from looking for cycles: no tensor dies by it, and it takes a tenth of the time of a dry run."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _parameters(
    stage: StageModule, model: TheWorldForConditionalGeneration, units: tuple[str, ...]
) -> tuple[PlannedParameter, ...]:
    """Describes every parameter, and says with which unit it is gathered."""
    inside = {id(parameter) for parameter in stage.parameters()}
    unit_of = {id(parameter): unit for unit in units for parameter in model.get_submodule(unit).parameters()}
    return tuple(
        PlannedParameter(
            name=name,
            component=component.value,
            shape=tuple(parameter.shape),
            itemsize=parameter.element_size(),
            trains=parameter.requires_grad,
            unit=unit_of.get(id(parameter), "") if id(parameter) in inside else None,
        )
        for component, parameters in component_parameters(model).items()
        for name, parameter in parameters.items()
    )


def _units(stage: StageModule, model: nn.Module) -> tuple[str, ...]:
    """Returns the paths of the layers inside of what an engine wraps, in the order of their calls."""
    units = {id(module) for module in wrap_units(stage)}
    return tuple(path for path, module in model.named_modules() if id(module) in units)
