"""Samples that are left out: those that files name, and rows that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.source import (
    ExcludedSampleError,
    Finding,
    Sample,
    Source,
    UnreadableSampleError,
    first_problems,
    reason_of,
)


def read_exclusions(paths: Iterable[Path]) -> frozenset[str]:
    """Returns the ids that some files name.

    Args:
        paths: JSONL files, whose lines have an `id` each; a run's `quarantine.jsonl` is one.

    Raises:
        ConfigError: With every file that is missing and every line that names no id.
    """
    problems: list[Problem] = []
    found: set[str] = set()
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(f"cannot be read: {error}", key="data.exclude", value=str(path)))
            continue
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                name = json.loads(line)["id"]
            except (ValueError, KeyError, TypeError):
                name = None
            if isinstance(name, str):
                found.add(name)
            else:
                hint = 'each line is an object with an id, such as {"id": "cup-1"}'
                problems.append(Problem("names no sample", source=f"{path}:{number}", hint=hint))
    if problems:
        raise ConfigError(problems)
    return frozenset(found)


@dataclass(frozen=True)
class Check:
    """What has been found wrong with a source.

    Attributes:
        wrong: Of the rows that are wrong, by their index, the id and why it is no sample; no more than decide that the
            source cannot be used.
        number: How many rows are wrong; excluded ones are not counted.
        problems: What is wrong with them and with the source, the first of it.
        stops: Whether the source cannot be used at all.
    """

    wrong: Mapping[int, tuple[str, str]]
    number: int
    problems: tuple[Problem, ...]
    stops: bool

    def refusals(self, allowed: int | None) -> list[Problem]:
        """Returns why a run cannot begin with the source if so many rows may be wrong; nothing if it can."""
        too_many = allowed is not None and self.number > allowed
        if not (self.stops or too_many):
            return []
        if not (too_many and allowed):
            return list(self.problems)
        message = f"{self.number:,} rows are wrong, more than may"
        hint = "mend them, list their ids in a file under data.exclude, or raise the number"
        return [*self.problems, Problem(message, key="data.max_bad_samples", value=allowed, hint=hint)]


def check_rows(source: Source, name: str, allowed: int | None, excluded: Collection[str] = ()) -> Check:
    """Checks every row of a source.

    Args:
        source: The samples.
        name: Names the source in problems.
        allowed: Rows whose reasons are kept, as more decide that the source cannot be used; all if None.
        excluded: Ids of samples that are left out anyway.
    """
    wrong: dict[int, tuple[str, str]] = {}
    number = 0
    stops = False

    def problems() -> Iterator[Problem]:
        nonlocal number, stops
        for finding in source.check():
            stops = stops or finding.index is None
            counts = finding.index is not None and finding.sample_id not in excluded
            number += counts
            if finding.index is not None and (allowed is None or number <= allowed):
                wrong[finding.index] = (finding.sample_id, reason_of(finding.problems))
            if counts or finding.index is None:
                yield from finding.problems

    listed = first_problems(problems(), name)
    return Check(wrong, number, tuple(listed), stops or number == len(source))


class ExcludingSource:
    """A source, some of whose samples are never given; the others keep their places."""

    def __init__(
        self, source: Source, excluded: frozenset[str], wrong: Mapping[int, tuple[str, str]] | None = None
    ) -> None:
        """Keeps what is left out.

        Args:
            source: The samples.
            excluded: Ids of samples that are left out without a word.
            wrong: Of rows that cannot be used, by their index, id and reason.
        """
        self.source, self._excluded, self._wrong = source, excluded, dict(wrong or {})

    def __len__(self) -> int:
        """Returns the number of samples, those that are left out counted."""
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Loads one sample; see `Source`.

        Raises:
            ExcludedSampleError: If it is excluded.
        """
        return self._kept(index, self.source.__getitem__)

    def outline(self, index: int) -> Sample:
        """Returns one sample with blanks for its media; raises as `__getitem__` does."""
        return self._kept(index, self.source.outline)

    def check(self) -> Iterator[Finding]:
        """Checks every row, those that are left out too."""
        return self.source.check()

    def _kept(self, index: int, load: Callable[[int], Sample]) -> Sample:
        try:
            if index in self._wrong:
                raise UnreadableSampleError(*self._wrong[index])
            sample = load(index)
        except UnreadableSampleError as error:
            if error.sample_id in self._excluded:
                raise ExcludedSampleError(error.sample_id) from error
            raise
        if sample.id in self._excluded:
            raise ExcludedSampleError(sample.id)
        return sample
