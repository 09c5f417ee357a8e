"""Batches pad what they must, supervise what they may, and keep pixels in the order of their tokens."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from PIL import Image

from theworld_train.batch import IGNORE_INDEX, Encoder
from theworld_train.data import Collator, Sample

IMAGE = {"type": "image", "image": Image.new("RGB", (2, 2))}
CLIP = {"type": "video", "video": [Image.new("RGB", (2, 2))] * 5}


def sample(name: str, question: str, answer: str, *media: dict[str, Any]) -> Sample:
    user = {"role": "user", "content": [*media, {"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return Sample(name, f"kind-{name}", [user, assistant])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(encoder: Encoder, side: Literal["left", "right"]) -> None:
    batch = Collator(encoder, 100, side)([sample("x", "qqq", "a"), sample("y", "q", "b")])
    pad = slice(0, 2) if side == "left" else slice(2, 4)
    real = slice(2, 4) if side == "left" else slice(0, 2)
    assert batch.input_ids.shape == (2, 4)
    assert batch.input_ids[1, pad].tolist() == [7, 7]
    assert batch.input_ids[1, real].tolist() == [ord("q"), ord("b")]
    assert batch.attention_mask[1, pad].tolist() == [0, 0]
    assert batch.attention_mask.sum(1).tolist() == [4, 2]
    assert batch.labels[1, pad].tolist() == [IGNORE_INDEX] * 2
    assert batch.token_type_ids[1, pad].tolist() == [0, 0]
    assert batch.sample_ids == ("x", "y")
    assert batch.kinds == ("kind-x", "kind-y")
    assert all(
        t.dtype == torch.int64 for t in (batch.input_ids, batch.attention_mask, batch.labels, batch.token_type_ids)
    )


def test_only_supervised_tokens_are_labels(encoder: Encoder) -> None:
    batch = Collator(encoder, 100)([sample("x", "ab", "ab", IMAGE)])
    assert batch.labels.tolist() == [[IGNORE_INDEX] * 6 + [ord("a"), ord("b")]]
    assert batch.num_supervised == 2


def test_a_padding_token_inside_a_sample_stays_a_label(encoder: Encoder) -> None:
    batch = Collator(encoder, 100)([sample("x", "q", "\x07a"), sample("y", "qqqqq", "b")])
    assert batch.labels[0].tolist() == [IGNORE_INDEX, 7, ord("a"), *[IGNORE_INDEX] * 3]
    assert batch.attention_mask[0].tolist() == [1, 1, 1, 0, 0, 0]


def test_token_type_ids_are_there_with_and_without_images(encoder: Encoder) -> None:
    batch = Collator(encoder, 100)([sample("x", "q", "a", IMAGE), sample("y", "q", "a")])
    assert batch.token_type_ids.tolist() == [[1, 1, 1, 1, 0, 0], [0] * 6]
    assert Collator(encoder, 100)([sample("y", "q", "a")]).token_type_ids.tolist() == [[0, 0]]


def test_pixels_and_frames_lie_in_the_order_of_samples_and_blocks(encoder: Encoder) -> None:
    batch = Collator(encoder, 100)(
        [sample("x", "q", "a", CLIP, IMAGE), sample("t", "q", "a"), sample("y", "q", "a", CLIP)]
    )
    assert batch.pixel_values is not None
    assert batch.pixel_values[:, 0, 0, 0].tolist() == [4.0, 8.0, 4.0]
    assert batch.world_frame_counts == (5, 1, 5)
    assert batch.world_frames is not None
    assert batch.world_frames.shape == (11, 3, 8, 8)


def test_a_batch_of_text_has_no_pixels(encoder: Encoder) -> None:
    batch = Collator(encoder, 100)([sample("x", "q", "a")])
    assert batch.pixel_values is None
    assert batch.world_frames is None
    assert batch.world_frame_counts == ()


def test_long_samples_are_cut_and_those_that_cannot_be_are_named(encoder: Encoder) -> None:
    collator = Collator(encoder, 4)
    assert collator([sample("x", "q", "aaaaaaa")]).input_ids.shape == (1, 4)
    with pytest.raises(ValueError, match="sample y does not fit 4 tokens"):
        collator([sample("y", "q", "a", IMAGE)])
