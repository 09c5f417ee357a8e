"""Turns samples into padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from theworld_train.batch import IGNORE_INDEX, Batch, EncodedSample, Encoder
from theworld_train.data.budget import fit_to_budget
from theworld_train.data.source import Sample, UnreadableSampleError


class Collator:
    """Encodes samples, fits them to the longest allowed sequence and pads them to one length.

    Labels are made here and nowhere else, from the positions that the encoder marks as supervised.
    """

    def __init__(self, encoder: Encoder, max_length: int, padding_side: Literal["left", "right"] = "right") -> None:
        """Creates a collator.

        Args:
            encoder: Turns conversations into tokens and pixels.
            max_length: Tokens that a sample may have, image and world tokens included.
            padding_side: Side on which shorter samples are padded.
        """
        self.encoder = encoder
        self.max_length = max_length
        self.padding_side = padding_side

    def encode(self, sample: Sample) -> EncodedSample | None:
        """Encodes one sample; returns None if it does not fit or would have nothing to learn from.

        Raises:
            UnreadableSampleError: If the encoder refuses it, such as text with a reserved token.
        """
        try:
            encoded = self.encoder.encode(sample.messages, world=sample.world)
        except ValueError as error:
            raise UnreadableSampleError(sample.id, str(error)) from error
        return self.fit(encoded)

    def fit(self, encoded: EncodedSample) -> EncodedSample | None:
        """Cuts an encoded sample to the longest allowed sequence; returns None if that cannot be done."""
        return fit_to_budget(encoded, self.max_length)

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """Encodes and collates samples that are known to fit.

        Raises:
            ValueError: If one does not fit; the message names it.
        """
        pairs = []
        for sample in samples:
            encoded = self.encode(sample)
            if encoded is None:
                raise ValueError(f"sample {sample.id} does not fit {self.max_length} tokens with an answer left")
            pairs.append((sample, encoded))
        return self.collate(pairs)

    def collate(self, pairs: Sequence[tuple[Sample, EncodedSample]]) -> Batch:
        """Pads encoded samples to the longest of them.

        Args:
            pairs: Samples and what `encode` made of them; at least one.
        """
        samples, encoded = zip(*pairs, strict=True)
        pixel_values = [item.pixel_values for item in encoded if item.pixel_values is not None]
        world_frames = [frames for item in encoded for frames in item.world_frames]
        labels = [item.input_ids.masked_fill(~item.supervised, IGNORE_INDEX) for item in encoded]
        return Batch(
            input_ids=self._pad([item.input_ids for item in encoded], self.encoder.pad_token_id),
            attention_mask=self._pad([torch.ones_like(item.input_ids) for item in encoded], 0),
            token_type_ids=self._pad([item.token_type_ids for item in encoded], 0),
            labels=self._pad(labels, IGNORE_INDEX),
            pixel_values=torch.cat(pixel_values) if pixel_values else None,
            world_frames=torch.cat(world_frames) if world_frames else None,
            world_frame_counts=tuple(frames.shape[0] for frames in world_frames),
            sample_ids=tuple(sample.id for sample in samples),
            kinds=tuple(sample.kind for sample in samples),
        )

    def _pad(self, rows: Sequence[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(rows), batch_first=True, padding_value=value, padding_side=self.padding_side
        )
