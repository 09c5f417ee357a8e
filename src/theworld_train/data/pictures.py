"""The images and clips of samples, one by one: which there are, as training meets them, and the pixels of some."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from theworld_train.batch import EncodedSample, KnownEncodings
from theworld_train.config.components import Component
from theworld_train.data.collator import Collator
from theworld_train.data.source import Source, UnreadableSampleError
from theworld_train.data.workers import in_workers
from theworld_train.encoded_files import frames_digest

#: Samples that a worker lists at once.
LISTED_AT_ONCE = 32

_ENCODERS = (Component.VISION_TOWER, Component.WORLD_ENCODER)

#: A sample: its source, by its place among several, and its index.
Place = tuple[int, int]


class Picture(NamedTuple):
    """An image or clip that an encoder is asked for.

    Attributes:
        component: The encoder.
        digest: Of its frames.
        frames: Their number.
    """

    component: Component
    digest: str
    frames: int


@dataclass(frozen=True)
class Listing:
    """The pictures of one sample.

    Attributes:
        place: The sample.
        pictures: In their order, repeated ones too.
        skipped: Why training would not take the sample, which then has none; empty if it would.
    """

    place: Place
    pictures: tuple[Picture, ...] = ()
    skipped: str = ""


def list_pictures(
    sources: Sequence[Source],
    collator: Collator,
    components: Sequence[Component],
    places: Sequence[Place],
    num_workers: int,
) -> Generator[Listing, None, None]:
    """Yields the pictures of samples, without fitting or normalising them.

    Args:
        sources: The sources.
        collator: Encodes samples, and says which fit.
        components: Encoders whose pictures are listed.
        places: The samples.
        num_workers: Worker processes; 0 works in this process.
    """
    chunks = [places[start : start + LISTED_AT_ONCE] for start in range(0, len(places), LISTED_AT_ONCE)]
    lister = _Lister(sources, collator, components)
    for listings in in_workers(lister, chunks, min(num_workers, len(chunks))):
        yield from listings


def load_pictures(
    sources: Sequence[Source],
    collator: Collator,
    wanted: Sequence[tuple[Place, Sequence[Picture]]],
    num_workers: int,
) -> Generator[list[tuple[Picture, Tensor]], None, None]:
    """Yields the wanted pictures of each sample with their pixels, `(frames, 3, height, width)`.

    A sample that can no longer be taken has none, and one whose pictures have changed lacks those.

    Args:
        sources: The sources.
        collator: Encodes samples.
        wanted: Samples, and which of their pictures; of those that a sample repeats, the first is taken.
        num_workers: Worker processes; 0 works in this process.
    """
    loader = _Loader(sources, collator)
    return in_workers(loader, wanted, min(num_workers, len(wanted)))


class _Noted:
    """Takes every picture for known, and notes which were asked for."""

    def __init__(self, component: Component, asked: list[Picture]) -> None:
        self._component, self._asked = component, asked

    def find(self, frames: Sequence[Image.Image], prompt: str = "") -> Tensor | None:
        self._asked.append(Picture(self._component, frames_digest(frames), len(frames)))
        return torch.empty(0)


class _Chosen:
    """Takes every picture for known but the first of each of some contents, and notes those in their order."""

    def __init__(self, wanted: Iterable[str]) -> None:
        self._wanted = set(wanted)
        self.found: list[str] = []

    def find(self, frames: Sequence[Image.Image], prompt: str = "") -> Tensor | None:
        digest = frames_digest(frames)
        if digest not in self._wanted:
            return torch.empty(0)
        self._wanted.remove(digest)
        self.found.append(digest)
        return None


@dataclass(frozen=True)
class _Reader:
    """Encodes samples of several sources as training does, but for what is known."""

    sources: Sequence[Source]
    collator: Collator

    def read(self, place: Place, known: KnownEncodings) -> EncodedSample:
        """Returns an encoded sample.

        Raises:
            UnreadableSampleError: If training would not take it.
        """
        source, index = place
        sample = self.sources[source][index]
        collator = self.collator.knowing(known)
        encoded = collator.fit(collator.encode_whole(sample))
        if encoded is None:
            raise UnreadableSampleError(sample.id, f"does not fit {collator.max_length} tokens")
        return encoded


@dataclass(frozen=True)
class _Lister(_Reader, Dataset[list[Listing]]):
    components: Sequence[Component] = ()

    def __getitem__(self, places: Sequence[Place]) -> list[Listing]:
        return [self._list(place) for place in places]

    def _list(self, place: Place) -> Listing:
        asked: list[Picture] = []
        try:
            self.read(place, {component: _Noted(component, asked) for component in _ENCODERS})
        except UnreadableSampleError as error:
            return Listing(place, skipped=str(error))
        return Listing(place, tuple(picture for picture in asked if picture.component in self.components))


@dataclass(frozen=True)
class _Loader(_Reader, Dataset[list[tuple[Picture, Tensor]]]):
    def __getitem__(self, wanted: tuple[Place, Sequence[Picture]]) -> list[tuple[Picture, Tensor]]:
        place, pictures = wanted
        tower, world = (
            _Chosen(picture.digest for picture in pictures if picture.component is component) for component in _ENCODERS
        )
        try:
            encoded = self.read(place, {Component.VISION_TOWER: tower, Component.WORLD_ENCODER: world})
        except UnreadableSampleError:
            return []
        images = () if encoded.pixel_values is None else encoded.pixel_values.split(1)
        found = [(Component.VISION_TOWER, *pair) for pair in zip(tower.found, images, strict=True)]
        found += [(Component.WORLD_ENCODER, *pair) for pair in zip(world.found, encoded.world_frames, strict=True)]
        return [(Picture(component, digest, len(pixels)), pixels) for component, digest, pixels in found]
