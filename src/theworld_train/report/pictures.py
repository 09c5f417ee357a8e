"""Images and clips of sample answers, small enough for a page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from theworld_train.config.sources import Source as SourceConfig
from theworld_train.data import Source, open_source

#: Longest side of a picture on the page, in pixels.
THUMBNAIL = 192
#: Frames shown of a clip, the first and the last among them.
FRAMES = 5
#: Bytes of data URIs on one page; pictures that come after are left out.
MAX_BYTES = 4_000_000

Frames = tuple[str, ...]


def pictures_of(
    data: Mapping[str, Any], answers: list[dict[str, Any]], *, max_bytes: int = MAX_BYTES
) -> tuple[list[tuple[Frames, ...]], str | None]:
    """Opens held-out data and returns the media of some of their samples.

    Args:
        data: The section of the run config that describes the data.
        answers: Records of answers, whose `index` and `id` name a sample.
        max_bytes: Bytes of data URIs in all.

    Returns:
        Of each answer, its images and clips as frames; and why some are missing, or None.
    """
    nothing: list[tuple[Frames, ...]] = [() for _ in answers]
    try:
        # As JSON, since lists are no tuples to a strict section in Python.
        config: Any = TypeAdapter(SourceConfig).validate_json(json.dumps(dict(data)))
        source = open_source(config)
    except ValidationError:
        return nothing, "this version cannot read data.eval"
    except Exception as error:  # whatever data meet, the answers stand without them
        return nothing, _reason(error)
    media, left, problem = [], max_bytes, None
    for answer in answers:
        try:
            frames = _media(source, answer)
        except Exception as error:  # a decoder's, too
            frames, problem = (), f"{answer.get('id')}: {_reason(error)}"
        size = sum(len(uri) for clip in frames for uri in clip)
        if size > left:
            frames, problem = (), f"they would take more than {max_bytes:,} bytes"
        else:
            left -= size
        media.append(frames)
    return media, problem


def _reason(error: Exception) -> str:
    """Returns what an error says, on one line."""
    said = "; ".join(str(error).splitlines()[:3])
    return said or type(error).__name__


def _media(source: Source, answer: Mapping[str, Any]) -> tuple[Frames, ...]:
    """Returns the images and clips of a sample.

    Raises:
        LookupError: If the data hold another sample in its place, or none.
    """
    index = answer.get("index")
    if not isinstance(index, int) or not 0 <= index < len(source):
        raise LookupError(f"the data hold no sample {index!r}")
    sample = source[index]
    if sample.id != answer.get("id"):
        raise LookupError(f"sample {index} of the data is now {sample.id}")
    found = []
    for message in sample.messages:
        for part in () if isinstance(message["content"], str) else message["content"]:
            if part["type"] in ("image", "video"):
                visual = part[part["type"]]
                found.append(tuple(map(data_uri, [visual] if isinstance(visual, Image.Image) else _some(visual))))
    return tuple(found)


def _some(frames: Sequence[Image.Image]) -> list[Image.Image]:
    """Returns a few frames at equal distances, the first and the last among them."""
    if len(frames) <= FRAMES:
        return list(frames)
    return [frames[round(index * (len(frames) - 1) / (FRAMES - 1))] for index in range(FRAMES)]


def data_uri(image: Image.Image) -> str:
    """Returns a small copy of a picture: PNG if it was small already, else JPEG."""
    small = image.convert("RGB")
    kind = "PNG" if max(small.size) <= THUMBNAIL // 2 else "JPEG"
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
