"""The values that data and model exchange: one encoded sample, and a batch of them.

Both sides import this module and neither imports the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
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
        pixel_values: `(images, 3, height, width)` float32 for the vision tower, of the images that are not known.
        world_frames: a `(frames, 3, height, width)` float32 tensor in [-1, 1] for each world block that is not known,
            in order.
        world_tokens: Tokens of world blocks, their brackets not counted.
        trimmed: Tokens that were cut off at its end.
        image_states: for each image its `(1, patches, vision hidden size)` if it is known, or None; empty if images
            have not been looked up.
        world_latents: for each world block its `(latent frames, channels, height / 8, width / 8)`, likewise.
        world_offsets: for each world block, known or not, the offset of its first latent frame from the present.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    supervised: Tensor
    indivisible: Tensor
    pixel_values: Tensor | None
    world_frames: tuple[Tensor, ...] = ()
    world_tokens: int = 0
    trimmed: int = 0
    image_states: tuple[Tensor | None, ...] = ()
    world_latents: tuple[Tensor | None, ...] = ()
    world_offsets: tuple[int, ...] = ()


class Known(Protocol):
    """What a frozen encoder has made of images and clips before, each of them encoded alone."""

    def find(self, frames: Sequence[Image.Image], prompt: str = "") -> Tensor | None:
        """Returns what it made of an image (one frame) or clip, by a prompt if it takes one; None if not known."""
        ...


#: Kind of what is known of an image's future: its own latent frame, and those that have been generated from it.
ROLLOUT = "rollout"
#: What is known, by frozen encoder, and of futures; one that is absent is not looked up.
KnownEncodings = Mapping[str, Known]


class Encoder(Protocol):
    """Turns a conversation into tokens and pixels; the processor of the model implements it."""

    @property
    def pad_token_id(self) -> int:
        """Id that fills a batch's shorter samples."""
        ...

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        world: bool = True,
        known: KnownEncodings | None = None,
    ) -> EncodedSample:
        """Encodes one conversation in the chat template's format, visual parts loaded.

        With a `Blank` in the place of each image and clip, the tokens are the same and there are no pixels.

        Args:
            messages: The conversation.
            add_generation_prompt: Whether to end with the opening of an assistant turn.
            world: Whether to write world blocks.
            known: Handed on in the place of pixels.
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
        pixel_values: `(images, 3, height, width)` float32 over all samples in order, but for images that are known; or
            None without any.
        world_frames: `(frames, 3, height, width)` float32 in [-1, 1], the frames of all world blocks in order, but for
            blocks that are known; or None without any.
        world_frame_counts: number of frames of each world block, known or not.
        world_offsets: offset of the first latent frame of each world block from the present; if empty, every block ends
            in the present.
        sample_ids: id of each sample.
        kinds: kind of question of each sample, for metrics by kind.
        position_ids: `(batch, sequence)` int64, where rows hold several samples: of each token in its own one.
        image_states: `(known images, patches, vision hidden size)`, what the vision tower has made of them before.
        images_known: of each image, whether it is known; empty if images have not been looked up. Those that have been
            and are not known are encoded one by one, as the others were.
        world_latents: `(latent frames of known blocks, channels, height / 8, width / 8)`, likewise.
        blocks_known: of each world block, likewise.
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
    image_states: Tensor | None = None
    images_known: tuple[bool, ...] = ()
    world_latents: Tensor | None = None
    blocks_known: tuple[bool, ...] = ()
    world_offsets: tuple[int, ...] = ()

    @property
    def num_images(self) -> int:
        """Number of images, known or not."""
        return len(self.images_known) or (0 if self.pixel_values is None else self.pixel_values.shape[0])

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

    def flatten(self) -> FlatBatch:
        """Returns the batch with its tensors laid into one."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: value.contiguous() for name, value in fields.items() if isinstance(value, Tensor)}
        places: dict[str, _Place] = {}
        end = 0
        for name, tensor in tensors.items():
            places[name] = _Place(end, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        data = torch.empty(end, dtype=torch.uint8)
        for name, tensor in tensors.items():
            places[name].part_of(data).copy_(tensor)
        return FlatBatch(data, places, {name: value for name, value in fields.items() if name not in tensors})


#: Bytes at whose multiples the tensors of a flat batch begin.
_ALIGNMENT = 64


class _Place(NamedTuple):
    """Where a tensor lies in a flat batch."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def part_of(self, data: Tensor) -> Tensor:
        return data[self.start : self.start + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class FlatBatch:
    """A batch whose tensors lie in one: between processes each costs about a millisecond, however small.

    Attributes:
        data: `(bytes,)` uint8.
        places: Where each tensor lies in it, by field.
        rest: The other fields.
    """

    data: Tensor
    places: dict[str, _Place]
    rest: dict[str, Any]

    def batch(self) -> Batch:
        """Returns the batch; its tensors are views."""
        fields: dict[str, Any] = {name: place.part_of(self.data) for name, place in self.places.items()}
        return Batch(**fields, **self.rest)

    def pin_memory(self) -> FlatBatch:
        """Returns the batch in page-locked memory; called by the data loader."""
        return dataclasses.replace(self, data=self.data.pin_memory())
