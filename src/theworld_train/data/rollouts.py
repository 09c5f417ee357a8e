"""Samples whose images and clips come with a generated future."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from theworld_train.data.source import Finding, Sample, Source


class RolloutSource:
    """A source whose visual parts state how many latent frames follow the present; whoever encodes them looks these up.

    Clips come with their present alone.
    """

    def __init__(self, source: Source, steps: int) -> None:
        """Args: source: the samples. steps: latent frames after the present."""
        self.source, self._steps = source, steps

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """Loads one sample; see `Source`."""
        return self._stated(self.source[index])

    def outline(self, index: int) -> Sample:
        """Returns one sample with blanks for its media; see `Source`."""
        return self._stated(self.source.outline(index))

    def check(self) -> Iterator[Finding]:
        """Checks every row; see `Source`."""
        return self.source.check()

    def _stated(self, sample: Sample) -> Sample:
        messages = [{**message, "content": self._parts(message["content"])} for message in sample.messages]
        return replace(sample, messages=messages)

    def _parts(self, content: str | Iterable[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return content
        return [part if part["type"] == "text" else {**part, "steps": self._steps} for part in content]
