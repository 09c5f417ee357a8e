"""What a sample asks, and which answer is expected of it."""

from __future__ import annotations

from typing import Any

import torch

from theworld_train.batch import Blank, EncodedSample
from theworld_train.data import MediaPart, Question, Sample, question_of
from theworld_train.data.loader import _last_question


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


SAMPLE = Sample(
    "two-turns",
    "all",
    [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [{"type": "image", "image": Blank()}, text(" What is it? ")]},
        {"role": "assistant", "content": [text("A cup.\n")]},
        {"role": "user", "content": [text("And here?"), {"type": "video", "video": Blank(5)}]},
        {"role": "assistant", "content": [text("It falls.")]},
    ],
)
FIRST = Question("What is it?", "A cup.", (MediaPart("image", 1, 0),))
LAST = Question("And here?", "It falls.", (MediaPart("image", 1, 0), MediaPart("video", 3, 1)))


def test_the_last_turn_is_asked_and_shows_all_before_it():
    assert question_of(SAMPLE) == LAST
    assert question_of(SAMPLE, 0) == FIRST


def encoded(*supervised: int) -> EncodedSample:
    places = torch.tensor(supervised, dtype=torch.bool)
    return EncodedSample(
        input_ids=torch.arange(len(places)),
        token_type_ids=torch.zeros(len(places), dtype=torch.long),
        supervised=places,
        indivisible=torch.zeros(len(places), dtype=torch.bool),
        pixel_values=None,
    )


def test_a_turn_that_was_cut_off_is_not_the_one_that_is_asked():
    assert _last_question(SAMPLE, encoded(0, 0, 1, 1, 0, 0, 1, 1)) == LAST
    assert _last_question(SAMPLE, encoded(0, 0, 1, 1, 0, 0, 1)) == LAST
    assert _last_question(SAMPLE, encoded(0, 0, 1, 1, 0)) == FIRST
