"""The step's forward pass: what an engine wraps, and the frozen encoders that stay outside of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from theworld_train.accounting.tokens import latent_frames
from theworld_train.batch import IGNORE_INDEX, Batch
from theworld_train.config.components import Component
from theworld_train.config.schema import GradientCheckpointing
from theworld_train.model.attention import BANDED, FLEX, SequenceLayout
from theworld_train.model.components import TRAITS, component_modules
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.train.freeze import Precision, set_modes
from theworld_train.train.loss import LossOutput, next_tokens, reference_loss, supervised_loss
from theworld_train.train.recompute import enable_checkpointing


@dataclass(frozen=True)
class Features:
    """A batch's visual inputs, encoded already where the encoder is frozen.

    Attributes:
        image_states: Patch features of the vision tower, or None if it trains (or there are no images).
        pixel_values: Pixels for a vision tower that trains.
        world_latents: Normalised latents, or None if the world encoder trains (or there are no world blocks).
        world_frames: Frames for a world encoder that trains.
        frame_counts: Frames of each world block.
        offsets: Of the first latent frame of each block from the present; if empty, every block ends in it.
    """

    image_states: Tensor | None = None
    pixel_values: Tensor | None = None
    world_latents: Tensor | None = None
    world_frames: Tensor | None = None
    frame_counts: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()

    @property
    def num_images(self) -> int:
        """Images of the batch."""
        given = self.pixel_values if self.image_states is None else self.image_states
        return 0 if given is None else given.shape[0]


class StageModule(nn.Module):
    """The components that train or carry gradients, with the loss: the module that an engine wraps.

    A frozen encoder is no part of it: nothing trainable feeds it, so `encode` runs it beforehand without a graph, in
    its own dtype, and no engine ever casts or shards it. The whole model stays reachable as `model`.
    """

    def __init__(
        self,
        model: TheWorldForConditionalGeneration,
        trainable: Collection[Component],
        *,
        precision: Precision,
        chunk_size: int,
        gradient_checkpointing: GradientCheckpointing,
        activation_offload: bool = False,
        reference: bool = False,
        trims: bool = False,
        fused: bool = False,
    ) -> None:
        """Builds the stage around a model that `apply_trainable` has prepared.

        Args:
            model: The model.
            trainable: Components that train.
            precision: `bf16` runs under autocast with the residual stream in bf16; `bf16_pure` without autocast.
            chunk_size: Supervised positions whose logits are held at once.
            gradient_checkpointing: What each tower recomputes in the backward pass.
            activation_offload: Whether what checkpointed layers start from waits in host memory.
            reference: Whether training computes its loss as transformers 4.56 does.
            trims: Whether the last layers compute the positions alone that the loss depends on; the model's layers
                and attention can.
            fused: Whether training takes the loss from the head, which is a `LigerHead`.
        """
        super().__init__()
        modules = component_modules(model)
        outside = [component for component in modules if TRAITS[component].is_encoder and component not in trainable]
        self.parts = nn.ModuleDict({c.value: module for c, module in modules.items() if c not in outside})
        self.parts["lm_head"] = model.lm_head
        self.trainable = frozenset(trainable)
        self.chunk_size = chunk_size
        #: Whether every call runs every component inside, as engines need it that gather weights; they set it.
        self.lockstep = False
        self._reference, self._trims, self._fused = reference, trims, fused
        self._autocasts = precision == "bf16"
        self._dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._model = (model,)  # a tuple hides the whole model from the module's own children
        enable_checkpointing(model, gradient_checkpointing, offload=activation_offload)
        # The residual stream begins here; from fp32 masters it would begin, and stay, in fp32.
        model.model.vision_tower.embeddings.register_forward_hook(lambda _module, _args, out: out.to(self._dtype))

    @property
    def model(self) -> TheWorldForConditionalGeneration:
        """The whole model, frozen encoders included."""
        return self._model[0]

    def set_training_modes(self) -> None:
        """Sets the modes of a training step; see `set_modes`."""
        set_modes(self.model, self.trainable)

    # -- outside of the engine --------------------------------------------------------------------------------------

    def encode(self, batch: Batch) -> Features:
        """Runs the frozen encoders over a batch, without a graph."""
        trains_vision = Component.VISION_TOWER in self.trainable
        trains_world = Component.WORLD_ENCODER in self.trainable
        assert not (trains_vision and batch.images_known), "what trains is encoded anew in every step"
        assert not (trains_world and batch.blocks_known), "what trains is encoded anew in every step"
        image_states = None if trains_vision else self._image_states(batch)
        latents = None if trains_world else self._world_latents(batch)
        return Features(
            image_states=image_states,
            pixel_values=batch.pixel_values if trains_vision else None,
            world_latents=latents,
            world_frames=batch.world_frames if trains_world else None,
            frame_counts=batch.world_frame_counts,
            offsets=batch.world_offsets,
        )

    @torch.no_grad()
    def encode_alone(self, component: Component, pixels: Tensor) -> Tensor:
        """Runs a frozen encoder over a single image or clip; what it makes does not depend on other samples.

        Args:
            component: The encoder.
            pixels: `(frames, 3, height, width)` of the image (one frame) or clip, as a batch holds it.

        Returns:
            `(1, patches, vision hidden size)`, or `(latent frames, channels, height / 8, width / 8)`; contiguous.
        """
        with self._autocast(pixels.device):
            if component is Component.VISION_TOWER:
                return self.model.encode_images(pixels).contiguous()
            return self.model.encode_world(pixels, (len(pixels),)).contiguous()

    @torch.no_grad()
    def _image_states(self, batch: Batch) -> Tensor | None:
        pixels = batch.pixel_values
        if batch.images_known:
            known = () if batch.image_states is None else batch.image_states.split(1)
            unknown = () if pixels is None else pixels.split(1)
            return _in_order(batch.images_known, known, (self.encode_alone(Component.VISION_TOWER, p) for p in unknown))
        if pixels is None:
            return None
        with self._autocast(pixels.device):
            return self.model.encode_images(pixels)

    @torch.no_grad()
    def _world_latents(self, batch: Batch) -> Tensor | None:
        frames, counts, flags = batch.world_frames, batch.world_frame_counts, batch.blocks_known
        if flags:
            known = [latent_frames(count) for count, there in zip(counts, flags, strict=True) if there]
            unknown = [count for count, there in zip(counts, flags, strict=True) if not there]
            kept = () if batch.world_latents is None else batch.world_latents.split(known)
            blocks = () if frames is None else frames.split(unknown)
            return _in_order(flags, kept, (self.encode_alone(Component.WORLD_ENCODER, block) for block in blocks))
        if frames is None:
            return None
        with self._autocast(frames.device):
            return self.model.encode_world(frames, counts)

    # -- inside of the engine ---------------------------------------------------------------------------------------

    def forward(self, batch: Batch, features: Features, chunks: int, want_predictions: bool = False) -> LossOutput:
        """Computes the summed loss of one micro-batch.

        Args:
            batch: The micro-batch.
            features: What `encode` made of it.
            chunks: Chunks of the loss, equal on all ranks.
            want_predictions: Whether to return the most likely tokens too.
        """
        model, layout = self.model, self._layout(batch)
        text: Any = model.config.text_config
        with self._autocast(batch.input_ids.device):
            embeds = self._embed(batch, features).to(self._dtype)
            hidden = model.model(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask if layout is None else dict.fromkeys(text.layer_types, layout),
                position_ids=batch.position_ids,
                token_type_ids=batch.token_type_ids,
                use_cache=False,
            ).last_hidden_state
            if self._reference and torch.is_grad_enabled():
                return reference_loss(hidden, batch.labels, batch.attention_mask, model.lm_head)
            return supervised_loss(
                hidden,
                batch.labels,
                model.lm_head,
                chunk_size=self.chunk_size,
                chunks=chunks,
                places=None if layout is None else layout.outputs,
                never_generated=model.config.world_token_ids if model.config.enable_world else (),
                want_predictions=want_predictions,
                frozen_head=not self.lockstep and not model.lm_head.weight.requires_grad,
                fused=self._fused,
            )

    @torch.no_grad()
    def generate(
        self, batch: Batch, features: Features, rows: Sequence[int], ends: Sequence[int], max_new_tokens: int
    ) -> Tensor:
        """Continues the beginnings of some rows greedily, as `forward` would predict them token by token.

        Args:
            batch: Rows of one sample each, padded on the right.
            features: What `encode` made of it.
            rows: Which rows; where engines gather weights every rank calls it, with one row at least.
            ends: Of each of these rows, how many of its tokens are the beginning.
            max_new_tokens: Most tokens that a row is continued by.

        Returns:
            `(len(rows), new tokens)`, padded behind the token that ends a turn.
        """
        model, device = self.model, batch.input_ids.device
        longest = max(ends)
        # Rows end together, so that what is generated is behind all of them.
        offset = torch.tensor([longest - end for end in ends], device=device)[:, None]
        place = torch.arange(longest, device=device)[None, :] - offset
        real, place = place >= 0, place.clamp(min=0)
        row = torch.tensor(list(rows), device=device)[:, None]
        with self._autocast(device):
            embeds = self._embed(batch, features).to(self._dtype)
            tokens: Tensor = model.generate(
                inputs_embeds=embeds[row, place],
                attention_mask=batch.attention_mask[row, place] * real,
                position_ids=place,
                token_type_ids=batch.token_type_ids[row, place] * real,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                synced_gpus=self.lockstep,
            )
        return tokens

    def _layout(self, batch: Batch) -> SequenceLayout | None:
        """Returns what the attention of the language model takes in the place of a mask, or None if it takes masks."""
        config: Any = self.model.config.text_config
        if config._attn_implementation not in (BANDED, FLEX):
            return None
        layout = SequenceLayout.of(batch.attention_mask, batch.token_type_ids)
        if not self._trims:
            return layout
        windows = [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]
        return layout.trimmed(next_tokens(batch.labels) != IGNORE_INDEX, windows)

    def _autocast(self, device: torch.device) -> torch.autocast:
        # A cached cast would stay until the pass ends: all weights in bf16 at once, beside their masters, although none
        # but the head's is used twice, and those that an engine has gathered although it has released them.
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._autocasts, cache_enabled=False)

    def _embed(self, batch: Batch, features: Features) -> Tensor:
        """Embeds the sequence; the visual parts run as `_runs` says, also where the batch has nothing for them."""
        model, device = self.model, batch.input_ids.device
        config: Any = model.config
        image_features = latents = None
        images = features.num_images
        if images or self._runs(Component.VISION_TOWER, Component.MULTI_MODAL_PROJECTOR):
            states = features.image_states
            if states is None:
                side = config.vision_config.image_size
                pixels = features.pixel_values
                states = self._encode_images(torch.zeros(1, 3, side, side, device=device) if pixels is None else pixels)
            # Of no images no features are left, but the graph is there, and so are gradients of zero.
            image_features = model.model.multi_modal_projector(states)[:images]
        blocks = features.frame_counts
        if blocks or self._runs(Component.WORLD_ENCODER, Component.WORLD_PROJECTOR):
            latents = features.world_latents
            if latents is None:
                side = config.world_resolution
                frames = features.world_frames
                frames = torch.zeros(1, 3, side, side, device=device) if frames is None else frames
                latents = self._encode_world(frames, blocks or (1,))
        counts = tuple(latent_frames(count) for count in blocks)
        return model.embed(batch.input_ids, image_features, latents, counts, features.offsets)

    def _runs(self, *components: Component) -> bool:
        """Whether a visual path runs although a batch has nothing for it.

        What trains needs gradients of zero, not none: an optimizer would skip the step, and other ranks would wait. An
        engine that gathers weights needs every rank to call the same modules in the same order, trained or not.
        """
        if not self.model.config.enable_world and Component.WORLD_PROJECTOR in components:
            return False
        return self.lockstep or (torch.is_grad_enabled() and bool(self.trainable.intersection(components)))

    def _encode_images(self, pixels: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and Component.VISION_TOWER in self.trainable):
            return self.model.encode_images(pixels)

    def _encode_world(self, frames: Tensor, counts: tuple[int, ...]) -> Tensor:
        trains = torch.is_grad_enabled() and Component.WORLD_ENCODER in self.trainable
        if trains and self.lockstep:
            # ZeRO-3 takes the encoder's backward for done when that of its input is, or at once if it has none.
            frames = frames.detach().requires_grad_()
        with torch.set_grad_enabled(trains):
            return self.model.encode_world(frames, counts)


def _in_order(flags: Sequence[bool], known: Iterable[Tensor], made: Iterable[Tensor]) -> Tensor:
    """Returns what is known and what has been made now, in the order of the batch; `flags` tells which is which."""
    known, made = iter(known), iter(made)
    return torch.cat([next(known) if there else next(made) for there in flags])
