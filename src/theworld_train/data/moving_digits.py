"""moving-digits: real handwritten digits that move over a canvas, a data set that needs no download.

The scans are scikit-learn's copy of the UCI optical recognition set (1,797 scans of 8 x 8 pixels). A clip wraps around
the canvas's edges and shows the digit whole in the present, at a place that does not depend on the direction: this one
frame tells nothing of the motion. The vision tower sees it alone, and only the world path sees the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from theworld_train.batch import Blank
from theworld_train.config.sources import AS_GIVEN, MovingDigitsSource, WorldFrames
from theworld_train.data.source import Finding, Sample
from theworld_train.data.video import Timing, select_frames

#: Direction of the motion and its step in (x, y) pixels; y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
#: Questions by kind.
QUESTIONS: dict[str, str] = {
    "direction": "Which way does it move?",
    "digit": "Which digit is it?",
    "where_next": "Where will it be after {later_frames} frames?",
}
#: Words for the thirds of the canvas.
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
#: Words of the first two questions and their answers, single tokens of the tiny tokenizer; it spells all others.
WORDS: tuple[str, ...] = (
    *sorted({word for kind in ("direction", "digit") for word in QUESTIONS[kind].split()}),
    *DIRECTIONS,
    *"0123456789",
    "user",
    "model",
)
#: Share of the scans, at the end of the set, that only the held-out split uses.
HELD_OUT_SHARE = 0.2


@cache
def _scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns all scans `(1797, 8, 8)` with values 0 to 255, and their digits."""
    bunch = load_digits()
    return (bunch.images * (255 / 16)).astype(np.uint8), bunch.target


class MovingDigits:
    """Clips of a moving digit with one question each; every sample is a function of the seed and its index."""

    def __init__(self, config: MovingDigitsSource, world: WorldFrames = AS_GIVEN) -> None:
        """Takes what is generated.

        Args:
            config: Split, number of samples, geometry and questions.
            world: Which frames of a clip a sample holds.
        """
        self._config = config
        total = config.frames + config.later_frames
        timing = Timing(present=(config.frames - 1) / max(1, total - 1), later=world.wants_later, exact=world.is_exact)
        most = world.taken(1 + config.later_frames if timing.later else config.frames)
        #: Frames that a sample holds, by their distance from the present.
        self._moments = [index - (config.frames - 1) for index in select_frames(total, most, timing)]
        self._stated = {"present": 0} if timing.later else {}
        scans, _ = _scans()
        first_held_out = round(len(scans) * (1 - HELD_OUT_SHARE))
        self._first, self._last = (0, first_held_out) if config.split == "train" else (first_held_out, len(scans))

    def __len__(self) -> int:
        """Returns the number of samples."""
        return self._config.samples

    def check(self) -> Iterator[Finding]:
        """Finds nothing: generated samples are whole."""
        return iter(())

    def __getitem__(self, index: int) -> Sample:
        """Returns the sample at `index`: a clip, its question and the answer."""
        return self._sample(index, self._clip)

    def outline(self, index: int) -> Sample:
        """Returns the sample at `index` with a blank clip."""
        return self._sample(index, lambda *_: Blank(len(self._moments)))

    def _sample(self, index: int, render: Callable[[int, str, NDArray[np.int64]], object]) -> Sample:
        config = self._config
        kind = config.questions[index % len(config.questions)]
        # The two splits draw from different streams, so that an index never gives the same clip in both.
        draw = np.random.default_rng([config.seed, index, config.split == "eval"])
        scan = int(draw.integers(self._first, self._last))
        direction = list(DIRECTIONS)[int(draw.integers(len(DIRECTIONS)))]
        place = config.grid * draw.integers(0, len(config.places), size=2)
        frames = render(scan, direction, place)
        world = kind != "digit" or draw.random() >= config.plain_share
        question = QUESTIONS[kind].format(later_frames=config.later_frames)
        user: list[dict[str, Any]] = [
            {"type": "video", "video": frames, **self._stated},
            {"type": "text", "text": question},
        ]
        answers = {"direction": direction, "digit": str(_scans()[1][scan]), "where_next": self._ninth(direction, place)}
        answer = answers[kind]
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return Sample(id=f"moving-digits-{config.split}-{index}", kind=kind, messages=messages, world=world)

    def _ninth(self, direction: str, place: NDArray[np.int64]) -> str:
        """Returns the words for where the digit's centre is in the last frame, given its place in the present."""
        config = self._config
        moved = config.speed * config.later_frames
        column, row = (
            config.third(int(at) + moved * step) for at, step in zip(place, DIRECTIONS[direction], strict=True)
        )
        return f"{ROWS[row]} {COLUMNS[column]}"

    def _clip(self, scan: int, direction: str, place: NDArray[np.int64]) -> list[Image.Image]:
        """Returns the frames, drawn from a present that shows the digit whole at a place (x, y)."""
        config = self._config
        side = config.digit_side
        glyph = np.asarray(Image.fromarray(_scans()[0][scan]).resize((side, side), Image.Resampling.BILINEAR))
        canvas = np.zeros((config.canvas, config.canvas), np.uint8)
        canvas[:side, :side] = glyph
        step_x, step_y = DIRECTIONS[direction]
        frames = []
        for moment in self._moments:
            shift = (int(place[1]) + moment * config.speed * step_y, int(place[0]) + moment * config.speed * step_x)
            frame = np.roll(canvas, shift, axis=(0, 1))
            frames.append(Image.fromarray(np.repeat(frame[..., None], 3, axis=2)))
        return frames
