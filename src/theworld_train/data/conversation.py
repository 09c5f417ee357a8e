"""One data row, parsed and checked without touching its media.

A row is `{"messages": [...], "images": [...], "videos": [...], "id": ..., "kind": ..., "world": ...}`, of which only
`messages` is required. Fields that are null count as absent, as `datasets` fills the fields that a part does not use
with nulls; further fields of a row are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from theworld_train.config.errors import Problem, did_you_mean
from theworld_train.data.source import DEFAULT_KIND

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "image", "video")
PART_FIELDS = {
    "text": ("type", "text"),
    "image": ("type", "path", "index"),
    "video": ("type", "path", "frames", "index"),
}


@dataclass(frozen=True)
class TextPart:
    """Text of a message."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image of a message: a path, or a position among the row's `images`."""

    path: str | None
    index: int | None
    key: str


@dataclass(frozen=True)
class VideoPart:
    """A clip of a message: a path, of a video file or a directory; frames; or a position among the row's `videos`."""

    path: str | None
    frames: tuple[str, ...]
    key: str
    index: int | None = None


Part = TextPart | ImagePart | VideoPart


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """A row whose structure is right.

    Attributes:
        id: The row's own id, if it has one.
        kind: Group of the sample.
        messages: The turns.
        images: The entries of the row's `images`, in whatever form the source stores them.
        world: Whether its visual parts have world tokens.
        videos: The entries of the row's `videos`, likewise.
    """

    id: str | None
    kind: str
    messages: tuple[Message, ...]
    images: tuple[Any, ...]
    world: bool = True
    videos: tuple[Any, ...] = ()

    def media(self) -> list[ImagePart | VideoPart]:
        """Returns the image and video parts in their order."""
        return [part for message in self.messages for part in message.parts if not isinstance(part, TextPart)]


def parse_row(row: object, source: str) -> tuple[Conversation | None, list[Problem]]:
    """Parses one row.

    Args:
        row: The decoded row.
        source: Names the row in problems, such as `data.jsonl:17`.

    Returns:
        The conversation, or None if anything is wrong with it, and every problem found.
    """
    parser = _RowParser(source)
    conversation = parser.parse(row)
    return (None if parser.problems else conversation), parser.problems


class _RowParser:
    """Walks one row and collects its problems."""

    def __init__(self, source: str) -> None:
        self.problems: list[Problem] = []
        self._source = source
        #: Of images and of videos: the row's entries, which of them are used, and the one that comes next.
        self._listed: dict[str, tuple[Any, ...]] = {}
        self._used: dict[str, set[int]] = {"image": set(), "video": set()}
        self._next = {"image": 0, "video": 0}

    def parse(self, row: object) -> Conversation | None:
        if not isinstance(row, dict):
            self._report(None, "a row must be an object with the field 'messages'", row)
            return None
        row = _without_nulls(row)
        for kind in self._next:
            entries = row.get(f"{kind}s", [])
            if not isinstance(entries, list):
                self._report(f"{kind}s", f"{kind}s must be a list", entries)
                return None
            self._listed[kind] = tuple(entries)
        messages = self._messages(row)
        if messages and all(message.role for message in messages):
            self._check_turns(messages)
        if not self.problems:
            self._check_all_used()
        images, videos = self._listed["image"], self._listed["video"]
        return Conversation(self._id(row), self._kind(row), messages, images, self._world(row), videos)

    def _report(self, key: str | None, message: str, value: object = None, hint: str | None = None) -> None:
        self.problems.append(Problem(message, source=self._source, key=key, value=shown(value), hint=hint))

    def _id(self, row: dict[str, Any]) -> str | None:
        value = row.get("id")
        if value is None or _is_index(value) or (isinstance(value, str) and value):
            return None if value is None else str(value)
        self._report("id", "id must be a string or a whole number", value)
        return None

    def _world(self, row: dict[str, Any]) -> bool:
        value = row.get("world", True)
        if not isinstance(value, bool):
            self._report("world", "world must be true or false", value)
        return bool(value)

    def _kind(self, row: dict[str, Any]) -> str:
        value = row.get("kind", DEFAULT_KIND)
        if isinstance(value, str) and value:
            return value
        self._report("kind", "kind must be a string", value)
        return DEFAULT_KIND

    def _messages(self, row: dict[str, Any]) -> tuple[Message, ...]:
        if "messages" not in row:
            hint = "source: llava and source: sharegpt read 'conversations'" if "conversations" in row else None
            self._report("messages", "the row has no 'messages'", hint=hint or did_you_mean("messages", list(row)))
            return ()
        messages = row["messages"]
        if not isinstance(messages, list) or not messages:
            self._report("messages", "messages must be a list of at least one user and one assistant turn", messages)
            return ()
        return tuple(self._message(message, f"messages[{index}]") for index, message in enumerate(messages))

    def _message(self, message: object, key: str) -> Message:
        if not isinstance(message, dict):
            self._report(key, "a message must be an object with 'role' and 'content'", message)
            return Message("", ())
        message = _without_nulls(message)
        before = len(self.problems)
        self._check_fields(message, ("role", "content"), key)
        role = message.get("role")
        if role not in ROLES:
            hint = did_you_mean(role, ROLES) if isinstance(role, str) else "add a 'role'"
            self._report(f"{key}.role", "unknown role", role, hint)
            role = ""
        parts = self._content(message.get("content"), f"{key}.content")
        if len(self.problems) == before:
            self._check_content(str(role), parts, f"{key}.content")
        return Message(str(role), parts)

    def _content(self, content: object, key: str) -> tuple[Part, ...]:
        if isinstance(content, str):
            return (TextPart(content),)
        if not isinstance(content, list):
            self._report(key, "content must be a string or a list of parts", content)
            return ()
        parts = [self._part(part, f"{key}[{index}]") for index, part in enumerate(content)]
        return tuple(part for part in parts if part is not None)

    def _part(self, part: object, key: str) -> Part | None:
        if not isinstance(part, dict):
            self._report(key, "a part must be an object with a 'type'", part, 'write {"type": "text", "text": ...}')
            return None
        part = _without_nulls(part)
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in PART_TYPES:
            hint = did_you_mean(kind, PART_TYPES) if isinstance(kind, str) else f"known: {', '.join(PART_TYPES)}"
            self._report(f"{key}.type", "unknown part type", kind, hint)
            return None
        if not self._check_fields(part, PART_FIELDS[kind], key):
            return None
        parsers: dict[str, Callable[[dict[str, Any], str], Part | None]] = {
            "text": self._text,
            "image": self._image,
            "video": self._video,
        }
        return parsers[kind](part, key)

    def _check_fields(self, value: dict[str, Any], known: Sequence[str], key: str) -> bool:
        unknown = [field for field in value if field not in known]
        for field in unknown:
            self._report(f"{key}.{field}", "unknown field", value[field], did_you_mean(str(field), known))
        return not unknown

    def _text(self, part: dict[str, Any], key: str) -> Part | None:
        text = part.get("text")
        if isinstance(text, str):
            return TextPart(text)
        self._report(f"{key}.text", "a text part needs a string 'text'", text)
        return None

    def _image(self, part: dict[str, Any], key: str) -> Part | None:
        path, index = part.get("path"), part.get("index")
        if path is not None and index is not None:
            self._report(key, "an image part has either 'path' or 'index'", hint="remove one of them")
            return None
        if path is not None:
            return ImagePart(path, None, f"{key}.path") if self._is_path(path, f"{key}.path") else None
        index = self._of_row("image", index, key)
        return None if index is None else ImagePart(None, index, f"images[{index}]")

    def _of_row(self, kind: str, index: object, key: str) -> int | None:
        """Returns which of the row's images or videos a part asks for; without an index, the next one."""
        index = self._next[kind] if index is None else index
        if not _is_index(index):
            self._report(f"{key}.index", "index must be a whole number from 0", index)
            return None
        assert isinstance(index, int)
        self._next[kind] = index + 1
        there = len(self._listed[kind])
        if index >= there:
            message = f"the part asks for {kind} {index} of the row, whose '{kind}s' holds {there}"
            others = "'path'" if kind == "image" else "'path' or 'frames'"
            self._report(key, message, hint=f"add it to '{kind}s', or give the part a {others}")
            return None
        self._used[kind].add(index)
        return index

    def _video(self, part: dict[str, Any], key: str) -> Part | None:
        path, frames, index = part.get("path"), part.get("frames"), part.get("index")
        if sum(value is not None for value in (path, frames, index)) > 1:
            self._report(key, "a video part has one of 'path', 'frames' and 'index'", hint="remove the others")
            return None
        if path is None and frames is None:
            index = self._of_row("video", index, key)
            return None if index is None else VideoPart(None, (), f"videos[{index}]", index)
        if path is not None:
            return VideoPart(path, (), f"{key}.path") if self._is_path(path, f"{key}.path") else None
        if not isinstance(frames, list) or not frames:
            self._report(f"{key}.frames", "frames must be a list of at least one path", frames)
            return None
        right = [self._is_path(frame, f"{key}.frames[{index}]") for index, frame in enumerate(frames)]
        return VideoPart(None, tuple(frames), f"{key}.frames") if all(right) else None

    def _is_path(self, path: object, key: str) -> bool:
        if isinstance(path, str) and path:
            return True
        self._report(key, "a path must be a string that is not empty", path)
        return False

    def _check_content(self, role: str, parts: tuple[Part, ...], key: str) -> None:
        media = [part for part in parts if not isinstance(part, TextPart)]
        if not media and not any(part.text.strip() for part in parts if isinstance(part, TextPart)):
            self._report(key, "the content is empty", hint="give it text, or remove the message")
        if media and role != "user":
            self._report(key, f"the {role} turn holds media, which only user turns can", hint="move it to a user turn")
        elif role == "system" and len(parts) > 1:
            self._report(key, "a system message is a single text", hint="join its parts")

    def _check_turns(self, messages: tuple[Message, ...]) -> None:
        roles = [message.role for message in messages]
        first = 1 if roles[0] == "system" else 0
        for index, role in enumerate(roles[first:]):
            expected = ROLES[1 + index % 2]
            if role != expected:
                message = f"expected a turn of the {expected}, since user and assistant alternate, the user first"
                hint = "an optional system message comes first" if role == "system" else "merge or reorder the turns"
                self._report(f"messages[{first + index}].role", message, role, hint)
                return
        if "assistant" not in roles:
            self._report("messages", "no assistant turn with text: a data row without an answer", hint="add the answer")

    def _check_all_used(self) -> None:
        for kind, entries in self._listed.items():
            unused = [str(index) for index in range(len(entries)) if index not in self._used[kind]]
            if unused:
                message = f"{kind}s listed but unused: {', '.join(unused)}"
                hint = f'add a part {{"type": "{kind}"}} where each belongs, or remove them'
                self._report(f"{kind}s", message, hint=hint)


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in value.items() if item is not None}


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def shown(value: object) -> object | None:
    """Returns a value as a problem may show it: a row may hold whole images."""
    if value is None or (isinstance(value, str | int | float) and len(str(value)) <= 80):
        return value
    return repr(value)[:77] + "..." if len(repr(value)) > 80 else value
