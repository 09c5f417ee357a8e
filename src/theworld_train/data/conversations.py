"""A source whose samples are stored rows: what all formats and all kinds of files have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.conversation import Conversation, parse_row, shown
from theworld_train.data.formats import Adapted, Format, own_format
from theworld_train.data.media import Media, RefusedMediumError
from theworld_train.data.order import Groups
from theworld_train.data.rows import GroupedRows, RowError, Rows
from theworld_train.data.source import Finding, MediaError, Sample, UnreadableSampleError, reason_of
from theworld_train.data.video import missing_decoder


class Conversations:
    """Rows that become conversations: stored somewhere, in some format, with media somewhere."""

    def __init__(self, rows: Rows, media: Media, adapt: Format = own_format) -> None:
        """Takes the three parts.

        Args:
            rows: The stored rows.
            media: Where their media are.
            adapt: Turns a row into our format.

        Raises:
            ConfigError: If there are no rows.
        """
        if not len(rows):
            raise ConfigError(Problem("it holds no rows", source=rows.name))
        self._rows = rows
        self._media = media
        self._adapt = adapt

    @property
    def groups(self) -> Groups | None:
        """Rows that are read at once; None if any row is as quick to read as another."""
        return self._rows.groups if isinstance(self._rows, GroupedRows) else None

    def __len__(self) -> int:
        """Returns the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Loads one row with its media; see `Source`."""
        try:
            row = self._rows[index]
        except RowError as error:
            row = error
        except OSError as error:
            raise UnreadableSampleError(self._rows.label(index), f"cannot be read: {error}") from error
        return self._sample(index, row, self._media.load)

    def outline(self, index: int) -> Sample:
        """Returns one row with blanks for its media; see `Source`."""
        try:
            row = next(self._rows.outlines(range(index, index + 1)))
        except OSError as error:
            raise UnreadableSampleError(self._rows.label(index), f"cannot be read: {error}") from error
        return self._sample(index, row, self._media.outline)

    def check(self) -> Iterator[Finding]:
        """Checks the structure of every row, that its media exist, and that its id is its own; see `Source`."""
        try:
            yield from self._check()
        except OSError as error:
            yield Finding((Problem(f"cannot be read: {error}", source=self._rows.name),))

    def _check(self) -> Iterator[Finding]:
        rows_of_ids: dict[str, int] = {}
        holds_video_file = False
        for index, row in enumerate(self._rows.outlines(range(len(self._rows)))):
            conversation, adapted, problems = self._parse(index, row)
            name = None if conversation is None else conversation.id
            if conversation is not None:
                found = self._media.check(conversation, self._rows.where(index))
                problems = [renamed(problem, adapted) for problem in found]
                holds_video_file = holds_video_file or (not problems and self._media.holds_video_file(conversation))
            if name is not None and rows_of_ids.setdefault(name, index) != index:
                message = f"the id is already that of {self._rows.where(rows_of_ids[name])}"
                problems.append(Problem(message, self._rows.where(index), "id", name, "make it unique"))
                name = None
            if problems:
                yield Finding(tuple(problems), index, name or self._rows.label(index))
        problem = missing_decoder(self._rows.name) if holds_video_file else None
        if problem is not None:
            yield Finding((problem,))

    def _sample(
        self, index: int, row: object, render: Callable[[Conversation, Adapted], list[dict[str, Any]]]
    ) -> Sample:
        conversation, adapted, problems = self._parse(index, row)
        if conversation is None:
            raise UnreadableSampleError(self._rows.label(index), reason_of(problems))
        sample_id = conversation.id or self._rows.label(index)
        try:
            messages = render(conversation, adapted)
        except MediaError as error:
            raise UnreadableSampleError(sample_id, str(error)) from error
        except RefusedMediumError:
            found = self._media.check(conversation, self._rows.where(index))
            raise UnreadableSampleError(sample_id, reason_of(renamed(problem, adapted) for problem in found)) from None
        return Sample(sample_id, conversation.kind, messages, conversation.world)

    def _parse(self, index: int, row: object) -> tuple[Conversation | None, Adapted, list[Problem]]:
        return parse_stored(row, index, self._rows.where(index), self._adapt)


def parse_stored(
    row: object, index: int, where: str, adapt: Format
) -> tuple[Conversation | None, Adapted, list[Problem]]:
    """Parses a stored row of any format.

    Args:
        row: The row, or what is wrong with it.
        index: Its number.
        where: Names it in problems.
        adapt: Turns it into our format.

    Returns:
        Its conversation, or None and what is wrong with it, in the words of the row's own format.
    """
    if isinstance(row, RowError):
        return None, Adapted({}), [Problem(row.message, source=where, hint=row.hint)]
    if not isinstance(row, dict):
        return None, Adapted({}), [Problem("a row must be an object of fields and values", source=where)]
    adapted = adapt(row, index)
    if adapted.problems:
        problems = [replace(p, source=where, value=shown(p.value)) for p in adapted.problems]
        return None, adapted, problems
    conversation, problems = parse_row(adapted.row, where)
    return conversation, adapted, [renamed(problem, adapted) for problem in problems]


def renamed(problem: Problem, adapted: Adapted) -> Problem:
    """Returns a problem whose key is that of the row's own format."""
    key = None if problem.key is None else adapted.own_key(problem.key)
    return replace(problem, key=key, value=shown(problem.value))
