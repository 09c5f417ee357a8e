"""What every source of training data offers: numbered conversations, and a check that runs before any model loads."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from theworld_train.config.errors import Problem

#: Kind of a sample whose row names none.
DEFAULT_KIND = "all"
#: Problems that a check lists one by one; the rest are counted.
MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Sample:
    """One conversation with its media loaded.

    Attributes:
        id: Names the sample in logs; unique within its source.
        kind: Group of the sample, for metrics by kind.
        messages: The conversation in Hugging Face's chat-template format: `{"role": ..., "content": [part, ...]}` with
            parts `{"type": "text", "text": str}`, `{"type": "image", "image": PIL image in RGB}` and
            `{"type": "video", "video": [PIL image in RGB, ...]}`. A clip's last frame is the present, unless it states
            the index of another as `present`. A visual part with `steps` has so many latent frames of generated future.
        world: Whether its visual parts have world tokens; without them it is a sample for plain Gemma 3.
    """

    id: str
    kind: str
    messages: list[dict[str, Any]]
    world: bool = True


@dataclass(frozen=True)
class Finding:
    """What a check has found: a row that is no sample, or something that concerns the source as a whole.

    Attributes:
        problems: What is wrong, by file, row and field; at least one.
        index: Index of the row; None if the source cannot be read as it is.
        sample_id: Names the row among samples: by its id, or by file and row if it has none or that of another row.
    """

    problems: tuple[Problem, ...]
    index: int | None = None
    sample_id: str = ""


@dataclass(frozen=True)
class MediaPart:
    """Where a sample has an image or a clip.

    Attributes:
        type: `image` or `video`.
        message: Index of the message.
        part: Index of the part in its content.
    """

    type: str
    message: int
    part: int


@dataclass(frozen=True)
class Question:
    """What a sample asks, and the answer that is expected.

    Attributes:
        text: The text of the user turn.
        expected: The text of the assistant turn after it.
        media: The images and clips of all turns before that answer.
    """

    text: str
    expected: str
    media: tuple[MediaPart, ...]


def question_of(sample: Sample, turn: int = -1) -> Question:
    """Returns what a sample asks.

    Args:
        sample: The sample.
        turn: Which of its assistant turns is the answer; the last one unless told otherwise.
    """
    last = [index for index, message in enumerate(sample.messages) if message["role"] == "assistant"][turn]
    media = [
        MediaPart(part["type"], number, place)
        for number, message in enumerate(sample.messages[:last])
        for place, part in enumerate(message["content"])
        if part["type"] != "text"
    ]
    return Question(_text_of(sample.messages[last - 1]), _text_of(sample.messages[last]), tuple(media))


def _text_of(message: dict[str, Any]) -> str:
    """Returns the texts of a message, each trimmed as the chat template does it."""
    return "".join(part["text"].strip() for part in message["content"] if part["type"] == "text")


class Source(Protocol):
    """A fixed number of samples, each a pure function of its index."""

    def __len__(self) -> int:
        """Returns the number of samples."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Loads one sample.

        Raises:
            UnreadableSampleError: If a medium of the sample is damaged, or the row itself is wrong; the loader takes
                another sample instead.
            ConfigError: If the source cannot be read as it is, which `check` would have told.
        """
        ...

    def outline(self, index: int) -> Sample:
        """Returns one sample with a `Blank` in the place of each image and clip; raises as `__getitem__` does."""
        ...

    def check(self) -> Iterator[Finding]:
        """Checks the structure of every row without decoding media, and yields what is wrong, in the order of rows."""
        ...


class MediaError(ValueError):
    """Raised for an image or a video that is damaged, disguised or too large; the message names it."""


class UnreadableSampleError(ValueError):
    """Raised for a sample that cannot be used: a medium cannot be read, or its row is wrong.

    Attributes:
        sample_id: Id of the sample.
        reason: What is wrong with which file, or which field of which row.
    """

    def __init__(self, sample_id: str, reason: str) -> None:
        """Args: sample_id: id of the sample; reason: what is wrong with which file or field."""
        super().__init__(sample_id, reason)
        self.sample_id = sample_id
        self.reason = reason

    def __str__(self) -> str:
        """Renders id and reason."""
        return f"{self.sample_id}: {self.reason}"


class ExcludedSampleError(UnreadableSampleError):
    """Raised for a sample that the config leaves out; another one takes its place without a word."""

    def __init__(self, sample_id: str) -> None:
        """Args: sample_id: id of the sample."""
        super().__init__(sample_id, "excluded")


def reason_of(problems: Iterable[Problem]) -> str:
    """Returns in one line why a row is no sample."""
    return "; ".join(map(str, problems))


def first_problems(problems: Iterable[Problem], source: str) -> list[Problem]:
    """Returns the first `MAX_PROBLEMS` problems, and one more that counts the rest if there are any."""
    iterator = iter(problems)
    listed = list(itertools.islice(iterator, MAX_PROBLEMS))
    rest = sum(1 for _ in iterator)
    if rest:
        listed.append(Problem(f"and {rest} more problem{'s' if rest > 1 else ''}", source=source))
    return listed
