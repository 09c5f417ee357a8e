"""Lengths that are worked out without pixels are those of the samples that training then sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config.sources import JsonlSource, MovingDigitsSource
from theworld_train.data import Collator, Source, measure_lengths, open_source


def exact(source: Source, collator: Collator) -> list[int]:
    encoded = [collator.encode(source[index]) for index in range(len(source))]
    return [0 if sample is None else len(sample.input_ids) for sample in encoded]


def turns(*content: dict[str, Any], answer: str = "up") -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_clips_of_the_generator(tiny: TinyCheckpoint, num_workers: int):
    config = MovingDigitsSource(source="moving_digits", split="train", samples=24, plain_share=0.5)
    source, collator = open_source(config), Collator(tiny.processor(), 4096)
    lengths = measure_lengths(source, collator, range(24), num_workers)
    assert lengths.tolist() == exact(source, collator)
    assert len(set(lengths.tolist())) > 1, "some have no world tokens"
    assert measure_lengths(source, collator, range(1, 24, 2), num_workers).tolist() == lengths[1::2].tolist()


def test_rows_of_a_file(
    tiny: TinyCheckpoint, write_jsonl: Callable[..., Path], write_image: Callable[..., Path], tmp_path: Path
):
    for number in range(9):
        write_image(f"clip/{number}.png")
    write_image("a.png")
    image, clip = {"type": "image", "path": "a.png"}, {"type": "video", "path": "clip"}
    frames = {"type": "video", "frames": [f"clip/{number}.png" for number in range(6)]}
    text = {"type": "text", "text": "Which way does it move?"}
    path = write_jsonl(
        {"messages": turns(text)},
        {"messages": turns(image, text)},
        {"messages": turns(image, image, text, answer="left right up down")},
        {"messages": turns(clip, text)},
        {"messages": turns(frames, text), "world": False},
        {"messages": turns(frames, text, answer=" ".join(["left"] * 300))},
        {"messages": turns(clip, clip, clip, clip, text)},
    )
    source = open_source(JsonlSource(source="jsonl", path=str(path), max_video_frames=9))
    collator = Collator(tiny.processor(), 160)
    lengths = measure_lengths(source, collator, range(len(source)), 0).tolist()
    assert lengths == exact(source, collator)
    assert lengths[5] == 160, "cut"
    assert lengths[6] == 0, "four clips do not fit"


def test_pixels_are_not_read(tiny: TinyCheckpoint, write_jsonl: Callable[..., Path], tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    path = write_jsonl({"messages": turns({"type": "image", "path": "broken.png"}, {"type": "text", "text": "up"})})
    source = open_source(JsonlSource(source="jsonl", path=str(path)))
    assert measure_lengths(source, Collator(tiny.processor(), 160), range(1), 0)[0] > 0


def test_a_wrong_row_has_no_length(tiny: TinyCheckpoint, write_jsonl: Callable[..., Path]):
    path = write_jsonl({"messages": turns({"type": "text", "text": "up"})}, {"messages": "none"})
    source = open_source(JsonlSource(source="jsonl", path=str(path)))
    first, second = measure_lengths(source, Collator(tiny.processor(), 160), range(2), 2)
    assert first > 0
    assert second == 0
