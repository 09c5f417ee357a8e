"""Conversations in a JSONL file, a line each, with media in files next to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import JsonlSource
from theworld_train.data.conversation import Conversation, VideoPart, parse_row
from theworld_train.data.media import check_media, load_messages, outline_messages
from theworld_train.data.source import MediaError, Sample, UnreadableSampleError, first_problems
from theworld_train.data.video import missing_decoder


class JsonlConversations:
    """The rows of a JSONL file.

    The file is indexed once, by the byte offset of each line, and a row is read from disk when it is asked for: memory
    stays at 16 bytes a row, every problem names its line, and rows whose optional fields differ need no common schema,
    which a columnar copy of the file would force on them.

    Media paths are relative to the directory of the file and may not leave it; `theworld_train.data.media.locate` has
    the rules.
    """

    def __init__(self, config: JsonlSource) -> None:
        """Indexes the file.

        Raises:
            ConfigError: If there is no such file, or it holds no rows.
        """
        self._path = Path(config.path)
        self._max_video_frames = config.max_video_frames
        if not self._path.is_file():
            message = "is a directory, expected a JSONL file" if self._path.is_dir() else "no such file"
            raise ConfigError(Problem(message, source=config.path))
        self._root = self._path.parent.resolve()
        self._offsets, self._lines = _index_lines(self._path)
        if not len(self._lines):
            raise ConfigError(Problem("the file holds no rows", source=config.path))

    def __len__(self) -> int:
        """Returns the number of rows; blank lines are none."""
        return len(self._lines)

    def __getitem__(self, index: int) -> Sample:
        """Loads one row with its media.

        Raises:
            UnreadableSampleError: If a medium is damaged.
            ConfigError: If the row is wrong.
        """
        return self._sample(index, load_messages)

    def outline(self, index: int) -> Sample:
        """Returns one row with blanks for its media; see `Source`."""
        return self._sample(index, outline_messages)

    def _sample(self, index: int, render: Callable[[Conversation, Path, int, str], list[dict[str, Any]]]) -> Sample:
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            conversation, problems = self._parse(index, file.readline())
        if conversation is None:
            raise ConfigError(problems)
        sample_id = self._id(index, conversation)
        try:
            messages = render(conversation, self._root, self._max_video_frames, self._where(index))
        except MediaError as error:
            raise UnreadableSampleError(sample_id, str(error)) from error
        return Sample(sample_id, conversation.kind, messages, conversation.world)

    def check(self) -> list[Problem]:
        """Checks the structure of every row and that its media exist."""
        return first_problems(self._problems(), str(self._path))

    def _problems(self) -> Iterator[Problem]:
        lines_of_ids: dict[str, str] = {}
        holds_video_files = False
        with self._path.open("rb") as file:
            for index, offset in enumerate(self._offsets):
                file.seek(offset)
                conversation, problems = self._parse(index, file.readline())
                yield from problems
                if conversation is None:
                    continue
                yield from check_media(conversation, self._root, self._where(index))
                holds_video_files = holds_video_files or self._holds_video_file(conversation)
                sample_id = self._id(index, conversation)
                first = lines_of_ids.setdefault(sample_id, self._where(index))
                if first != self._where(index):
                    message = f"the id is already that of {first}"
                    yield Problem(message, source=self._where(index), key="id", value=sample_id, hint="make it unique")
        problem = missing_decoder(str(self._path)) if holds_video_files else None
        if problem is not None:
            yield problem

    def _holds_video_file(self, conversation: Conversation) -> bool:
        videos = (part for part in conversation.media() if isinstance(part, VideoPart))
        return any(video.path is not None and (self._root / video.path).is_file() for video in videos)

    def _parse(self, index: int, line: bytes) -> tuple[Conversation | None, list[Problem]]:
        try:
            row = json.loads(line.decode("utf-8-sig"))
            if rb"\u" in line:
                # JSON can escape half of a surrogate pair, which no tokenizer takes.
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            hint = "every line is one JSON object in UTF-8, without line breaks inside it"
            return None, [Problem(f"not valid JSON: {error}", source=self._where(index), hint=hint)]
        return parse_row(row, self._where(index))

    def _where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"

    def _id(self, index: int, conversation: Conversation) -> str:
        return conversation.id or f"{self._path.name}:{self._lines[index]}"


def _index_lines(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the byte offset and the number, counted from 1, of each line that is not blank."""
    offsets, lines = [], []
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                offsets.append(offset)
                lines.append(number)
            offset += len(line)
    return np.array(offsets, dtype=np.int64), np.array(lines, dtype=np.int64)
