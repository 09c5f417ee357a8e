"""Rows in the formats of others, turned into our own: pure functions of one row.

Each returns a row that `parse_row` takes. What is wrong with it is told in the words of its own format, so a format
also says which of its fields our fields were made of.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image

from theworld_train.config.errors import Problem, did_you_mean

#: What stands in a text for the next of the row's media.
PLACEHOLDER = re.compile("<(image|video)>")
#: Who speaks, in the names of LLaVA and ShareGPT.
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass
class Adapted:
    """A row in our format.

    Attributes:
        row: The row; of no use if there are problems.
        keys: Beginnings of our keys, such as `messages[0].content`, and what they are called in the row's own format.
        problems: What has no counterpart in our format, by the keys of the row's own.
        retouch: What is done to each image of the row once it is loaded.
    """

    row: dict[str, Any]
    keys: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    retouch: Callable[[Image.Image], Image.Image] | None = None

    def own_key(self, key: str) -> str:
        """Returns what one of our keys is called in the row's own format."""
        for ours in sorted(self.keys, key=len, reverse=True):
            if key == ours or key.startswith((f"{ours}.", f"{ours}[")):
                return self.keys[ours] + key[len(ours) :]
        return key


#: Turns a row, given with its number, into ours.
Format = Callable[[dict[str, Any], int], Adapted]


def own_format(row: dict[str, Any], index: int) -> Adapted:
    """Returns a row of our own format as it is."""
    return Adapted(row)


@dataclass(frozen=True)
class ChatFormat:
    """Conversations of `from` and `value`, in whose texts `<image>` and `<video>` stand for media, each in their order.

    LLaVA's data names them in `image` and `video`, a path or a list; ShareGPT's, in `images` and `videos`. Turns of the
    assistant before the first of the user are left out, as the loaders of both do. Their ids are not taken over: the
    published files use the same one for several rows.

    Attributes:
        images: Field of the images.
        videos: Field of the videos.
    """

    images: str
    videos: str

    def __call__(self, row: dict[str, Any], index: int) -> Adapted:
        """Adapts a row."""
        adapted = Adapted({"messages": [], "images": [], "videos": []}, {"messages": "conversations"})
        if row.get("system"):
            adapted.keys |= {"messages[0]": "system", "messages[0].content": "system"}
            adapted.row["messages"].append({"role": "system", "content": row["system"]})
        turns = row.get("conversations")
        if not isinstance(turns, list) or not turns:
            message = "expected a list of turns with 'from' and 'value'"
            hint = None if "conversations" in row else did_you_mean("conversations", list(row))
            adapted.problems.append(Problem(message, key="conversations", value=turns, hint=hint))
            return adapted
        media = {"image": _MediaOf(row, self.images), "video": _MediaOf(row, self.videos)}
        for number, turn in enumerate(turns):
            self._turn(turn, f"conversations[{number}]", media, adapted)
        if not adapted.problems:
            adapted.problems += [problem for of in media.values() for problem in of.left_over()]
        return adapted

    def _turn(self, turn: object, key: str, media: dict[str, _MediaOf], adapted: Adapted) -> None:
        if not isinstance(turn, dict):
            adapted.problems.append(Problem("a turn must be an object with 'from' and 'value'", key=key, value=turn))
            return
        speaker, text = turn.get("from"), turn.get("value")
        role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            hint = did_you_mean(speaker, list(SPEAKERS)) if isinstance(speaker, str) else None
            adapted.problems.append(Problem("unknown speaker", key=f"{key}.from", value=speaker, hint=hint))
        if not isinstance(text, str):
            adapted.problems.append(Problem("expected a text", key=f"{key}.value", value=text))
        messages = adapted.row["messages"]
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            return
        ours = f"messages[{len(messages)}]"
        adapted.keys |= {ours: key, f"{ours}.role": f"{key}.from", f"{ours}.content": f"{key}.value"}
        if isinstance(text, str):
            messages.append({"role": role, "content": self._content(text, f"{key}.value", ours, media, adapted)})

    def _content(
        self, text: str, key: str, ours: str, media: dict[str, _MediaOf], adapted: Adapted
    ) -> str | list[dict[str, Any]]:
        pieces = PLACEHOLDER.split(text)
        if len(pieces) == 1:
            return text
        parts: list[dict[str, Any]] = []
        for number, piece in enumerate(pieces):
            if number % 2 == 0:
                parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
                continue
            # LLaVA's rows with a video ask for it as an image, too.
            kind = "image" if piece == "image" and media["image"].remain else "video"
            if not media[kind].remain:
                message = f"the text asks for more media than the row's '{media[piece].field}' holds"
                adapted.problems.append(Problem(message, key=key, value=text))
                continue
            name, value = media[kind].take()
            entries = adapted.row[f"{kind}s"]
            adapted.keys[f"{kind}s[{len(entries)}]"] = name
            entries.append(value)
            parts.append({"type": kind})
        return parts


class _MediaOf:
    """The media that a field of a row holds, handed out one by one."""

    def __init__(self, row: dict[str, Any], name: str) -> None:
        self.field = name
        value = row.get(name)
        self._is_list = isinstance(value, list)
        self._values: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
        self._taken = 0

    @property
    def remain(self) -> bool:
        """Whether there is one left."""
        return self._taken < len(self._values)

    def take(self) -> tuple[str, Any]:
        """Returns the key and the value of the next one."""
        self._taken += 1
        return self._key(self._taken - 1), self._values[self._taken - 1]

    def left_over(self) -> list[Problem]:
        """Returns a problem if no text asks for some of them."""
        if not self.remain:
            return []
        message = f"the row's texts ask for {self._taken} of {len(self._values)}"
        return [Problem(message, key=self._key(self._taken), hint="write <image> or <video> where it belongs")]

    def _key(self, index: int) -> str:
        return f"{self.field}[{index}]" if self._is_list else self.field


LLAVA = ChatFormat("image", "video")
SHAREGPT = ChatFormat("images", "videos")


@dataclass(frozen=True)
class CaptionFormat:
    """An image and its caption.

    Attributes:
        image: Field of the image.
        caption: Field of the caption.
        questions: What the user asks, taken in turn.
        medium: Whether it is an image or a clip after all.
    """

    image: str
    caption: str
    questions: Sequence[str]
    medium: Literal["image", "video"] = "image"

    def __call__(self, row: dict[str, Any], index: int) -> Adapted:
        """Adapts a row."""
        question = self.questions[index % len(self.questions)]
        adapted = _exchange(row, self.image, question, row.get(self.caption), self.medium)
        adapted.keys["messages[1].content"] = self.caption
        caption = row.get(self.caption)
        if not isinstance(caption, str) or not caption.strip():
            hint = None if self.caption in row else did_you_mean(self.caption, list(row))
            adapted.problems.append(Problem("expected a caption", key=self.caption, value=caption, hint=hint))
        return adapted


@dataclass(frozen=True)
class VsrFormat:
    """A statement about an image and its label, 1 if it is true; the kind of a sample is the relation that it states.

    Attributes:
        question: What the user asks, with `{caption}` for the statement.
    """

    question: str

    def __call__(self, row: dict[str, Any], index: int) -> Adapted:
        """Adapts a row."""
        caption, label = row.get("caption"), row.get("label")
        question = self.question.replace("{caption}", str(caption))
        adapted = _exchange(row, "image", question, "true" if label else "false")
        adapted.row["kind"] = row.get("relation")
        adapted.keys["kind"] = "relation"
        if not isinstance(caption, str) or not caption.strip():
            adapted.problems.append(Problem("expected a statement", key="caption", value=caption))
        if label not in (0, 1):
            message = "expected 1 for a true statement or 0 for a false one"
            adapted.problems.append(Problem(message, key="label", value=label))
        return adapted


def _exchange(row: dict[str, Any], image: str, question: str, answer: object, medium: str = "image") -> Adapted:
    """Returns one question about the image or clip of a row, and its answer."""
    turns = [
        {"role": "user", "content": [{"type": medium}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": answer},
    ]
    adapted = Adapted({"messages": turns, f"{medium}s": [row.get(image)]}, {f"{medium}s[0]": image})
    if row.get(image) is None:
        hint = None if image in row else did_you_mean(image, list(row))
        adapted.problems.append(Problem("the row names no image", key=image, hint=hint))
    return adapted
