"""TheWorld: Gemma 3 whose sequence also holds world tokens."""

from __future__ import annotations

from itertools import accumulate
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, Gemma3ForConditionalGeneration
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.models.gemma3.modeling_gemma3 import Gemma3CausalLMOutputWithPast

from theworld_train.accounting.tokens import latent_frames
from theworld_train.model.components import component_parameters
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.pretrained import load_pretrained
from theworld_train.model.world_encoder import WorldEncoder
from theworld_train.model.world_projector import WorldProjector

_WORLD_INPUTS = ("world_frames", "world_frame_counts", "world_offsets", "world_latents")


class TheWorldForConditionalGeneration(Gemma3ForConditionalGeneration):
    """Gemma 3 with a world encoder and a world projector.

    With `config.enable_world` false the model is `Gemma3ForConditionalGeneration`, bit for bit. Otherwise every
    `<world>` placeholder of `input_ids` is replaced by a projected latent, and the brackets around them by
    `world_projector.boundary`, before the parent's own model runs.
    """

    config: TheWorldConfig
    config_class = TheWorldConfig
    _keep_in_fp32_modules_strict = ["world_encoder"]  # noqa: RUF012 (declared by the parent)

    def __init__(self, config: TheWorldConfig) -> None:
        """Args: config: architecture of Gemma 3 and of the world path."""
        super().__init__(config)
        if config.enable_world:
            self.world_encoder = WorldEncoder(config.world_encoder_config or {})
            self.world_projector = WorldProjector(config)
            self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, WorldProjector):
            module.reset_parameters()
            for child in module.modules():
                child._is_hf_initialized = True  # type: ignore[assignment]
        elif isinstance(module, WorldEncoder):
            return
        else:
            super()._init_weights(module)

    # -- encoders ---------------------------------------------------------------------------------------------------

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Runs the vision tower.

        Args:
            pixel_values: `(images, 3, height, width)` as the processor normalises them.

        Returns:
            Patch features `(images, patches, vision hidden size)`, before the multi-modal projector.
        """
        tower = self.model.vision_tower
        weight = tower.embeddings.patch_embedding.weight
        features: Tensor = tower(pixel_values=pixel_values.to(weight.dtype), return_dict=True).last_hidden_state
        return features

    def encode_world(self, world_frames: Tensor, world_frame_counts: tuple[int, ...]) -> Tensor:
        """Runs the world encoder over world blocks.

        Args:
            world_frames: `(frames of all blocks, 3, height, width)` in [-1, 1].
            world_frame_counts: Frames of each block, 1 + 4k.

        Returns:
            Normalised latents `(latent frames of all blocks, channels, height / 8, width / 8)`.
        """
        latents: Tensor = self.world_encoder(world_frames, world_frame_counts)[0]
        return latents

    # -- embedding --------------------------------------------------------------------------------------------------

    def embed(
        self,
        input_ids: Tensor,
        image_features: Tensor | None = None,
        world_latents: Tensor | None = None,
        latent_counts: tuple[int, ...] = (),
        world_offsets: tuple[int, ...] = (),
    ) -> Tensor:
        """Embeds a sequence and puts image and world features in the place of their placeholders.

        Args:
            input_ids: `(batch, sequence)`.
            image_features: Output of the multi-modal projector, `(images, tokens, hidden)`, all images in order.
            world_latents: Output of `encode_world`, all world blocks of the batch in order.
            latent_counts: Latent frames of each world block; none if the latents are there for their graph alone.
            world_offsets: Of the first latent frame of each block from the present; if absent, every block ends in it.

        Returns:
            `(batch, sequence, hidden)` in the embedding's dtype.

        Raises:
            ValueError: If the number of placeholders differs from that of the features.
        """
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        if image_features is not None:
            embeds = _scatter(embeds, input_ids == self.config.image_token_id, image_features, "image")
        if world_latents is not None:
            features, brackets = self.world_projector(world_latents, latent_counts or (1,), world_offsets)
            features = features[: sum(latent_counts)]
            embeds = _scatter(embeds, input_ids == self.config.world_token_id, features, "world")
            for index, token in enumerate((self.config.start_of_world_token_id, self.config.end_of_world_token_id)):
                embeds = torch.where((input_ids == token).unsqueeze(-1), brackets[index].to(embeds.dtype), embeds)
        return embeds

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        world_frames: Tensor | None = None,
        world_frame_counts: tuple[int, ...] | Tensor | None = None,
        world_offsets: tuple[int, ...] | Tensor | None = None,
        world_latents: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | Gemma3CausalLMOutputWithPast:
        """Computes logits as `Gemma3ForConditionalGeneration.forward` does, world tokens included.

        Args:
            input_ids: `(batch, sequence)` with image and world placeholders expanded.
            pixel_values: `(images, 3, height, width)` for the vision tower.
            attention_mask: `(batch, sequence)`, 1 at real tokens.
            position_ids: `(batch, sequence)`.
            past_key_values: KV cache.
            token_type_ids: `(batch, sequence)`, 1 at image tokens; derived from `input_ids` if absent.
            inputs_embeds: `(batch, sequence, hidden)` instead of `input_ids`; taken as it is.
            labels: `(batch, sequence)`, -100 where not supervised.
            use_cache: Whether to return a KV cache.
            logits_to_keep: As in the parent.
            world_frames: `(frames of all world blocks, 3, height, width)` in [-1, 1].
            world_frame_counts: Frames of each world block.
            world_offsets: Of the first latent frame of each block from the present, in latent frames; if absent, every
                block ends in it.
            world_latents: What the world encoder, or a generator, has made of all blocks, instead of `world_frames`:
                `(latent frames of all world blocks, channels, height / 8, width / 8)`, normalised.
            mm_encoder_outputs: Images that `generate` has encoded beforehand, instead of `pixel_values`.
            **kwargs: Passed on to the parent.

        Returns:
            The parent's output.

        Raises:
            ValueError: If placeholders and features do not match in number.
        """
        if self.config.enable_world and input_ids is not None and inputs_embeds is None:
            image_features = None
            if mm_encoder_outputs is not None and mm_encoder_outputs.get("image") is not None:
                image_features = mm_encoder_outputs["image"].pooler_output
            elif pixel_values is not None:
                image_features = self.model.multi_modal_projector(self.encode_images(pixel_values))
            latents, latent_counts = self._latents(world_frames, world_frame_counts, world_latents)
            self._check_placeholders(input_ids, image_features, latents)
            if token_type_ids is None and image_features is not None:
                token_type_ids = (input_ids == self.config.image_token_id).long()
            offsets = () if world_offsets is None else tuple(int(offset) for offset in world_offsets)
            inputs_embeds = self.embed(input_ids, image_features, latents, latent_counts, offsets)
            input_ids = pixel_values = mm_encoder_outputs = None
        elif world_frames is not None or world_latents is not None:
            raise ValueError("world blocks need input_ids and a model with a world path (enable_world=True)")
        output: tuple[Any, ...] | Gemma3CausalLMOutputWithPast = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        return output

    def _latents(
        self, frames: Tensor | None, counts: tuple[int, ...] | Tensor | None, latents: Tensor | None
    ) -> tuple[Tensor | None, tuple[int, ...]]:
        """Returns the latents of world blocks, encoded unless they are given, and the latent frames of each block."""
        if frames is None and latents is None:
            return None, ()
        assert counts is not None, "world blocks need world_frame_counts"
        spans = tuple(int(count) for count in counts)
        if latents is not None:
            return latents, tuple(latent_frames(span) for span in spans)
        encoded: tuple[Tensor, tuple[int, ...]] = self.world_encoder(frames, spans)
        return encoded

    def _check_placeholders(self, input_ids: Tensor, images: Tensor | None, latents: Tensor | None) -> None:
        """Refuses placeholders for which no features were given; `embed` checks the rest."""
        if latents is None and bool((input_ids == self.config.world_token_id).any()):
            raise ValueError("input_ids hold <world> placeholders, but no world_frames were given")
        if images is None and bool((input_ids == self.config.image_token_id).any()):
            raise ValueError("input_ids hold image placeholders, but no pixel_values were given")

    # -- generation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (tokens or an output object, as asked for)
        """Generates as the parent does, but never what stands for an image or a world block, which is input alone."""
        absent = [self.config.image_token_id, *(self.config.world_token_ids if self.config.enable_world else ())]
        suppress = SuppressTokensLogitsProcessor(absent, device=str(self.device))
        kwargs["logits_processor"] = LogitsProcessorList([*(kwargs.get("logits_processor") or []), suppress])
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Passes the world blocks on with the prompt, and not with the tokens generated after it.

        A prompt may also come as `inputs_embeds`: `generate` allows it to what names that parameter.
        """
        first = kwargs.get("is_first_iteration", False) or not kwargs.get("use_cache", True)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, inputs_embeds=inputs_embeds, **kwargs)
        if not first:
            for name in _WORLD_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats prompts for beams and samples; images and world blocks are repeated sample by sample."""
        visuals: dict[str, Any] = {}
        if expand_size > 1 and input_ids is not None and self.config.enable_world:
            names = ("pixel_values", *_WORLD_INPUTS)
            visuals = {name: model_kwargs.pop(name) for name in names if model_kwargs.get(name) is not None}
            visuals = self._repeat_visuals(input_ids, visuals, expand_size)
        expanded, rest = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )
        return expanded, rest | visuals

    def _repeat_visuals(self, input_ids: Tensor, visuals: dict[str, Any], times: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if "pixel_values" in visuals:
            per_sample = (input_ids == self.config.boi_token_id).sum(-1).tolist()
            parts = visuals["pixel_values"].split(per_sample)
            result["pixel_values"] = torch.cat([part for part in parts for _ in range(times)])
        if "world_frame_counts" in visuals:
            blocks = (input_ids == self.config.start_of_world_token_id).sum(-1).tolist()
            counts = [int(count) for count in visuals["world_frame_counts"]]
            order: list[int] = []
            for number, start in zip(blocks, [0, *accumulate(blocks)], strict=False):
                order += [*range(start, start + number)] * times
            spans = {"world_frames": counts, "world_latents": [latent_frames(count) for count in counts]}
            for name in spans.keys() & visuals.keys():
                blocks_of = visuals[name].split(spans[name])
                result[name] = torch.cat([blocks_of[index] for index in order])
            result["world_frame_counts"] = tuple(counts[index] for index in order)
            if "world_offsets" in visuals:
                result["world_offsets"] = tuple(int(visuals["world_offsets"][index]) for index in order)
        return result

    # -- construction -----------------------------------------------------------------------------------------------

    def get_trainable_parameters(self) -> dict[str, int]:
        """Returns how many parameters require a gradient, by component; components without any are left out."""
        counts = {
            component.value: sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad)
            for component, parameters in component_parameters(self).items()
        }
        return {name: count for name, count in counts.items() if count}

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | PathLike[str], *args: Any, **kwargs: Any
    ) -> TheWorldForConditionalGeneration:
        """Loads Gemma 3, a TheWorld directory or a checkpoint of a run; see `theworld_train.model.pretrained`."""
        return load_pretrained(cls, str(pretrained_model_name_or_path), *args, **kwargs)


def _scatter(embeds: Tensor, places: Tensor, features: Tensor, kind: str) -> Tensor:
    """Replaces `embeds` where `places` is true by `features`, in order; gradients flow into the features."""
    features = features.reshape(-1, embeds.shape[-1])
    if int(places.sum()) != features.shape[0]:
        raise ValueError(
            f"{int(places.sum())} {kind} placeholders in input_ids, but {features.shape[0]} {kind} features"
        )
    return embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.dtype))


__all__ = ["TheWorldForConditionalGeneration"]
