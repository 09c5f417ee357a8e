"""Samples whose images and clips come with a generated future, and what has to be generated for them."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from theworld_train.batch import ROLLOUT
from theworld_train.config.rollout import RolloutRules
from theworld_train.data.collator import Collator
from theworld_train.data.loader import MAX_REPLACEMENTS, successors
from theworld_train.data.mixture import part_ends
from theworld_train.data.pictures import Place
from theworld_train.data.source import Finding, Sample, Source, UnreadableSampleError
from theworld_train.data.workers import in_workers
from theworld_train.encoded_files import frames_digest

#: More latent frames than any sample asks for.
_LONG_ENOUGH = 2**20


class RolloutSource:
    """A source whose visual parts state how many latent frames follow the present, and by which prompt.

    Clips come with their present alone.
    """

    def __init__(self, source: Source, steps: int, rules: RolloutRules) -> None:
        """Args: source: the samples. steps: latent frames after the present. rules: how they are generated."""
        self.source, self._steps, self._rules = source, steps, rules

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
        return replace(sample, messages=state_rollouts(sample.messages, self._steps, self._rules))


def state_rollouts(messages: Iterable[dict[str, Any]], steps: int, rules: RolloutRules) -> list[dict[str, Any]]:
    """Returns messages whose visual parts ask for a future.

    Args:
        messages: Of a conversation.
        steps: Latent frames that follow the present.
        rules: How they are generated.
    """
    messages = list(messages)
    stated = {"steps": steps, "prompt": rules.prompt_for(first_question(messages))}
    return [{**message, "content": _with(message["content"], stated)} for message in messages]


def first_question(messages: Iterable[dict[str, Any]]) -> str:
    """Returns the first text of the user; empty if there is none."""
    for message in messages:
        if message["role"] != "user":
            continue
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        for text in texts:
            if stripped := str(text).strip():
                return stripped
    return ""


def _with(content: str | Iterable[dict[str, Any]], stated: dict[str, Any]) -> str | list[dict[str, Any]]:
    """Returns the content of a message, the visual parts of which state more."""
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else {**part, **stated} for part in content]


@dataclass(frozen=True)
class Future:
    """What is to be generated.

    Attributes:
        digest: Of the picture and the prompt.
        prompt: What is to happen.
        picture: The present, if it was asked for.
    """

    digest: str
    prompt: str
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Futures:
    """The futures that one sample needs.

    Attributes:
        place: The sample.
        sample: The sample's id; empty if it cannot be read.
        wanted: In their order, repeated ones too.
        skipped: Why training would not take the sample, which then has none; empty if it would.
    """

    place: Place
    sample: str = ""
    wanted: tuple[Future, ...] = ()
    skipped: str = ""


def list_futures(
    sources: Sequence[Source],
    collator: Collator,
    places: Sequence[Place],
    num_workers: int,
    *,
    refused: Collection[str] = (),
    packed: bool = False,
) -> Generator[list[Futures], None, None]:
    """Yields of each place the futures that its sample needs, and before a usable one is found those of its successors.

    Training takes the next usable sample of a source for one that it cannot take, and looks up what that one needs.

    Args:
        sources: The sources, whose samples state what they need; see `RolloutSource`. The first is trained on.
        collator: Encodes samples, and says which fit.
        places: The samples.
        num_workers: Worker processes; 0 works in this process.
        refused: Digests of futures that there will not be.
        packed: Whether training packs, so that only a sample as short may stand in where a row has no more room.
    """
    lister = _Lister(sources, collator, frozenset(refused), packed)
    return in_workers(lister, places, min(num_workers, len(places)))


def load_futures(
    sources: Sequence[Source], collator: Collator, places: Sequence[Place], num_workers: int
) -> Generator[Futures, None, None]:
    """Yields the futures that each sample needs, with their pictures; arguments as of `list_futures`."""
    return in_workers(_Loader(sources, collator), places, min(num_workers, len(places)))


class _Noted:
    """Takes every future for known, and notes which were asked for."""

    def __init__(self, asked: list[Future], *, pictures: bool) -> None:
        self._asked, self._pictures = asked, pictures

    def find(self, frames: Sequence[Image.Image], prompt: str = "") -> Tensor:
        picture = frames[-1].convert("RGB") if self._pictures else None
        self._asked.append(Future(frames_digest(frames, prompt), prompt, picture))
        return torch.empty(_LONG_ENOUGH, 0)


@dataclass(frozen=True)
class _Reader:
    sources: Sequence[Source]
    collator: Collator

    def read(self, place: Place, *, pictures: bool) -> Futures:
        asked: list[Future] = []
        source, index = place
        try:
            collator = self.collator.knowing({ROLLOUT: _Noted(asked, pictures=pictures)})
            sample = self.sources[source][index]
            if collator.fit(collator.encode_whole(sample)) is None:
                return Futures(
                    place, sample.id, skipped=f"sample {sample.id} does not fit {collator.max_length} tokens"
                )
        except UnreadableSampleError as error:
            return Futures(place, skipped=str(error))
        return Futures(place, sample.id, tuple(asked))


@dataclass(frozen=True)
class _Loader(_Reader, Dataset[Futures]):
    def __getitem__(self, place: Place) -> Futures:
        return self.read(place, pictures=True)


@dataclass(frozen=True)
class _Lister(_Reader, Dataset[list[Futures]]):
    refused: frozenset[str]
    packed: bool

    def __getitem__(self, place: Place) -> list[Futures]:
        source, index = place
        following = list(islice(successors(part_ends(self.sources[source]), index), MAX_REPLACEMENTS))
        found = self._until_usable(source, following)
        if len(found) == 1 or not self.packed or source:
            return found
        room = next(filter(None, (self._tokens(source, candidate) for candidate in following)), 0)
        if self._tokens(source, found[-1].place[1]) <= room:
            return found
        rest = (candidate for candidate in following[1:] if 0 < self._tokens(source, candidate) <= room)
        return [*found, *self._until_usable(source, rest)]

    def _until_usable(self, source: int, candidates: Iterable[int]) -> list[Futures]:
        found: list[Futures] = []
        for candidate in candidates:
            found.append(self._list((source, candidate)))
            if not found[-1].skipped:
                break
        return found

    def _list(self, place: Place) -> Futures:
        futures = self.read(place, pictures=False)
        if self.refused.isdisjoint(future.digest for future in futures.wanted):
            return futures
        return Futures(place, futures.sample, skipped=f"sample {futures.sample}: the guardrail refuses its future")

    def _tokens(self, source: int, index: int) -> int:
        """Returns the tokens of a sample as far as they are known without its pixels; 0 if it is unusable."""
        collator = self.collator.knowing({ROLLOUT: _Noted([], pictures=False)})
        try:
            encoded = collator.fit(collator.encode_whole(self.sources[source].outline(index)))
        except UnreadableSampleError:
            return 0
        return 0 if encoded is None else len(encoded.input_ids)
