"""How ranks that encode share the pictures of a run: each falls to one of them, whoever has listed it."""

from __future__ import annotations

from collections import Counter

from theworld_train.config.components import Component
from theworld_train.data.pictures import Listing, Picture, Place
from theworld_train.encode import _Share

TOWER, WORLD = Component.VISION_TOWER, Component.WORLD_ENCODER
RANKS = 3


def digest(number: int) -> str:
    return f"{number * 0x9E3779B1 % 2**32:08x}{number:024x}"


def listings() -> list[Listing]:
    """Forty samples of an image, which both encoders see, and a clip; every fifth one repeats the first one's."""
    found = []
    for index in range(40):
        image, clip = digest(index if index % 5 else 0), digest(100 + index)
        pictures = Picture(TOWER, image, 1), Picture(WORLD, image, 1), Picture(WORLD, clip, 9)
        found.append(Listing((0, index), pictures))
    return [*found, Listing((1, 0), skipped="sample a: unreadable"), Listing((1, 1), skipped="sample b: unreadable")]


def shares(world_size: int) -> list[_Share]:
    there = {TOWER: frozenset([digest(1)]), WORLD: frozenset(digest(number) for number in range(100, 110))}
    made = [_Share(rank, world_size, there) for rank in range(world_size)]
    for share in made:
        for start in range(0, 42, 7):
            share.take(listings()[start : start + 7])
    return made


def to_encode(share: _Share) -> list[tuple[Place, Picture]]:
    return [(place, picture) for place, pictures in share.missing.items() for picture in pictures]


def test_every_picture_falls_to_one_rank():
    (alone,), several = shares(1), shares(RANKS)
    missing = [
        (place, picture) for share in several for place, pictures in share.missing.items() for picture in pictures
    ]
    expected = [(place, picture) for place, pictures in alone.missing.items() for picture in pictures]
    assert sorted(missing) == sorted(expected)
    assert len(expected) == 32 + 33 + 30, "different images but the one that is there, as many for both, and new clips"
    assert all(share.missing for share in several)
    for counts, whole in zip(zip(*(share.counts for share in several), strict=True), alone.counts, strict=True):
        assert sum(counts, Counter()) == whole
    assert alone.uses == {TOWER: 40, WORLD: 80}
    assert alone.found == {TOWER: 1, WORLD: 10}


def test_an_image_of_both_encoders_is_loaded_once():
    for share in shares(RANKS):
        for pictures in share.missing.values():
            images = [picture for picture in pictures if picture.frames == 1]
            assert len({picture.digest for picture in images}) <= 1
            assert len(images) in (0, 2) or images[0].digest == digest(1)


def test_what_training_leaves_out_is_counted_on_every_rank():
    assert {(share.skipped, share.first_skipped) for share in shares(RANKS)} == {(2, "sample a: unreadable")}
