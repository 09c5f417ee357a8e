"""User errors: every problem of an input at once, each with where it is, what it is and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the user's input.

    Attributes:
        message: What is wrong and what was expected, as a sentence without a full stop.
        source: The file (or `command line`) that the value came from.
        key: The dotted key, such as `optimizer.lr`.
        value: The offending value, if there is one to show.
        hint: How to mend it.
    """

    message: str
    source: str | None = None
    key: str | None = None
    value: object | None = None
    hint: str | None = None

    def __str__(self) -> str:
        """Renders `source: key: message (got value); hint`, leaving out what is absent."""
        where = ": ".join(part for part in (self.source, self.key) if part)
        text = f"{where}: {self.message}" if where else self.message
        if self.value is not None:
            text += f" (got {self.value!r})"
        if self.hint:
            text += f"; {self.hint}"
        return text


class ConfigError(Exception):
    """Raised for every mistake that a user can mend; carries all problems found, not only the first."""

    def __init__(self, problems: Problem | str | Iterable[Problem]) -> None:
        """Keeps the problems and joins them, a line each, as the exception's text.

        Args:
            problems: One problem, a plain sentence, or several problems.
        """
        if isinstance(problems, str):
            problems = [Problem(problems)]
        elif isinstance(problems, Problem):
            problems = [problems]
        self.problems: tuple[Problem, ...] = tuple(problems)
        assert self.problems, "a ConfigError needs at least one problem"
        super().__init__("\n".join(str(problem) for problem in self.problems))


def nearest(name: str, known: Sequence[str]) -> str | None:
    """Returns the known name that is nearest to a mistyped one, or None if none is near; case does not count."""
    by_folded = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_folded, n=1, cutoff=0.6)
    return by_folded[near[0]] if near else None


def did_you_mean(name: str, known: Sequence[str]) -> str | None:
    """Returns a hint that names the nearest known name, or lists the known ones when none is near and they are few."""
    near = nearest(name, known)
    if near:
        return f"did you mean '{near}'?"
    if known and len(known) <= 12:
        return "known: " + ", ".join(known)
    return None
