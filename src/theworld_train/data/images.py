"""Opens image files that nobody vouches for, and turns every kind of pixel into RGB."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from theworld_train.data.source import MediaError

#: Formats that are decoded; of animations the first frame. Others have decoders that are rarely used and rarely tested.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
#: Largest image; Pillow itself warns above 89,478,485 pixels.
MAX_PIXELS = 8192 * 8192
#: Brightest values that images of 32-bit integers and of floats are taken to hold: the smallest that is not exceeded.
INTEGER_WHITES = (2**8 - 1, 2**16 - 1, 2**31 - 1)
FLOAT_WHITES = (1, 2**8 - 1, 2**16 - 1)


def open_image(path: Path) -> Image.Image:
    """Reads an image file.

    Returns:
        The image in RGB, upright by its EXIF orientation, transparent parts on white, detached from the file.

    Raises:
        MediaError: If the file is missing, no image of a known format, damaged or too large; the message names it.
    """
    try:
        with path.open("rb") as file:
            return _read(file, str(path))
    except OSError as error:
        raise MediaError(f"{path}: {error.strerror or error}") from error


def decode_image(data: bytes, name: str) -> Image.Image:
    """Reads an image from memory, like `open_image`; `name` names it in errors."""
    return _read(io.BytesIO(data), name)


def _read(file: BinaryIO, name: str) -> Image.Image:
    with warnings.catch_warnings():
        # Odd metadata are no one's concern here; a size at which Pillow would only warn is refused.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = _read_header(file, name)
        try:
            image.load()
            return to_rgb(_upright(image))
        except Exception as error:
            raise MediaError(f"{name}: the image is damaged: {error}") from error


def _read_header(file: BinaryIO, name: str) -> Image.Image:
    # Decoders of damaged data raise nearly every type of exception, hence the broad clauses of this module.
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{name}: the image has more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:
        raise MediaError(f"{name}: not an image in one of the formats {', '.join(FORMATS)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise MediaError(f"{name}: the image has more than {MAX_PIXELS:,} pixels ({image.width} x {image.height})")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB.

    Deep pixels are scaled to 8 bits, where Pillow would clip them. Integers and floats of 32 bits do not say which
    value is white; the smallest usual one that no pixel exceeds is taken.

    Raises:
        ValueError: If the mode has no conversion, or floats are not finite or above 65,535.
    """
    if image.mode.startswith("I;16"):
        return _scale(np.asarray(image, dtype=np.float64), (2**16 - 1,))
    if image.mode == "I":
        return _scale(np.asarray(image, dtype=np.float64), INTEGER_WHITES)
    if image.mode == "F":
        return _scale(np.asarray(image, dtype=np.float64), FLOAT_WHITES)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image.convert("RGB")


def _scale(values: NDArray[np.float64], whites: tuple[int, ...]) -> Image.Image:
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not finite")
    white = next((white for white in whites if values.max() <= white), None)
    if white is None:
        raise ValueError(f"pixels above {whites[-1]:,}")
    grey = np.rint(values.clip(0) * (255 / white)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # Malformed metadata around sound pixels are common, and viewers show such images as they are stored.
        return image
