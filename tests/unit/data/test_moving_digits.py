"""moving-digits: what the clip tells, and what its last frame does not."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from theworld_train.batch import Blank
from theworld_train.config.sources import MovingDigitsSource, WorldFrames
from theworld_train.data.moving_digits import COLUMNS, DIRECTIONS, ROWS, MovingDigits
from theworld_train.data.source import Sample


def digits(split: str = "train", samples: int = 400, **fields: object) -> MovingDigits:
    """A data set of moving digits."""
    return MovingDigits(
        MovingDigitsSource.model_validate({"source": "moving_digits", "split": split, "samples": samples, **fields})
    )


def clip(sample: Sample) -> np.ndarray:
    """The clip of a sample as `(frames, height, width)`."""
    return np.stack([np.asarray(frame)[..., 0] for frame in sample.messages[0]["content"][0]["video"]])


def answer(sample: Sample) -> str:
    """The answer of a sample."""
    return str(sample.messages[1]["content"][0]["text"])


def test_the_clip_moves_in_the_direction_of_the_answer() -> None:
    for sample in (digits(questions=("direction",))[index] for index in range(40)):
        frames = clip(sample)
        step_x, step_y = DIRECTIONS[answer(sample)]
        for earlier, later in pairwise(frames):
            assert np.array_equal(np.roll(earlier, (6 * step_y, 6 * step_x), axis=(0, 1)), later)


def test_the_last_frame_does_not_tell_the_direction() -> None:
    places: Counter[tuple[object, ...]] = Counter()
    for sample in (digits(questions=("direction",), samples=2000)[index] for index in range(2000)):
        rows, columns = np.nonzero(clip(sample)[-1])
        places[answer(sample), rows.min() // 16, columns.min() // 16] += 1
    for place in {key[1:] for key in places}:
        shares = np.array([places[(direction, *place)] for direction in DIRECTIONS], float)
        if shares.sum() > 100:
            assert (shares / shares.sum()).max() < 0.4


def test_the_last_frame_shows_the_whole_digit_on_the_grid() -> None:
    for sample in (digits()[index] for index in range(40)):
        last = clip(sample)[-1]
        rows, columns = np.nonzero(last)
        assert rows.max() - rows.min() < 32
        assert columns.max() - columns.min() < 32


def test_held_out_scans_never_appear_in_training() -> None:
    train = {clip(digits()[index])[-1].max(0).tobytes() for index in range(400)}
    held_out = {clip(digits("eval")[index])[-1].max(0).tobytes() for index in range(400)}
    assert not train & held_out


def test_samples_are_functions_of_seed_and_index() -> None:
    first, second = digits()[7], digits()[7]
    assert np.array_equal(clip(first), clip(second))
    assert answer(first) == answer(second)
    assert not np.array_equal(clip(digits(seed=1)[7]), clip(first))


def test_questions_and_classes_are_balanced() -> None:
    samples = [digits(samples=800)[index] for index in range(800)]
    assert Counter(sample.kind for sample in samples) == {"direction": 400, "digit": 400}
    directions = Counter(answer(sample) for sample in samples if sample.kind == "direction")
    assert min(directions.values()) > 70


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_plain_share_takes_world_tokens_from_digit_questions_alone(share: float) -> None:
    samples = [digits(plain_share=share)[index] for index in range(400)]
    assert all(sample.world for sample in samples if sample.kind == "direction")
    plain = [not sample.world for sample in samples if sample.kind == "digit"]
    assert abs(sum(plain) / len(plain) - share) < 0.1


# -- moments ----------------------------------------------------------------------------------------------------------

#: Nine places for a digit, and 8 frames in which it moves from each to a neighbour.
NEXT = {"questions": ("where_next",), "canvas": 24, "digit": 8, "grid": 8, "speed": 1, "later_frames": 8}


def seen(frames: str, steps: int | None = None, index: int = 0, **fields: Any) -> Sample:
    """A sample that shows other moments."""
    source = MovingDigitsSource.model_validate({"source": "moving_digits", "split": "train", "samples": 400, **fields})
    return MovingDigits(source, WorldFrames.model_validate({"frames": frames, "steps": steps}))[index]


def test_where_next_is_the_ninth_that_the_digit_is_in_at_last() -> None:
    answers = Counter()
    for index in range(200):
        sample = seen("future", index=index, **NEXT)
        last = clip(sample)[-1]
        row, column = (int(axis.mean()) // 8 for axis in np.nonzero(last))
        assert answer(sample) == f"{ROWS[row]} {COLUMNS[column]}"
        answers[answer(sample)] += 1
    assert len(answers) == 9
    assert sample.messages[0]["content"][1]["text"] == "Where will it be after 8 frames?"


def test_the_present_does_not_tell_where_next() -> None:
    places: dict[bytes, Counter[str]] = {}
    for index in range(2000):
        sample = seen("image", index=index, **NEXT | {"samples": 2000})
        (present,) = clip(sample)
        rows, columns = np.nonzero(present)
        place = bytes([rows.min() // 8, columns.min() // 8])
        places.setdefault(place, Counter())[answer(sample)] += 1
    assert len(places) == 9
    for found in places.values():
        assert len(found) == 4
        assert max(found.values()) / found.total() < 0.4


@pytest.mark.parametrize("steps", [None, 1, 2])
def test_every_choice_of_frames_has_the_same_present_and_answer(steps: int | None) -> None:
    for index in range(8):
        image, history, future = (
            seen(frames, None if frames == "image" else steps, index, **NEXT)
            for frames in ("image", "history", "future")
        )
        assert len({answer(sample) for sample in (image, history, future)}) == 1
        assert len(clip(image)) == 1
        assert len(clip(history)) == len(clip(future)) == 1 + 4 * (steps or 2)
        assert "present" not in history.messages[0]["content"][0]
        assert future.messages[0]["content"][0]["present"] == 0
        assert np.array_equal(clip(image)[0], clip(history)[-1])
        assert np.array_equal(clip(image)[0], clip(future)[0])
        assert not np.array_equal(clip(history)[0], clip(future)[-1])


def test_blank_clips_have_as_many_frames() -> None:
    for frames, steps, expected in (("image", None, 1), ("history", 1, 5), ("future", 2, 9), ("history", 0, 1)):
        source = MovingDigitsSource.model_validate({"source": "moving_digits", "split": "train", "samples": 4, **NEXT})
        data = MovingDigits(source, WorldFrames.model_validate({"frames": frames, "steps": steps}))
        assert data.outline(0).messages[0]["content"][0]["video"] == Blank(expected)
        assert len(clip(data[0])) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"later_frames": 0}, "needs later_frames"),
        ({"later_frames": 6}, "must be 4k"),
        ({"speed": 6}, r"another third of the canvas.*speed x later_frames is 48 pixels on a canvas of 24"),
        ({"digit": 25}, "must not exceed the canvas of 24"),
    ],
)
def test_a_question_that_the_present_answers_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        seen("image", **NEXT | fields)
