"""moving-digits: real handwritten digits that move over a canvas, a data set that needs no download.

The scans are scikit-learn's copy of the UCI optical recognition set (1,797 scans of 8 x 8 pixels). A clip wraps around
the canvas's edges and ends with the digit whole, at a place that does not depend on the direction: its last frame tells
nothing of the motion. The vision tower sees that frame alone, and only the world path sees the clip.
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
from theworld_train.config.sources import MovingDigitsSource
from theworld_train.data.source import Finding, Sample

#: Direction of the motion and its step in (x, y) pixels; y grows downwards.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
#: Questions by kind.
QUESTIONS: dict[str, str] = {"direction": "Which way does it move?", "digit": "Which digit is it?"}
#: Words of all questions and answers, single tokens of the tiny tokenizer.
WORDS: tuple[str, ...] = (
    *sorted({word for question in QUESTIONS.values() for word in question.split()}),
    *DIRECTIONS,
    *"0123456789",
    "user",
    "model",
)
#: Share of the scans, at the end of the set, that only the held-out split uses.
HELD_OUT_SHARE = 0.2
#: Side of a digit as a share of the canvas.
DIGIT_SHARE = 0.5


@cache
def _scans() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns all scans `(1797, 8, 8)` with values 0 to 255, and their digits."""
    bunch = load_digits()
    return (bunch.images * (255 / 16)).astype(np.uint8), bunch.target


class MovingDigits:
    """Clips of a moving digit with one question each; every sample is a function of the seed and its index."""

    def __init__(self, config: MovingDigitsSource) -> None:
        """Args: config: split, number of samples, geometry and questions."""
        self._config = config
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
        return self._sample(index, lambda *_: Blank(self._config.frames))

    def _sample(self, index: int, render: Callable[[int, str, NDArray[np.int64]], object]) -> Sample:
        config = self._config
        kind = config.questions[index % len(config.questions)]
        # The two splits draw from different streams, so that an index never gives the same clip in both.
        draw = np.random.default_rng([config.seed, index, config.split == "eval"])
        scan = int(draw.integers(self._first, self._last))
        direction = list(DIRECTIONS)[int(draw.integers(len(DIRECTIONS)))]
        places = (config.canvas - round(config.canvas * DIGIT_SHARE)) // config.grid + 1
        frames = render(scan, direction, config.grid * draw.integers(0, places, size=2))
        world = kind == "direction" or draw.random() >= config.plain_share
        user: list[dict[str, Any]] = [{"type": "video", "video": frames}, {"type": "text", "text": QUESTIONS[kind]}]
        answer = direction if kind == "direction" else str(_scans()[1][scan])
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return Sample(id=f"moving-digits-{config.split}-{index}", kind=kind, messages=messages, world=world)

    def _clip(self, scan: int, direction: str, last: NDArray[np.int64]) -> list[Image.Image]:
        """Returns the frames, drawn back in time from a last frame that shows the digit whole at a place (x, y)."""
        config = self._config
        side = round(config.canvas * DIGIT_SHARE)
        glyph = np.asarray(Image.fromarray(_scans()[0][scan]).resize((side, side), Image.Resampling.BILINEAR))
        canvas = np.zeros((config.canvas, config.canvas), np.uint8)
        canvas[:side, :side] = glyph
        step_x, step_y = DIRECTIONS[direction]
        frames = []
        for back in range(config.frames - 1, -1, -1):
            shift = (int(last[1]) - back * config.speed * step_y, int(last[0]) - back * config.speed * step_x)
            frame = np.roll(canvas, shift, axis=(0, 1))
            frames.append(Image.fromarray(np.repeat(frame[..., None], 3, axis=2)))
        return frames
