"""The values that data and model exchange: one encoded sample, and a batch of them.

Both sides import this module and neither imports the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

#: Label of positions that are not supervised, as in PyTorch's cross entropy.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Blank:
    """Stands for an image or a clip whose pixels nobody needs.

    Attributes:
        frames: Frames of the clip; 1 for an image.
    """

    frames: int = 1


@dataclass(frozen=True)
class EncodedSample:
    """One conversation as the model sees it, before padding.

    Attributes:
        input_ids: `(sequence,)` int64, placeholders expanded to their exact number.
        token_type_ids: `(sequence,)` int64, 1 at image tokens and 0 elsewhere.
        supervised: `(sequence,)` bool, the tokens that the model has to predict.
        indivisible: `(sequence,)` bool, tokens of image and world blocks, which are never cut.
        pixel_values: `(images, 3, height, width)` float32 for the vision tower.
        world_frames: a `(frames, 3, height, width)` float32 tensor in [-1, 1] for each world block, in order.
        world_tokens: Tokens of world blocks, their brackets not counted.
        trimmed: Tokens that were cut off at its end.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    supervised: Tensor
    indivisible: Tensor
    pixel_values: Tensor | None
    world_frames: tuple[Tensor, ...] = ()
    world_tokens: int = 0
    trimmed: int = 0


class Encoder(Protocol):
    """Turns a conversation into tokens and pixels; the processor of the model implements it."""

    @property
    def pad_token_id(self) -> int:
        """Id that fills a batch's shorter samples."""
        ...

    def encode(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool = False, world: bool = True
    ) -> EncodedSample:
        """Encodes one conversation in the chat template's format, visual parts loaded; `world` writes world blocks.

        With a `Blank` in the place of each image and clip, the tokens are the same and there are no pixels.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length; a row is a sample, or several that do not see each other.

    Attributes:
        input_ids: `(batch, sequence)` int64.
        attention_mask: `(batch, sequence)` int64, at real tokens the number of their sample in its row, from 1; 0 at
            padding.
        token_type_ids: `(batch, sequence)` int64, 1 at image tokens.
        labels: `(batch, sequence)` int64, the token itself where supervised and `IGNORE_INDEX` elsewhere.
        pixel_values: `(images, 3, height, width)` float32 over all samples in order, or None without images.
        world_frames: `(frames, 3, height, width)` float32 in [-1, 1], all world blocks in order, or None without.
        world_frame_counts: number of frames of each world block; the blocks' frames lie one after the other.
        sample_ids: id of each sample.
        kinds: kind of question of each sample, for metrics by kind.
        position_ids: `(batch, sequence)` int64, where rows hold several samples: of each token in its own one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    world_frames: Tensor | None
    world_frame_counts: tuple[int, ...]
    sample_ids: tuple[str, ...]
    kinds: tuple[str, ...]
    position_ids: Tensor | None = None

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens; the first position has no predecessor to predict it and is never one."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int((self.attention_mask > 0).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Batch:
        """Returns the batch with its tensors in page-locked memory; called by the data loader."""
        pinned: dict[str, Any] = {
            field.name: value.pin_memory()
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **pinned)
