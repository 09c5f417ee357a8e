"""The rows that are prepared: conversations whose images are URLs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from theworld_train.config.errors import Problem
from theworld_train.data.conversation import Conversation, ImagePart, TextPart, shown
from theworld_train.data.conversations import parse_stored, renamed
from theworld_train.data.formats import Adapted, Format
from theworld_train.data.rows import Rows


@dataclass(frozen=True)
class Row:
    """A conversation whose images are still to be had.

    Attributes:
        id: Its id; its file and place if it has none of its own.
        kind: Group of the sample.
        world: Whether its visual parts have world tokens.
        messages: The turns in our own format, each content a list of parts; image parts hold an index into `urls`.
        urls: The different URLs of its images, in their order.
    """

    id: str
    kind: str
    world: bool
    messages: list[dict[str, Any]]
    urls: tuple[str, ...]


class RemoteRows:
    """Stored rows, read in their order as often as needed."""

    def __init__(self, rows: Rows, adapt: Format) -> None:
        """Args: rows: the stored rows; adapt: turns one into our format."""
        self._rows = rows
        self._adapt = adapt

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._rows)

    def problems(self) -> Iterator[Problem]:
        """Yields what is wrong with the rows; whether a URL is one that is fetched is not looked at."""
        places: dict[str, str] = {}
        for index, conversation, adapted, problems in self._parsed():
            where = self._rows.where(index)
            yield from problems
            if conversation is None:
                continue
            for part in conversation.media():
                yield from (renamed(problem, adapted) for problem in _media_problems(part, conversation, where))
            if conversation.id is not None and places.setdefault(conversation.id, where) != where:
                message = f"the id is already that of {places[conversation.id]}"
                yield Problem(message, source=where, key="id", value=conversation.id, hint="make it unique")

    def __iter__(self) -> Iterator[Row]:
        """Yields the rows, in which `problems` has found nothing."""
        for index, conversation, _, problems in self._parsed():
            assert conversation is not None, problems
            yield _row(conversation, self._rows.label(index))

    def _parsed(self) -> Iterator[tuple[int, Conversation | None, Adapted, list[Problem]]]:
        for index, stored in enumerate(self._rows.outlines(range(len(self)))):
            yield index, *parse_stored(stored, index, self._rows.where(index), self._adapt)


def _media_problems(part: object, conversation: Conversation, where: str) -> Iterator[Problem]:
    if not isinstance(part, ImagePart):
        yield Problem("clips are not fetched, only images", source=where, key=getattr(part, "key", None))
    elif not isinstance(_entry(part, conversation), str):
        value = shown(_entry(part, conversation))
        yield Problem("expected the URL of an image", source=where, key=part.key, value=value)


def _entry(part: ImagePart, conversation: Conversation) -> object:
    if part.path is not None:
        return part.path
    assert part.index is not None
    entry: object = conversation.images[part.index]
    return entry


def _row(conversation: Conversation, label: str) -> Row:
    places: dict[str, int] = {}
    messages = []
    for message in conversation.messages:
        parts: list[dict[str, Any]] = []
        for part in message.parts:
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
            else:
                assert isinstance(part, ImagePart)
                parts.append(
                    {"type": "image", "index": places.setdefault(str(_entry(part, conversation)), len(places))}
                )
        messages.append({"role": message.role, "content": parts})
    return Row(conversation.id or label, conversation.kind, conversation.world, messages, tuple(places))
