"""What one optimizer step computes: every operation of every pass, with the passes that each part really goes through.

A part costs its forward pass; as much again for the gradients of its inputs where something upstream of it trains, for
the gradients of its weights where it trains itself, and for running again what checkpointing did not keep. Nothing
upstream of the first trainable part has a backward pass at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from theworld_train.accounting.architectures import Composite, Decoder, VisionTransformer
from theworld_train.accounting.config_json import architecture_from_config
from theworld_train.accounting.pieces import (
    Attention,
    AttentionWork,
    Kind,
    Piece,
    cast_piece,
    decoder_pieces,
    head_pieces,
    projector_pieces,
    traffic,
    vision_pieces,
    without_input_gradient,
    world_encoder_pieces,
    world_projector_pieces,
)
from theworld_train.accounting.tokens import world_features, world_tokens
from theworld_train.accounting.video_vae import VideoVae
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem

#: Passes over a part. `encode` is the forward pass of a frozen encoder, outside of what an engine wraps.
Phase = Literal["encode", "forward", "recompute", "input_gradients", "weight_gradients", "optimizer"]
Precision = Literal["bf16", "fp32"]

_SIZE = {"bf16": 2, "fp32": 4}
#: Bytes of one parameter in a step of AdamW as PyTorch's fused kernel computes it: weight and moments read and written,
#: the gradient read, and before that read for its norm and clipped.
_ADAMW_BYTES, _ADAMW_KERNELS = 40, 4
#: Of the five products in the backward pass of fused attention, one computes the scores again.
_NEEDED_OF_FUSED_BACKWARD = 4 / 5


@dataclass(frozen=True)
class StepModel:
    """The sizes that a step depends on.

    Attributes:
        language_model: Gemma 3's decoder.
        vision_tower: Its vision tower.
        image_tokens: Tokens of an image in the sequence.
        world_encoder: The video VAE; None without a world path.
        projection: Kind of the world projection.
        layout: What a world token is.
        latent_channels: Channels of a latent.
        resolution: Pixels along a side of a world frame.
        pool: Latent cells along a side of the squares that are averaged before projection.
    """

    language_model: Decoder
    vision_tower: VisionTransformer
    image_tokens: int
    world_encoder: VideoVae | None = None
    projection: Literal["linear", "mlp"] = "linear"
    layout: Literal["spatial", "channel"] = "spatial"
    latent_channels: int = 16
    resolution: int = 512
    pool: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any], source: str = "config.json") -> StepModel:
        """Reads the sizes from the `config.json` of TheWorld or of Gemma 3.

        Args:
            config: The parsed file.
            source: Its path, for error messages.

        Raises:
            ConfigError: If it describes another kind of model, or a size that cannot be.
        """
        gemma = architecture_from_config({**config, "model_type": "gemma3"}, source)
        if not isinstance(gemma, Composite):
            raise ConfigError(Problem("describes a vision tower that is no SigLIP", source, "vision_config"))
        text, vision = gemma.members["language_model"], gemma.members["vision_tower"]
        assert isinstance(text, Decoder)
        assert isinstance(vision, VisionTransformer)
        model = cls(text, vision, int(config.get("mm_tokens_per_image", 256)))
        if not config.get("enable_world", False):
            return model
        vae = architecture_from_config({**config["world_encoder_config"], "_class_name": "AutoencoderKLWan"}, source)
        if not isinstance(vae, VideoVae):
            raise ConfigError(Problem("describes a VAE of another kind than Wan 2.1's", source, "world_encoder_config"))
        return replace(
            model,
            world_encoder=vae,
            projection=config["world_projection"],
            layout=config["world_tokens"],
            latent_channels=vae.z_dim,
            resolution=int(config["world_resolution"]),
            pool=int(config.get("world_pool", 1)),
        )

    def world_tokens(self, frames: int) -> int:
        """World tokens of an image (`frames=1`) or clip; 0 without a world path."""
        if self.world_encoder is None:
            return 0
        return world_tokens(self.layout, self.resolution, self.latent_channels, frames, pool=self.pool)

    @property
    def parameters(self) -> dict[Component, int]:
        """Parameters of what trains or computes, by component; the VAE's without its decoder.

        The temporal embedding and the brackets of the world projector, which only move memory, are left out.
        """
        text, vision = self.language_model, self.vision_tower
        counts = {
            Component.LANGUAGE_MODEL: text.num_parameters,
            Component.VISION_TOWER: vision.num_parameters,
            Component.MULTI_MODAL_PROJECTOR: vision.hidden_size * (text.hidden_size + 1),
        }
        if self.world_encoder is not None:
            hidden = text.hidden_size
            features = world_features(self.layout, self.resolution, self.latent_channels, pool=self.pool)
            vae = self.world_encoder
            counts[Component.WORLD_ENCODER] = vae.component("encoder") + vae.component("quant_conv")
            counts[Component.WORLD_PROJECTOR] = (features + 1) * hidden
            counts[Component.WORLD_PROJECTOR] += (hidden + 1) * hidden if self.projection == "mlp" else 0
        return counts


@dataclass(frozen=True)
class StepShape:
    """The samples of one rank's optimizer step; every sample alike.

    Attributes:
        micro_batch_size: Samples of a forward pass.
        positions: Tokens of a sample, image and world tokens included.
        supervised: Tokens of a sample that the model has to predict.
        images: Images of a sample for the vision tower, and world blocks.
        frames: Frames of a world block.
        gradient_accumulation_steps: Micro-batches of a step.
    """

    micro_batch_size: int
    positions: int
    supervised: int
    images: int = 1
    frames: int = 1
    gradient_accumulation_steps: int = 1

    @property
    def tokens(self) -> int:
        """Positions of the whole step."""
        return self.micro_batch_size * self.positions * self.gradient_accumulation_steps


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed.

    Attributes:
        trainable: Components that train.
        gradient_checkpointing: Whether layers run again in the backward pass.
        attention: How the language model attends.
        chunk_size: Supervised positions whose logits are held at once.
        precision: Of all but the world encoder.
        world_encoder_precision: The world encoder's while it is frozen; it trains in fp32.
        cached: Frozen encoders whose outputs are read instead of computed.
        optimizer_shards: Ranks among which the optimizer's work is split: all that share its state.
        trims: Whether the last layers compute the positions alone that the loss depends on; the supervised ones of a
            sample are taken to be its last.
        adapters: Parameters of low-rank adapters, of trainable components whose own weights are frozen.
    """

    trainable: frozenset[Component]
    gradient_checkpointing: bool = True
    attention: Attention = "banded"
    chunk_size: int = 1024
    precision: Precision = "bf16"
    world_encoder_precision: Precision = "fp32"
    cached: frozenset[Component] = frozenset()
    optimizer_shards: int = 1
    trims: bool = False
    adapters: Mapping[Component, int] = field(default_factory=dict)


class Operation(NamedTuple):
    """Work of one kind in one pass over one part, of the whole optimizer step.

    Attributes:
        component: Where it is.
        part: What of the component.
        kind: Decides the efficiency.
        phase: The pass.
        precision: Of the multiplications.
        flops: Floating-point operations.
        bytes: Memory traffic.
        kernels: Launches.
    """

    component: Component
    part: str
    kind: Kind
    phase: Phase
    precision: Precision
    flops: float
    bytes: float
    kernels: int


@dataclass(frozen=True)
class StepWork:
    """All operations of an optimizer step on one rank.

    Attributes:
        operations: The operations.
        useful_flops: What the mathematics of the step needs: no recomputation, no pair that a mask hides, and of the
            last layers no more than is computed.
        tokens: Positions of the step.
    """

    operations: tuple[Operation, ...]
    useful_flops: float
    tokens: int

    @property
    def flops(self) -> float:
        """All floating-point operations."""
        return sum(operation.flops for operation in self.operations)

    def flops_by(self, field: Literal["component", "part", "kind", "phase"]) -> dict[str, float]:
        """Returns the FLOPs by one field of the operations, those without any left out."""
        sums: defaultdict[str, float] = defaultdict(float)
        for operation in self.operations:
            sums[str(getattr(operation, field))] += operation.flops
        return {name: flops for name, flops in sums.items() if flops}


def step_work(model: StepModel, shape: StepShape, settings: StepSettings) -> StepWork:
    """Returns what one rank computes in an optimizer step.

    Args:
        model: The model's sizes.
        shape: The rank's samples.
        settings: How it is computed.
    """
    images = (model.image_tokens,) * shape.images
    attention = AttentionWork(settings.attention, image_tokens=images)
    return StepWork(
        _operations(model, shape, settings, attention), _useful_flops(model, shape, settings, images), shape.tokens
    )


def _useful_flops(model: StepModel, shape: StepShape, settings: StepSettings, images: tuple[int, ...]) -> float:
    """Returns the FLOPs without recomputation and masked pairs."""
    whole = replace(
        settings, gradient_checkpointing=False, chunk_size=max(1, shape.micro_batch_size * shape.supervised)
    )
    exact = AttentionWork("structured", block=1, image_tokens=images)
    useful = 0.0
    for operation in _operations(model, shape, whole, exact):
        recomputed = operation.kind == "structured" and operation.phase == "input_gradients"
        useful += operation.flops * (_NEEDED_OF_FUSED_BACKWARD if recomputed else 1.0)
    return useful


def _operations(
    model: StepModel, shape: StepShape, settings: StepSettings, attention: AttentionWork
) -> tuple[Operation, ...]:
    micro_batch = (
        *_vision(model, shape, settings, attention),
        *_world(model, shape, settings, attention),
        *_language(model, shape, settings, attention),
        *_casts(model, settings),
    )
    steps = shape.gradient_accumulation_steps
    repeated = [
        operation._replace(
            flops=operation.flops * steps, bytes=operation.bytes * steps, kernels=operation.kernels * steps
        )
        for operation in micro_batch
    ]
    return (*repeated, *_optimizer(model, settings))


def _vision(
    model: StepModel, shape: StepShape, settings: StepSettings, attention: AttentionWork
) -> Iterator[Operation]:
    """Yields vision tower and multi-modal projector."""
    images = shape.micro_batch_size * shape.images
    size, vision = _SIZE[settings.precision], model.vision_tower
    pieces = vision_pieces(vision, images, attention.kind, size)
    yield from _encoder(Component.VISION_TOWER, pieces, settings, settings.precision)
    patches = images * (vision.image_size // vision.patch_size) ** 2
    yield from _adapter(patches, Component.VISION_TOWER, settings, recompute=settings.gradient_checkpointing)
    trains = Component.VISION_TOWER in settings.trainable
    pieces = projector_pieces(vision.hidden_size, model.language_model.hidden_size, images * model.image_tokens, size)
    if not trains:
        pieces = without_input_gradient(pieces)
    yield from _passes(Component.MULTI_MODAL_PROJECTOR, pieces, settings, recompute=False)


def _world(model: StepModel, shape: StepShape, settings: StepSettings, attention: AttentionWork) -> Iterator[Operation]:
    """Yields world encoder and world projector."""
    if model.world_encoder is None:
        return
    blocks = shape.micro_batch_size * shape.images
    trains = Component.WORLD_ENCODER in settings.trainable
    precision: Precision = "fp32" if trains else settings.world_encoder_precision
    pieces = world_encoder_pieces(
        model.world_encoder, blocks, shape.frames, model.resolution, attention.kind, _SIZE[precision]
    )
    yield from _encoder(Component.WORLD_ENCODER, pieces, settings, precision)
    first, rest = world_projector_pieces(
        model.projection,
        world_features(model.layout, model.resolution, model.latent_channels, pool=model.pool),
        model.language_model.hidden_size,
        blocks * model.world_tokens(shape.frames),
        _SIZE[settings.precision],
    )
    if not trains:
        first = without_input_gradient(first)
        if Component.WORLD_PROJECTOR not in settings.trainable:
            rest = without_input_gradient(rest)
    yield from _passes(Component.WORLD_PROJECTOR, (*first, *rest), settings, recompute=False)


def _language(
    model: StepModel, shape: StepShape, settings: StepSettings, attention: AttentionWork
) -> Iterator[Operation]:
    """Yields decoder and head; they lie behind everything that can train."""
    decoder, size = model.language_model, _SIZE[settings.precision]
    supervised = shape.micro_batch_size * shape.supervised
    chunks = max(1, -(-supervised // settings.chunk_size))
    needed = shape.supervised if settings.trims else None
    layers = decoder_pieces(decoder, shape.micro_batch_size, shape.positions, attention, size, needed)
    head = head_pieces(decoder, supervised, chunks, size)
    if not settings.trainable:
        layers, head = without_input_gradient(layers), without_input_gradient(head)
    yield from _passes(Component.LANGUAGE_MODEL, layers, settings, recompute=settings.gradient_checkpointing)
    tokens = shape.micro_batch_size * shape.positions
    yield from _adapter(tokens, Component.LANGUAGE_MODEL, settings, recompute=settings.gradient_checkpointing)
    # The gradient of a frozen head's inputs is taken while its logits are there.
    recompute = chunks > 1 and Component.LANGUAGE_MODEL in settings.trainable
    yield from _passes(Component.LANGUAGE_MODEL, head, settings, recompute=recompute)


def _casts(model: StepModel, settings: StepSettings) -> Iterator[Operation]:
    """Yields what autocast rounds: the masters of what trains in bf16, in every pass, and their gradients back."""
    for component, parameters in _trained(model, settings).items():
        if component is not Component.WORLD_ENCODER and settings.precision == "bf16":
            yield from _passes(
                component, (cast_piece(parameters),), settings, recompute=settings.gradient_checkpointing
            )


def _encoder(
    component: Component, pieces: Iterable[Piece], settings: StepSettings, precision: Precision
) -> Iterator[Operation]:
    """Yields an encoder: with a backward pass where it trains, else its forward pass alone, or nothing if cached."""
    if component in settings.trainable:
        yield from _passes(component, pieces, settings, recompute=settings.gradient_checkpointing, precision=precision)
    elif component not in settings.cached:
        yield from (_operation(component, piece, "encode", precision) for piece in pieces)


def _passes(
    component: Component,
    pieces: Iterable[Piece],
    settings: StepSettings,
    *,
    recompute: bool,
    precision: Precision | None = None,
) -> Iterator[Operation]:
    """Yields the passes over the pieces of a component inside of what an engine wraps."""
    trains = component in settings.trainable and component not in settings.adapters
    precision = precision or settings.precision
    for piece in pieces:
        yield _operation(component, piece, "forward", precision)
        has_backward = piece.input_gradient > 0 or (trains and piece.has_weights)
        if recompute and has_backward and piece.recomputed:
            yield _operation(component, piece, "recompute", precision)
        if piece.input_gradient:
            yield _operation(component, piece, "input_gradients", precision, piece.input_gradient)
        if trains and piece.has_weights:
            yield _operation(component, piece, "weight_gradients", precision)


def _adapter(tokens: int, component: Component, settings: StepSettings, *, recompute: bool) -> Iterator[Operation]:
    """Yields the two thin products beside each adapted layer, which train."""
    parameters = settings.adapters.get(component, 0)
    if not parameters:
        return
    piece = Piece("adapter", "matmul", 2 * tokens * parameters, parameters * _SIZE[settings.precision])
    phases: tuple[Phase, ...] = ("forward", "input_gradients", "weight_gradients")
    for phase in (*phases, "recompute") if recompute else phases:
        yield _operation(component, piece, phase, settings.precision)


def _operation(
    component: Component, piece: Piece, phase: Phase, precision: Precision, factor: float = 1.0
) -> Operation:
    flops, moved = piece.flops * factor, piece.bytes * factor
    return Operation(component, piece.part, piece.kind, phase, precision, flops, moved, piece.kernels)


def _optimizer(model: StepModel, settings: StepSettings) -> Iterator[Operation]:
    """Yields clipping and AdamW over what trains, once a step."""
    for component, parameters in _trained(model, settings).items():
        piece = traffic("optimizer", parameters // settings.optimizer_shards, _ADAMW_BYTES, _ADAMW_KERNELS)
        yield _operation(component, piece, "optimizer", "fp32")


def _trained(model: StepModel, settings: StepSettings) -> dict[Component, int]:
    """Returns the parameters that train, by component."""
    counts = model.parameters
    return {c: settings.adapters.get(c, counts[c]) for c in counts if c in settings.trainable}
