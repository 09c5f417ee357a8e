"""Turns samples into padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from theworld_train.accounting.tokens import clip_frames
from theworld_train.batch import IGNORE_INDEX, Batch, EncodedSample, Encoder, KnownEncodings
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import TooLong
from theworld_train.data.budget import fit_to_budget
from theworld_train.data.source import Sample, UnreadableSampleError

#: A sample, and what its collator made of it.
Encoded = tuple[Sample, EncodedSample]


class Collator:
    """Encodes samples, fits them to the longest allowed sequence and pads rows of them to one length.

    Labels are made here and nowhere else, from the positions that the encoder marks as supervised.
    """

    def __init__(
        self,
        encoder: Encoder,
        max_length: int,
        padding_side: Literal["left", "right"] = "right",
        *,
        too_long: TooLong = "trim-text",
        known: KnownEncodings | None = None,
    ) -> None:
        """Creates a collator.

        Args:
            encoder: Turns conversations into tokens and pixels.
            max_length: Tokens that a sample may have, image and world tokens included.
            padding_side: Side on which shorter samples are padded.
            too_long: What becomes of a longer one; see `data.too_long`.
            known: What frozen encoders have made of images and clips before.
        """
        self.too_long = too_long
        self.encoder = encoder
        self.max_length = max_length
        self.padding_side = padding_side
        self.known = known

    def knowing(self, known: KnownEncodings | None) -> Collator:
        """Returns a collator that hands on what frozen encoders have made before."""
        return Collator(self.encoder, self.max_length, self.padding_side, too_long=self.too_long, known=known)

    def encode(self, sample: Sample) -> EncodedSample | None:
        """Encodes one sample; returns None if it does not fit or would have nothing to learn from.

        Raises:
            UnreadableSampleError: If the encoder refuses it, such as text with a reserved token.
            ConfigError: If it is longer than allowed and `too_long` is `error`.
        """
        encoded = self.encode_whole(sample)
        length = encoded.input_ids.shape[0]
        if self.too_long == "error" and length > self.max_length:
            message = f"has {length:,} tokens, and data.max_sequence_length allows {self.max_length:,}"
            hint = "raise it, or set data.too_long to trim-text or drop"
            raise ConfigError(Problem(message, source=sample.id, key="data.too_long", value="error", hint=hint))
        return self.fit(encoded)

    def encode_whole(self, sample: Sample) -> EncodedSample:
        """Encodes one sample, however long it is.

        Raises:
            UnreadableSampleError: If the encoder refuses it.
        """
        try:
            return self.encoder.encode(sample.messages, world=sample.world, known=self.known)
        except ValueError as error:
            raise UnreadableSampleError(sample.id, str(error)) from error

    def fit(self, encoded: EncodedSample) -> EncodedSample | None:
        """Cuts an encoded sample to the longest allowed sequence; returns None if that cannot or shall not be done."""
        if self.too_long != "trim-text" and encoded.input_ids.shape[0] > self.max_length:
            return None
        return fit_to_budget(encoded, self.max_length)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Encodes and collates samples that are known to fit.

        Raises:
            ValueError: If one does not fit; the message names it.
        """
        rows: list[list[Encoded]] = []
        for sample in samples:
            encoded = self.encode(sample)
            if encoded is None:
                raise ValueError(f"sample {sample.id} does not fit {self.max_length} tokens with an answer left")
            rows.append([(sample, encoded)])
        return self.collate(rows)

    def collate(self, rows: Sequence[Sequence[Encoded]]) -> Batch:
        """Pads rows of encoded samples to the longest of them.

        Args:
            rows: Of each row its samples, and what `encode` made of them; at least one row of at least one sample.
        """
        pairs = [pair for row in rows for pair in row]
        samples, encoded = zip(*pairs, strict=True)
        pixel_values = [item.pixel_values for item in encoded if item.pixel_values is not None]
        world_frames = [frames for item in encoded for frames in item.world_frames]
        image_states = [states for item in encoded for states in item.image_states]
        world_latents = [latents for item in encoded for latents in item.world_latents]
        known_images = [states for states in image_states if states is not None]
        known_blocks = [latents for latents in world_latents if latents is not None]
        packed = len(pairs) > len(rows)
        return Batch(
            input_ids=self._pad(rows, lambda item, _: item.input_ids, self.encoder.pad_token_id),
            attention_mask=self._pad(rows, lambda item, place: torch.full_like(item.input_ids, place + 1), 0),
            token_type_ids=self._pad(rows, lambda item, _: item.token_type_ids, 0),
            labels=self._pad(rows, _labels, IGNORE_INDEX),
            pixel_values=torch.cat(pixel_values) if pixel_values else None,
            world_frames=torch.cat(world_frames) if world_frames else None,
            world_frame_counts=_frame_counts(world_frames, world_latents),
            sample_ids=tuple(sample.id for sample in samples),
            kinds=tuple(sample.kind for sample in samples),
            position_ids=self._pad(rows, lambda item, _: torch.arange(len(item.input_ids)), 0) if packed else None,
            image_states=torch.cat(known_images) if known_images else None,
            images_known=tuple(states is not None for states in image_states),
            world_latents=torch.cat(known_blocks) if known_blocks else None,
            blocks_known=tuple(latents is not None for latents in world_latents),
            world_offsets=tuple(offset for item in encoded for offset in item.world_offsets),
        )

    def _pad(
        self, rows: Sequence[Sequence[Encoded]], values: Callable[[EncodedSample, int], Tensor], padding: int
    ) -> Tensor:
        """Returns `(rows, longest)` of what each sample has in its place of its row."""
        joined = [torch.cat([values(item, place) for place, (_, item) in enumerate(row)]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(
            joined, batch_first=True, padding_value=padding, padding_side=self.padding_side
        )


def _labels(item: EncodedSample, place: int) -> Tensor:
    """Returns the tokens to predict; what a row's later samples begin with is none, as the one before precedes it."""
    labels = item.input_ids.masked_fill(~item.supervised, IGNORE_INDEX)
    if place:
        labels[0] = IGNORE_INDEX
    return labels


def _frame_counts(unknown: Sequence[Tensor], latents: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Returns the frames of each world block.

    Args:
        unknown: The frames of the blocks that are not known.
        latents: For each block what is known of it, or None; empty if blocks have not been looked up.
    """
    if not latents:
        return tuple(frames.shape[0] for frames in unknown)
    rest = iter(unknown)
    return tuple(next(rest).shape[0] if known is None else clip_frames(known.shape[0]) for known in latents)
