"""A source whose samples are stored rows: what all formats and all kinds of files have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.conversation import Conversation, parse_row, shown
from theworld_train.data.formats import Adapted, Format, own_format
from theworld_train.data.media import Media, RefusedMediumError
from theworld_train.data.rows import RowError, Rows
from theworld_train.data.source import MediaError, Sample, UnreadableSampleError, first_problems
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
        row = next(self._rows.outlines(range(index, index + 1)))
        return self._sample(index, row, lambda conversation, _: self._media.outline(conversation))

    def check(self) -> list[Problem]:
        """Checks the structure of every row, and that its media exist."""
        return first_problems(self._problems(), self._rows.name)

    def _sample(
        self, index: int, row: object, render: Callable[[Conversation, Adapted], list[dict[str, Any]]]
    ) -> Sample:
        conversation, adapted, problems = self._parse(index, row)
        if conversation is None:
            raise ConfigError(problems)
        sample_id = conversation.id or self._rows.label(index)
        try:
            messages = render(conversation, adapted)
        except MediaError as error:
            raise UnreadableSampleError(sample_id, str(error)) from error
        except RefusedMediumError:
            problems = list(self._media.check(conversation, self._rows.where(index)))
            raise ConfigError(renamed(problem, adapted) for problem in problems) from None
        return Sample(sample_id, conversation.kind, messages, conversation.world)

    def _problems(self) -> Iterator[Problem]:
        rows_of_ids: dict[str, int] = {}
        holds_video_file = False
        for index, row in enumerate(self._rows.outlines(range(len(self._rows)))):
            conversation, adapted, problems = self._parse(index, row)
            yield from problems
            if conversation is None:
                continue
            problems = list(self._media.check(conversation, self._rows.where(index)))
            yield from (renamed(problem, adapted) for problem in problems)
            holds_video_file = holds_video_file or (not problems and self._media.holds_video_file(conversation))
            first = index if conversation.id is None else rows_of_ids.setdefault(conversation.id, index)
            if first != index:
                message = f"the id is already that of {self._rows.where(first)}"
                where = self._rows.where(index)
                yield Problem(message, source=where, key="id", value=conversation.id, hint="make it unique")
        problem = missing_decoder(self._rows.name) if holds_video_file else None
        if problem is not None:
            yield problem

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
