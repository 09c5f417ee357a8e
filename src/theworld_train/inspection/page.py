"""Samples as the model sees them, as a page of HTML that opens offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from theworld_train.assemble.inputs import Inputs
from theworld_train.data import UnreadableSampleError

#: Longest side of a picture on the page, in pixels.
THUMBNAIL = 224


@dataclass(frozen=True)
class Span:
    """Tokens in a row of the same kind.

    Attributes:
        kind: `text`, `supervised`, `image` or `world`.
        pieces: The tokens as text; of images and worlds, the first one alone.
        count: Tokens.
    """

    kind: str
    pieces: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class ShownSample:
    """One sample of the page.

    Attributes:
        id: Its id.
        kind: Its kind.
        problem: Why it is not used, empty if it is.
        length: Tokens that training sees.
        trimmed: Tokens that are cut off.
        spans: Its tokens.
        media: Of each image or clip, its frames as data URIs.
    """

    id: str
    kind: str
    problem: str
    length: int = 0
    trimmed: int = 0
    spans: tuple[Span, ...] = ()
    media: tuple[tuple[str, ...], ...] = ()


def render_samples(name: str, inputs: Inputs, number: int) -> str:
    """Renders the first samples that training takes.

    Args:
        name: Of the run.
        inputs: What it reads.
        number: Samples to show.
    """
    indices: list[int] = []
    while len(indices) < number:
        step = len(indices) // max(1, len(inputs.order.indices(0)))
        indices += inputs.order.indices(step)
    shown = [show_sample(inputs, index) for index in indices[:number]]
    template = files("theworld_train.inspection").joinpath("page.html.jinja").read_text()
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=True)
    return environment.from_string(template).render(name=name, samples=shown, max_length=inputs.max_length)


def show_sample(inputs: Inputs, index: int) -> ShownSample:
    """Returns what a page shows of one sample."""
    try:
        sample = inputs.train[index]
        whole = inputs.collator.encode_whole(sample)
    except UnreadableSampleError as error:
        return ShownSample(error.sample_id, "", error.reason)
    encoded = inputs.collator.fit(whole)
    if encoded is None:
        problem = f"{len(whole.input_ids):,} tokens do not fit {inputs.max_length:,}"
        return ShownSample(sample.id, sample.kind, problem)
    return ShownSample(
        id=sample.id,
        kind=sample.kind,
        problem="",
        length=len(encoded.input_ids),
        trimmed=encoded.trimmed,
        spans=tuple(_spans(inputs.processor.tokenizer, encoded)),
        media=tuple(_media(sample.messages)),
    )


def _spans(tokenizer: Any, encoded: Any) -> Iterator[Span]:  # noqa: ANN401
    pieces = tokenizer.convert_ids_to_tokens(encoded.input_ids.tolist())
    flags = zip(
        pieces, encoded.supervised.tolist(), encoded.indivisible.tolist(), encoded.token_type_ids.tolist(), strict=True
    )
    for kind, group in groupby(flags, key=lambda flag: _kind(*flag)):
        texts = [flag[0] for flag in group]
        shown = texts if kind in ("text", "supervised") else texts[:1]
        yield Span(kind, tuple(text.replace("▁", " ") for text in shown), len(texts))


def _kind(piece: str, supervised: bool, indivisible: bool, image: int) -> str:
    if image:
        return "image"
    if indivisible and piece == "<world>":
        return "world"
    return "supervised" if supervised else "text"


def _media(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for message in messages:
        for part in message["content"] if not isinstance(message["content"], str) else ():
            if part["type"] in ("image", "video"):
                visual = part[part["type"]]
                yield tuple(_data_uri(frame) for frame in ([visual] if isinstance(visual, Image.Image) else visual))


def _data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
