"""Conversations about regions of an image, in the format of SpatialRGPT's OpenSpatialDataset.

A question names a region by `<mask> <depth>`, the n-th of a row standing for the n-th entry of `bbox` and `rle`; the
answer calls the regions of its question `Region [0]`, `Region [1]` and so on, anew in every turn. A region comes back
in several turns, as another entry with the same box. Here each box has one number throughout the conversation, so that
text and picture agree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont

from theworld_train.config.errors import Problem
from theworld_train.data.formats import LLAVA, SPEAKERS, Adapted
from theworld_train.data.source import MediaError

#: Left, top, right and bottom, in pixels.
Box = tuple[float, float, float, float]

MASK = re.compile(r"<mask>(?:\s*<depth>)?")
MENTION = re.compile(r"\bRegion \[(\d+)\]")
#: Coordinates in a text are thousandths of the image's width and height.
TEXT_SCALE = 1000
#: Colours of outlines, in turn: told apart from each other, and from most of what is photographed.
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45")
#: Thickness of an outline, and height of its number, as shares of the image's shorter side.
OUTLINE_SHARE, NUMBER_SHARE = 1 / 200, 1 / 24


@dataclass(frozen=True)
class RegionFormat:
    """Turns such a row into a conversation about one image.

    Attributes:
        regions: `draw`: every region is outlined and numbered in the image; `text`: its box stands behind its name.
    """

    regions: Literal["draw", "text"]

    def __call__(self, row: dict[str, Any], index: int) -> Adapted:
        """Adapts a row."""
        problems: list[Problem] = []
        image = _image(row, problems)
        boxes = _boxes(row, problems)
        size = _size(row, problems)
        if self.regions == "text" and size is None and not problems:
            message = "regions: text needs the size of the image, which the masks tell"
            problems.append(Problem(message, key="rle", hint="use regions: draw"))
        chat = row.get("conversations")
        masks = sum(len(MASK.findall(turn["value"])) for turn in _turns(chat) if not _is_answer(turn))
        if masks != len(boxes) and _turns(chat) and not problems:
            message = f"{len(boxes)} boxes for {masks} <mask>: every <mask> has its own"
            problems.append(Problem(message, key="bbox"))
        if problems:
            return Adapted({}, problems=problems)
        numbers = {box: number for number, box in enumerate(dict.fromkeys(boxes))}
        names = [f"Region [{numbers[box]}]" for box in boxes]
        texts = names
        if self.regions == "text" and size is not None:
            texts = [f"{name} {_coordinates(box, size)}" for name, box in zip(names, boxes, strict=True)]
        chat = _Renaming(names, texts).rename(chat, problems)
        adapted = LLAVA({"conversations": chat, "image": image}, index)
        adapted.keys["images[0]"] = "filename"
        adapted.problems = problems or [replace(p, key="filename") if p.key == "image" else p for p in adapted.problems]
        if self.regions == "draw" and numbers:
            adapted.retouch = partial(draw_regions, boxes=tuple(numbers), size=size)
        return adapted


class _Renaming:
    """Gives the regions in a conversation's texts their names, from the first to the last."""

    def __init__(self, names: Sequence[str], texts: Sequence[str]) -> None:
        """Args: names: of each `<mask>`, for answers; texts: what each `<mask>` is replaced by."""
        self._names = names
        self._texts = texts
        self._asked: Sequence[str] = ()
        self._used = 0

    def rename(self, conversation: object, problems: list[Problem]) -> object:
        """Returns the conversation with names in its texts; what is no conversation comes back as it is."""
        if not isinstance(conversation, list):
            return conversation
        return [
            self._turn(turn, f"conversations[{number}].value", problems) if _has_text(turn) else turn
            for number, turn in enumerate(conversation)
        ]

    def _turn(self, turn: dict[str, Any], key: str, problems: list[Problem]) -> dict[str, Any]:
        text: str = turn["value"]
        if not _is_answer(turn):
            first = self._used
            text = MASK.sub(self._next, text)
            self._asked = self._names[first : self._used]
            return {**turn, "value": text}
        for mention in MENTION.finditer(text):
            if int(mention[1]) >= len(self._asked):
                message = f"the answer speaks of {mention[0]}, and its question names {len(self._asked)} regions"
                problems.append(Problem(message, key=key))
                return turn
        return {**turn, "value": MENTION.sub(lambda mention: self._asked[int(mention[1])], text)}

    def _next(self, _: re.Match[str]) -> str:
        self._used += 1
        return self._texts[self._used - 1]


def _turns(conversation: object) -> list[dict[str, Any]]:
    """Returns the turns of a conversation that have a text."""
    return [turn for turn in conversation if _has_text(turn)] if isinstance(conversation, list) else []


def _has_text(turn: object) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("value"), str)


def _is_answer(turn: dict[str, Any]) -> bool:
    return SPEAKERS.get(str(turn.get("from"))) == "assistant"


def draw_regions(image: Image.Image, boxes: Sequence[Box], size: tuple[int, int] | None) -> Image.Image:
    """Returns a copy of an image with an outline around each box, and its number, from 0, in the outline's corner.

    Args:
        image: The image, in RGB.
        boxes: Boxes in the pixels of an image of `size`.
        size: Height and width that the boxes refer to; those of the image if None.

    Raises:
        MediaError: If the image has another shape, or a box lies outside of it.
    """
    height, width = size or (image.height, image.width)
    scale_x, scale_y = image.width / width, image.height / height
    # A copy of another size has the same shape but for the rounding of its sides.
    if abs(scale_x * height - image.height) > 2 * max(scale_x, 1):
        shape = f"{image.width} x {image.height}"
        raise MediaError(f"the image has {shape} pixels, and its regions are of one of {width} x {height}")
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    side = min(image.size)
    thickness = max(1, round(side * OUTLINE_SHARE))
    font = ImageFont.load_default(max(8, round(side * NUMBER_SHARE)))
    labels: list[Box] = []
    for number, (left, top, right, bottom) in enumerate(boxes):
        box = (
            max(left * scale_x, 0),
            max(top * scale_y, 0),
            min(right * scale_x, image.width - 1),
            min(bottom * scale_y, image.height - 1),
        )
        if box[0] > box[2] or box[1] > box[3]:
            raise MediaError(f"region {number} is outside of the image of {image.width} x {image.height} pixels")
        color = COLORS[number % len(COLORS)]
        draw.rectangle(box, outline=color, width=thickness)
        x, y, width_of_text, height_of_text = draw.textbbox((0, 0), str(number), font=font)
        label = _free_corner(box, (width_of_text - x + 4, height_of_text - y + 4), image.size, labels)
        labels.append(label)
        draw.rectangle(label, fill=color)
        draw.text((label[0] + 2 - x, label[1] + 2 - y), str(number), fill="white", font=font)
    return drawn


def _free_corner(box: Box, label: tuple[float, float], image: tuple[int, int], taken: Sequence[Box]) -> Box:
    """Returns where the label of a box goes: into the first of its corners that no other label covers."""
    width, height = label
    corners = [
        (max(min(x, image[0] - width), 0), max(min(y, image[1] - height), 0))
        for y in (box[1], box[3] - height)
        for x in (box[0], box[2] - width)
    ]
    places = [(x, y, x + width, y + height) for x, y in corners]
    free = (place for place in places if not any(_overlap(place, other) for other in taken))
    return next(free, places[0])


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _image(row: dict[str, Any], problems: list[Problem]) -> str | None:
    name = row.get("filename")
    if not isinstance(name, str) or not name:
        problems.append(Problem("the row names no image", key="filename", value=name))
        return None
    # Open Images calls its files by their ids and .jpg, and the rows name the ids.
    return name if PurePosixPath(name).suffix else f"{name}.jpg"


def _boxes(row: dict[str, Any], problems: list[Problem]) -> list[Box]:
    boxes = row.get("bbox")
    if not isinstance(boxes, list):
        problems.append(Problem("expected a list of boxes", key="bbox", value=boxes))
        return []
    found = []
    for number, box in enumerate(boxes):
        if (
            isinstance(box, list)
            and len(box) == 4
            and all(map(_is_finite, box))
            and box[0] <= box[2]
            and box[1] <= box[3]
        ):
            found.append((box[0], box[1], box[2], box[3]))
        else:
            message = "expected a box of four numbers: left, top, right and bottom"
            problems.append(Problem(message, key=f"bbox[{number}]", value=box))
    return found


def _size(row: dict[str, Any], problems: list[Problem]) -> tuple[int, int] | None:
    """Returns the height and width that the masks of a row have, if it has any."""
    masks = row.get("rle")
    if not masks:
        return None
    size = masks[0].get("size") if isinstance(masks, list) and isinstance(masks[0], dict) else None
    if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
        return size[0], size[1]
    problems.append(Problem("expected the height and the width of a mask", key="rle[0].size", value=size))
    return None


def _coordinates(box: Box, size: tuple[int, int]) -> str:
    height, width = size
    shares = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
    return "({}, {}, {}, {})".format(*(round(min(max(share, 0), 1) * TEXT_SCALE) for share in shares))


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
