"""Drawn examples of the data format: coloured squares that move, with a question on each clip and its first frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO

from PIL import Image

#: Side of the canvas and of the square, and how far it moves between two frames, in pixels.
CANVAS, SQUARE, STEP = 64, 16, 6
FRAMES = 5
COLOURS = {"red": (214, 40, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "yellow": (240, 200, 20)}
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
#: Where the square ends, along the axis that it does not move on: the held-out clips have another place.
PLACES = {"train": 16, "eval": 32}


def example_files() -> Iterator[tuple[str, bytes]]:
    """Yields the files of the examples: their paths in the project, and what they hold."""
    for split, place in PLACES.items():
        rows: list[dict[str, object]] = []
        for colour, rgb in COLOURS.items():
            for way, (dx, dy) in WAYS.items():
                clip = f"clips/{colour}-{way}" + ("" if split == "train" else "-eval")
                for index in range(FRAMES):
                    yield f"data/{clip}/{index}.png", _frame(rgb, place, dx, dy, index - FRAMES + 1)
                rows.append(_row("direction", {"type": "video", "path": clip}, "Which way does the square move?", way))
                first = {"type": "image", "path": f"{clip}/0.png"}
                rows.append(_row("colour", first, "Which colour is the square?", colour))
        yield f"data/{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()


def _row(kind: str, medium: dict[str, str], question: str, answer: str) -> dict[str, object]:
    asked = {"role": "user", "content": [medium, {"type": "text", "text": question}]}
    return {"kind": kind, "messages": [asked, {"role": "assistant", "content": answer}]}


def _frame(rgb: tuple[int, int, int], place: int, dx: int, dy: int, steps: int) -> bytes:
    """Draws the square some steps before it has come to its end, in the middle of the axis that it moves on."""
    middle = (CANVAS - SQUARE) // 2
    left = (middle if dx else place) + steps * STEP * dx
    top = (middle if dy else place) + steps * STEP * dy
    image = Image.new("RGB", (CANVAS, CANVAS), (30, 30, 30))
    image.paste(rgb, (left, top, left + SQUARE, top + SQUARE))
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
