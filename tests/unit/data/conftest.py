"""A fake encoder and a fake source whose tokens can be predicted, and files to read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from theworld_train.batch import Blank, EncodedSample, KnownEncodings
from theworld_train.config.errors import Problem
from theworld_train.data import Sample, Source, UnreadableSampleError
from theworld_train.data.source import Finding

IMAGE_TOKEN = 1000
IMAGE_LENGTH = 4


@dataclass
class FakeEncoder:
    """A token for each character; an image or a clip is a block of four tokens; assistant turns are supervised."""

    pad_token_id: int = 7

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = False,
        world: bool = True,
        known: KnownEncodings | None = None,
    ) -> EncodedSample:
        ids: list[int] = []
        types: list[int] = []
        supervised: list[bool] = []
        pixels, frames = [], []
        for message in messages:
            for part in message["content"]:
                is_text = part["type"] == "text"
                tokens = [ord(c) for c in part["text"]] if is_text else [IMAGE_TOKEN] * IMAGE_LENGTH
                ids += tokens
                types += [0 if is_text else 1] * len(tokens)
                supervised += [is_text and message["role"] == "assistant"] * len(tokens)
                if not is_text:
                    if isinstance(part[part["type"]], Blank):
                        continue
                    pixels.append(torch.full((1, 3, 2, 2), float(len(ids))))
                    frames.append(torch.zeros(len(part["video"]) if part["type"] == "video" else 1, 3, 8, 8))
        return EncodedSample(
            input_ids=torch.tensor(ids),
            token_type_ids=torch.tensor(types),
            supervised=torch.tensor(supervised),
            indivisible=torch.tensor(types).bool(),
            pixel_values=torch.cat(pixels) if pixels else None,
            world_frames=tuple(frames),
        )


@dataclass
class FakeSource:
    """Sample i asks with `i % 5 + 1` letters; some samples are long, some cannot be read."""

    size: int
    long: frozenset[int] = frozenset()
    unreadable: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        if index in self.unreadable:
            raise UnreadableSampleError(f"s{index}", "damaged")
        question = [{"type": "text", "text": "q" * (500 if index in self.long else index % 5 + 1)}]
        answer = [{"type": "text", "text": f"a{index}"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Sample(f"s{index}", "even" if index % 2 == 0 else "odd", messages)

    def outline(self, index: int) -> Sample:
        return self[index]

    def check(self) -> Iterator[Finding]:
        return iter(())


def problems_of(source: Source) -> list[Problem]:
    """Returns all that a check finds."""
    return [problem for finding in source.check() for problem in finding.problems]


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def fake_source() -> Callable[..., FakeSource]:
    return FakeSource


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes rows, objects or raw lines, to a file in `tmp_path`."""

    def write(*rows: object, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_image(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes an image of one colour to a file in `tmp_path`."""

    def write(
        name: str = "a.png", color: tuple[int, int, int] = (200, 100, 50), size: tuple[int, int] = (6, 4)
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
        return path

    return write


@pytest.fixture
def chat() -> Callable[..., dict[str, Any]]:
    """Returns a function that builds a row of one question and one answer."""

    def build(question: object = "what?", answer: object = "this", **fields: object) -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": turns, **fields}

    return build
