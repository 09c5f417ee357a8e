"""Samples that are left out by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.source import ExcludedSampleError, Sample, Source, UnreadableSampleError


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


class ExcludingSource:
    """A source, some of whose samples are never given; the others keep their places."""

    def __init__(self, source: Source, excluded: frozenset[str]) -> None:
        """Args: source: the samples. excluded: ids of those that are left out."""
        self.source, self._excluded = source, excluded

    def __len__(self) -> int:
        """Returns the number of samples, excluded ones counted."""
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Loads one sample; see `Source`.

        Raises:
            ExcludedSampleError: If it is left out.
        """
        return self._kept(lambda: self.source[index])

    def outline(self, index: int) -> Sample:
        """Returns one sample with blanks for its media; raises as `__getitem__` does."""
        return self._kept(lambda: self.source.outline(index))

    def check(self) -> list[Problem]:
        """Checks every row, excluded ones too."""
        return self.source.check()

    def _kept(self, load: Callable[[], Sample]) -> Sample:
        try:
            sample = load()
        except UnreadableSampleError as error:
            if error.sample_id in self._excluded:
                raise ExcludedSampleError(error.sample_id) from error
            raise
        if sample.id in self._excluded:
            raise ExcludedSampleError(sample.id)
        return sample
