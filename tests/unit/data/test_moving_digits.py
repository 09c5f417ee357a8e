"""moving-digits: what the clip tells, and what its last frame does not."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from theworld_train.config.sources import MovingDigitsSource
from theworld_train.data.moving_digits import DIRECTIONS, MovingDigits
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
