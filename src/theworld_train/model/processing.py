"""The processor: conversations with images and clips to tokens and pixels, with exact lengths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, Gemma3Processor, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils.chat_template_utils import render_jinja_template

from theworld_train.accounting.tokens import clip_frames, world_tokens
from theworld_train.batch import EncodedSample, KnownEncodings
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.model.configuration import check_pool
from theworld_train.model.visuals import (
    Images,
    Visual,
    collect_visuals,
    frames_of,
    is_blank,
    look_up,
    look_up_latents,
    nest_visuals,
    num_frames,
    offset_of,
    present_of,
)

START_OF_WORLD, WORLD, END_OF_WORLD = "<start_of_world>", "<world>", "<end_of_world>"
WORLD_TOKENS = (START_OF_WORLD, WORLD, END_OF_WORLD)

#: Gemma 3's turns. An image or video part becomes one image marker, which the processor expands; assistant turns are
#: marked as generated, which is what training supervises.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set prefix = namespace(text='') -%}
{%- macro parts(content) -%}
  {%- if content is string -%}{{ content | trim }}
  {%- else -%}
    {%- for part in content -%}
      {%- if part['type'] == 'text' -%}{{ part['text'] | trim }}
      {%- elif part['type'] in ('image', 'video') -%}{{ '<start_of_image>' }}
      {%- else -%}{{ raise_exception("content part of type '" ~ part['type'] ~ "': expected text, image or video") }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- if not loop.first -%}{{ raise_exception('a system message must come first') }}{%- endif -%}
    {%- set prefix.text = parts(message['content']) ~ '\\n\\n' -%}
  {%- elif message['role'] == 'user' -%}
    {{- '<start_of_turn>user\\n' ~ prefix.text ~ parts(message['content']) ~ '<end_of_turn>\\n' -}}
    {%- set prefix.text = '' -%}
  {%- elif message['role'] == 'assistant' -%}
    {%- if prefix.text -%}{{ raise_exception('a user message must follow the system message') }}{%- endif -%}
    {{- '<start_of_turn>model\\n' -}}
    {%- generation -%}{{- parts(message['content']) ~ '<end_of_turn>' -}}{%- endgeneration -%}
    {{- '\\n' -}}
  {%- else -%}{{ raise_exception("role '" ~ message['role'] ~ "': expected system, user or assistant") }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

#: How a template marks the text that the model has to generate; `add_generation_prompt` alone does not.
_MARKS_GENERATED_TEXT = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TheWorldProcessor(Gemma3Processor):
    """Gemma 3's processor with world blocks.

    Every image or video part is written as `<start_of_world>` + N x `<world>` + `<end_of_world>` directly before
    Gemma's image block. The vision tower sees the image, or the last frame of the clip; the world path sees all frames.
    Without `enable_world` the tokens are those of `Gemma3Processor`.
    """

    def __init__(
        self,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        image_seq_length: int = 256,
        enable_world: bool = True,
        world_resolution: int = 512,
        world_resize: str = "pad",
        world_tokens: str = "spatial",
        world_pool: int = 1,
        world_latent_channels: int = 16,
        **kwargs: Any,
    ) -> None:
        """Builds the processor.

        Args:
            image_processor: Gemma 3's image processor.
            tokenizer: Gemma 3's tokenizer; the three world tokens are added to it.
            chat_template: Ignored unless it marks generated text; TheWorld's own template is used otherwise.
            image_seq_length: Tokens of an image.
            enable_world: Whether world blocks are written.
            world_resolution: Side in pixels that frames are fitted to.
            world_resize: `pad`, `crop` or `stretch`.
            world_tokens: `spatial` or `channel`.
            world_pool: Latent cells along a side of the squares that are averaged into one.
            world_latent_channels: Channels of the VAE's latents.
            **kwargs: Passed on to transformers.
        """
        for name, value, known in (
            ("world_resize", world_resize, ("pad", "crop", "stretch")),
            ("world_tokens", world_tokens, ("spatial", "channel")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if world_resolution < 8 or world_resolution % 8:
            raise ValueError(f"world_resolution must be a positive multiple of 8, got {world_resolution}")
        check_pool(world_pool, world_resolution)
        if not chat_template or not _MARKS_GENERATED_TEXT.search(chat_template):
            chat_template = CHAT_TEMPLATE
        super().__init__(
            image_processor, tokenizer, chat_template=chat_template, image_seq_length=image_seq_length, **kwargs
        )
        self.enable_world = enable_world
        self.world_resolution = world_resolution
        self.world_resize = world_resize
        self.world_tokens = world_tokens
        self.world_pool = world_pool
        self.world_latent_channels = world_latent_channels
        if enable_world:
            tokenizer.add_special_tokens(
                {"extra_special_tokens": list(WORLD_TOKENS)}, replace_extra_special_tokens=False
            )
            ids = tokenizer.convert_tokens_to_ids(list(WORLD_TOKENS))
            expected = [tokenizer.image_token_id + 1 + index for index in range(3)]
            if ids != expected:
                raise ConfigError(
                    f"the world tokens got the ids {ids}, expected {expected} behind the image placeholder"
                )

    @property
    def pad_token_id(self) -> int:
        """Id that fills a batch's shorter samples."""
        return int(self.tokenizer.pad_token_id)

    # -- lengths ----------------------------------------------------------------------------------------------------

    def num_visual_tokens(self, frames: int = 1) -> int:
        """Returns the tokens of an image (`frames=1`) or clip: world block, image block, the blank lines around it."""
        newlines = len(self.tokenizer("\n\n", add_special_tokens=False)["input_ids"])
        total = self.image_seq_length + 2 + 2 * newlines
        if self.enable_world:
            total += 2 + self._world_tokens_of(frames)
        return total

    # -- conversations ----------------------------------------------------------------------------------------------

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        world: bool = True,
        known: KnownEncodings | None = None,
    ) -> EncodedSample:
        """Encodes one conversation.

        Args:
            messages: Turns in the chat template's format; image parts hold a PIL image under `image`, video parts a
                list of them under `video`, or both a `Blank`, and then there are no pixels. What else they may state,
                says `collect_visuals`.
            add_generation_prompt: Whether to end with the opening of an assistant turn.
            world: Whether to write world blocks, if the processor has them at all.
            known: What encoders have made of images and clips before; pixels are made of the others alone.

        Returns:
            Tokens and pixels; the text of assistant turns and the token that ends each are supervised.

        Raises:
            ValueError: If a part cannot be rendered, a visual is missing, or text contains a reserved token.
        """
        self._check_text(messages)
        try:
            rendered: Any = render_jinja_template(
                [list(messages)],
                chat_template=str(self.chat_template),
                return_assistant_tokens_mask=True,
                add_generation_prompt=add_generation_prompt,
                **self.tokenizer.special_tokens_map,
            )
        except TemplateError as error:
            raise ValueError(f"the conversation cannot be rendered: {error}") from error
        (text,), (spans,) = rendered
        return self._encode_text(text, collect_visuals(messages), spans, world=world, known=known or {})

    def _check_text(self, messages: Sequence[dict[str, Any]]) -> None:
        """Refuses text that would be read as a placeholder or as the structure of a turn."""
        tokenizer = self.tokenizer
        reserved = {*WORLD_TOKENS, tokenizer.boi_token, tokenizer.eoi_token, tokenizer.image_token}
        reserved |= {"<start_of_turn>", "<end_of_turn>"}
        for message in messages:
            content = message["content"]
            texts = [content] if isinstance(content, str) else [str(part.get("text") or "") for part in content]
            for text in texts:
                if found := sorted(token for token in reserved if token in text):
                    raise ValueError(f"the text contains the reserved token {found[0]}: {text[:80]!r}")

    def _encode_text(
        self,
        text: str,
        visuals: Sequence[Visual],
        spans: Sequence[tuple[int, int]] = (),
        *,
        world: bool = True,
        known: KnownEncodings = MappingProxyType({}),
    ) -> EncodedSample:
        """Tokenises rendered text piece by piece, so that supervision and visual blocks fall on exact tokens."""
        world = world and self.enable_world
        marker = self.tokenizer.boi_token
        if text.count(marker) != len(visuals):
            raise ValueError(
                f"the text has places for {text.count(marker)} images or clips, but {len(visuals)} were given"
            )
        pieces: list[tuple[list[int], bool]] = []
        used = 0
        for part, supervised in _split_at(text, spans):
            expanded, number = self._expand(part, visuals[used : used + part.count(marker)], world)
            used += number
            pieces.append((self.tokenizer(expanded, add_special_tokens=False)["input_ids"], supervised))
        input_ids = torch.tensor([token for ids, _ in pieces for token in ids], dtype=torch.int64)
        flags = [flag for ids, flag in pieces for _ in ids]
        loaded = [visual for visual in visuals if not is_blank(visual)]
        images: Sequence[Image.Image] = [present_of(visual) for visual in loaded]
        image_states, images = look_up(known.get(Component.VISION_TOWER), images, lambda image: [image])
        world_latents, clips = look_up_latents(known, loaded if world else ())
        pixel_values = None
        if images:
            pixel_values = torch.as_tensor(np.stack(self.image_processor(images, return_tensors=None)["pixel_values"]))
        return EncodedSample(
            input_ids=input_ids,
            token_type_ids=(input_ids == self.tokenizer.image_token_id).long(),
            supervised=torch.tensor(flags, dtype=torch.bool),
            indivisible=self._indivisible(input_ids),
            pixel_values=pixel_values,
            world_frames=tuple(self._fit_frames(visual) for visual in clips),
            world_tokens=sum(self._num_world_tokens(visual) for visual in visuals) if world else 0,
            image_states=image_states,
            world_latents=world_latents,
            world_offsets=tuple(offset_of(visual) for visual in visuals) if world else (),
        )

    def _expand(self, text: str, visuals: Sequence[Visual], world: bool) -> tuple[str, int]:
        """Writes the world and image blocks of each visual in the place of its marker."""
        blocks = iter(self._block(visual, world) for visual in visuals)
        return re.sub(re.escape(self.tokenizer.boi_token), lambda _: next(blocks), text), len(visuals)

    def _block(self, visual: Visual, world: bool) -> str:
        block = ""
        if world:
            block = START_OF_WORLD + WORLD * self._num_world_tokens(visual) + END_OF_WORLD
        return block + str(self.full_image_sequence)

    def _num_world_tokens(self, visual: Visual) -> int:
        return self._world_tokens_of(num_frames(visual))

    def _world_tokens_of(self, frames: int) -> int:
        layout: Any = self.world_tokens
        return world_tokens(layout, self.world_resolution, self.world_latent_channels, frames, pool=self.world_pool)

    def _indivisible(self, input_ids: Tensor) -> Tensor:
        ids = [self.tokenizer.boi_token_id, self.tokenizer.image_token_id, self.tokenizer.eoi_token_id]
        if self.enable_world:
            ids += self.tokenizer.convert_tokens_to_ids(list(WORLD_TOKENS))
        return torch.isin(input_ids, torch.tensor(ids))

    def _fit_frames(self, visual: Visual) -> Tensor:
        """Returns the frames of an image or clip as `(frames, 3, resolution, resolution)` in [-1, 1]."""
        side, rule = self.world_resolution, self.world_resize
        return frames_to_pixels([fit_frame(frame, side, rule) for frame in frames_of(visual)])

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """Returns the text of generated tokens, without those that end a turn or fill a row."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()

    # -- the idioms of transformers ---------------------------------------------------------------------------------

    def __call__(
        self,
        images: Images = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encodes rendered text, one `<start_of_image>` marker for each image or clip.

        Args:
            images: An image, a list of images for a single text, or for each text a list whose items are images or
                clips (lists of images), as in `[[clip]]`.
            text: A text or a list of them.
            **kwargs: `padding_side` (`left` by default, as generation needs it).

        Returns:
            The keyword arguments of the model's `forward` and `generate`, as tensors.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        nested = nest_visuals(images, len(texts))
        samples = [self._encode_text(item, visuals) for item, visuals in zip(texts, nested, strict=True)]
        return self._collate(samples, kwargs.get("padding_side", "left"))

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Sequence[Any], chat_template: str | None = None, **kwargs: Any
    ) -> Any:  # noqa: ANN401 (text or tensors, as asked for)
        """Renders conversations; with `tokenize=True` and `return_dict=True` the result feeds `forward` and `generate`.

        Args:
            conversation: One conversation or a list of them; visual parts hold loaded images.
            chat_template: Another template, for rendering to text alone.
            **kwargs: `tokenize`, `add_generation_prompt`, `padding_side`, `known` as of `encode`, which knows all
                world blocks or none; the rest as in transformers.

        Returns:
            The rendered text, or a `BatchFeature`.
        """
        if not kwargs.get("tokenize", False) or chat_template is not None:
            return super().apply_chat_template(list(conversation), chat_template, **kwargs)
        batch = [conversation] if isinstance(conversation[0], dict) else conversation
        prompt = bool(kwargs.get("add_generation_prompt", False))
        known = kwargs.get("known")
        samples = [self.encode(messages, add_generation_prompt=prompt, known=known) for messages in batch]
        return self._collate(samples, kwargs.get("padding_side", "left"))

    def _collate(self, samples: Sequence[EncodedSample], padding_side: str) -> BatchFeature:
        ids = pad_sequences([sample.input_ids for sample in samples], self.pad_token_id, padding_side)
        ones = [torch.ones_like(sample.input_ids) for sample in samples]
        data: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": pad_sequences(ones, 0, padding_side),
            "token_type_ids": pad_sequences([sample.token_type_ids for sample in samples], 0, padding_side),
        }
        pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
        if pixels:
            data["pixel_values"] = torch.cat(pixels)
        frames = [block for sample in samples for block in sample.world_frames]
        if frames:
            data["world_frames"] = torch.cat(frames)
            data["world_frame_counts"] = torch.tensor([len(block) for block in frames])
        latents = [block for sample in samples for block in sample.world_latents if block is not None]
        if latents:
            if frames:
                raise ValueError("the latents of some world blocks are known, and those of others are not")
            data["world_latents"] = torch.cat(latents)
            data["world_frame_counts"] = torch.tensor([clip_frames(len(block)) for block in latents])
        if frames or latents:
            data["world_offsets"] = torch.tensor([offset for sample in samples for offset in sample.world_offsets])
        return BatchFeature(data)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that the processor makes."""
        world = ["world_frames", "world_frame_counts", "world_offsets", "world_latents"] if self.enable_world else []
        return [*super().model_input_names, *world]


def pad_sequences(sequences: Sequence[Tensor], value: int, side: str) -> Tensor:
    """Stacks one-dimensional tensors, filling the shorter ones with `value` on `side` (`left` or `right`)."""
    longest = max(len(sequence) for sequence in sequences)
    result = sequences[0].new_full((len(sequences), longest), value)
    for row, sequence in zip(result, sequences, strict=True):
        if side == "left":
            row[longest - len(sequence) :] = sequence
        else:
            row[: len(sequence)] = sequence
    return result


def fit_frame(frame: Image.Image, side: int, rule: str) -> Image.Image:
    """Fits a frame to a square.

    Args:
        frame: An image of any size and mode.
        side: Side of the square in pixels.
        rule: `pad` (whole frame, black bars), `crop` (centre, no bars) or `stretch` (changes the aspect ratio).

    Returns:
        An RGB image of `side` x `side`.
    """
    frame = frame if frame.mode == "RGB" else frame.convert("RGB")
    if frame.size == (side, side):
        return frame
    if rule == "stretch":
        return frame.resize((side, side), Image.Resampling.BICUBIC)
    width, height = frame.size
    choose = min if rule == "pad" else max
    ratio = choose(side / width, side / height)
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    resized = frame.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    return resized.crop((left, top, left + side, top + side))


def frames_to_pixels(frames: Sequence[Image.Image]) -> Tensor:
    """Returns RGB frames of one size as `(frames, 3, height, width)` in [-1, 1]."""
    arrays = np.stack([np.asarray(frame) for frame in frames])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def _split_at(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Cuts text at the spans of generated text; empty pieces are left out."""
    pieces, position = [], 0
    for start, end in spans:
        pieces += [(text[position:start], False), (text[start:end], True)]
        position = end
    pieces.append((text[position:], False))
    return [(piece, flag) for piece, flag in pieces if piece]


__all__ = ["TheWorldProcessor"]
