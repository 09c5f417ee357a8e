"""The token ledger: what training will see of each sample, from exact lengths and before anything trains."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from theworld_train.assemble.inputs import Inputs, max_steps
from theworld_train.batch import EncodedSample
from theworld_train.config.schema import RunConfig
from theworld_train.data import (
    Batching,
    Collator,
    ExcludedSampleError,
    Sample,
    Source,
    UnreadableSampleError,
    each_sample,
    part_ends,
    part_sizes,
)

Outcome = Literal["kept", "trimmed", "dropped", "excluded"]
OUTCOMES: tuple[Outcome, ...] = ("kept", "trimmed", "dropped", "excluded")
PERCENTILES = (5, 50, 95, 99)
#: Optimizer steps whose padding is worked out.
PADDED_STEPS = 200


@dataclass(frozen=True)
class Entry:
    """One sample.

    Attributes:
        id: Its id.
        outcome: What becomes of it.
        reason: Why it is dropped.
        whole: Tokens before the cut; 0 if it cannot be read.
        text: Tokens of text that training sees.
        image: Tokens of images.
        world: Tokens of world blocks, brackets not counted.
        supervised: Tokens that are predicted.
        brackets: Tokens that open and close image and world blocks.
        sizes: Width and height of its images, if media were opened.
        digest: Of its text and media, if media were opened.
    """

    id: str
    outcome: Outcome
    reason: str = ""
    whole: int = 0
    text: int = 0
    image: int = 0
    world: int = 0
    supervised: int = 0
    brackets: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    digest: str = ""

    @property
    def tokens(self) -> int:
        """All tokens that training sees of it."""
        return self.text + self.image + self.world + self.brackets


@dataclass(frozen=True)
class TokenLedger:
    """What training will see.

    Attributes:
        entries: Every sample of the source, in its order.
        parts: Of a mixture, the number of samples of each part, in their order.
        max_length: Tokens that a sample may have.
        steps: Optimizer steps of the run.
        global_batch_size: Samples of a step.
        padding: Share of the positions of the first steps that is padding, on one rank.
    """

    entries: tuple[Entry, ...]
    parts: Mapping[str, int]
    max_length: int
    steps: int
    global_batch_size: int
    padding: float

    def by_part(self) -> dict[str, tuple[Entry, ...]]:
        """Returns the entries of each part, and of all under `total`; of one source, of all alone."""
        found, start = {}, 0
        for name, size in self.parts.items():
            found[name] = self.entries[start : start + size]
            start += size
        return found | {"total": self.entries}

    def ids(self, outcome: Outcome) -> dict[str, str]:
        """Returns the samples of an outcome, with the reasons."""
        return {entry.id: entry.reason for entry in self.entries if entry.outcome == outcome}

    def duplicates(self) -> list[list[str]]:
        """Returns the groups of samples that hold the same text and media; none if media were not opened."""
        groups: dict[str, list[str]] = defaultdict(list)
        for entry in self.entries:
            if entry.digest:
                groups[entry.digest].append(entry.id)
        return [ids for ids in groups.values() if len(ids) > 1]

    def image_sizes(self) -> Counter[tuple[int, int]]:
        """Returns how often each image size occurs; none if media were not opened."""
        return Counter(size for entry in self.entries for size in entry.sizes)


def totals(entries: Iterable[Entry]) -> dict[str, Any]:
    """Returns what some entries come to: samples by outcome, tokens by kind, and percentiles of their lengths."""
    entries = list(entries)
    seen = [entry for entry in entries if entry.outcome in ("kept", "trimmed")]
    lengths = np.array([entry.tokens for entry in seen])
    kinds = ("text", "image", "world", "brackets", "supervised")
    return {
        "samples": {name: sum(entry.outcome == name for entry in entries) for name in OUTCOMES},
        "tokens": {kind: sum(getattr(entry, kind) for entry in seen) for kind in kinds} | {"all": int(lengths.sum())},
        "percentiles": {str(p): int(np.percentile(lengths, p, method="nearest")) for p in PERCENTILES if len(lengths)},
        "longest": max((entry.whole for entry in entries), default=0),
    }


def count_tokens(
    config: RunConfig, inputs: Inputs, *, media: bool, num_workers: int, beat: Callable[[int], None] = lambda _: None
) -> TokenLedger:
    """Counts every training sample of a run.

    Args:
        config: The run config.
        inputs: What it reads.
        media: Whether to open all media, which finds damaged ones, sizes and duplicates.
        num_workers: Worker processes.
        beat: Told how many more samples are done.

    Raises:
        ConfigError: If a row is wrong.
    """
    entries: list[Entry] = []
    for found in each_sample(_Count(inputs.train, inputs.collator, media), range(len(inputs.train)), num_workers):
        entries += found
        beat(len(found))
    steps = max_steps(config, len(entries))
    lengths = np.array([e.tokens if e.outcome in ("kept", "trimmed") else 0 for e in entries], dtype=np.int32)
    return TokenLedger(
        entries=tuple(entries),
        parts=part_sizes(inputs.train),
        max_length=inputs.max_length,
        steps=steps,
        global_batch_size=config.training.global_batch_size,
        padding=_padding(config, inputs, lengths, min(steps, PADDED_STEPS)) if lengths.any() else 0.0,
    )


def _padding(config: RunConfig, inputs: Inputs, lengths: NDArray[np.int32], steps: int) -> float:
    """Returns the share of padding in some steps; an unusable sample is taken to be as long as the next usable one."""
    training = config.training
    batching = Batching(training.batching, inputs.max_length, lengths, tuple(part_ends(inputs.train)))
    tokens = positions = 0
    for step in range(steps):
        for batch in batching.micro_batches(inputs.order.indices(step), 0, 1, training.micro_batch_size):
            rows = [sum(int(batching.tokens[place.index]) for place in row) for row in batch]
            tokens, positions = tokens + sum(rows), positions + max(rows) * len(rows)
    return 1 - tokens / positions


class _Count:
    """Counts a sample, given its index."""

    def __init__(self, source: Source, collator: Collator, media: bool) -> None:
        self._source, self._collator, self._media = source, collator, media

    def __call__(self, index: int) -> Entry:
        try:
            sample = self._source[index] if self._media else self._source.outline(index)
            whole = self._collator.encode_whole(sample)
        except ExcludedSampleError as error:
            return Entry(error.sample_id, "excluded")
        except UnreadableSampleError as error:
            return Entry(error.sample_id, "dropped", error.reason)
        length = whole.input_ids.shape[0]
        encoded = self._collator.fit(whole)
        if encoded is None:
            reason = (
                f"{length:,} tokens do not fit {self._collator.max_length:,} with its images and a part of its answer"
            )
            entry = Entry(sample.id, "dropped", reason, whole=length)
        else:
            entry = _entry(sample, encoded, length)
        if not self._media:
            return entry
        images = list(_images(sample))
        return replace(entry, sizes=tuple(image.size for image in images), digest=_digest(sample, images))


def _entry(sample: Sample, encoded: EncodedSample, length: int) -> Entry:
    visual, image = int(encoded.indivisible.sum()), int(encoded.token_type_ids.sum())
    return Entry(
        id=sample.id,
        outcome="trimmed" if encoded.trimmed else "kept",
        whole=length,
        text=len(encoded.input_ids) - visual,
        image=image,
        world=encoded.world_tokens,
        supervised=int(encoded.supervised[1:].sum()),
        brackets=visual - image - encoded.world_tokens,
    )


def _images(sample: Sample) -> Iterator[Image.Image]:
    """Yields the images of a sample and the frames of its clips."""
    for message in sample.messages:
        for part in message["content"] if not isinstance(message["content"], str) else ():
            visual = part.get(part["type"])
            if part["type"] == "image":
                yield visual
            elif part["type"] == "video":
                yield from visual


def _digest(sample: Sample, images: Iterable[Image.Image]) -> str:
    """Returns a digest of a sample's texts and pixels."""
    digest = hashlib.sha256()
    for message in sample.messages:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [str(part.get("text", part["type"])) for part in content]
        digest.update(repr((message["role"], texts)).encode())
    for image in images:
        digest.update(repr(image.size).encode() + image.tobytes())
    return digest.hexdigest()
