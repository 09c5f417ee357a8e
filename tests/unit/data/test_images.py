"""Image files are checked before they are decoded, and every kind of pixel becomes the right RGB."""

from __future__ import annotations

import contextlib
import json
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from theworld_train.config.sources import JsonlSource
from theworld_train.data import MediaError, UnreadableSampleError, open_source
from theworld_train.data.images import MAX_PIXELS, decode_image, open_image, to_rgb

ORANGE = (200, 100, 50)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
def test_the_formats_that_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (5, 3), ORANGE).save(path)
    image = open_image(path)
    assert (image.mode, image.size) == ("RGB", (5, 3))
    assert np.abs(np.subtract(image.getpixel((2, 1)), ORANGE)).max() <= 4


@pytest.mark.parametrize("suffix", [".ico", ".ppm", ".tga", ".eps", ".pcx", ".jp2", ".icns"])
def test_other_formats_are_refused_even_in_disguise(tmp_path: Path, suffix: str) -> None:
    real, disguised = tmp_path / f"a{suffix}", tmp_path / "a.png"
    try:
        Image.new("RGB", (32, 32), ORANGE).save(real)
    except (OSError, KeyError):
        pytest.skip("this Pillow cannot write the format")
    disguised.write_bytes(real.read_bytes())
    for path in (real, disguised):
        with pytest.raises(MediaError, match="not an image in one of the formats PNG, JPEG"):
            open_image(path)


def test_the_content_counts_and_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    Image.new("RGB", (5, 3), ORANGE).save(path, format="PNG")
    assert open_image(path).size == (5, 3)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "green", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **options)
        assert open_image(tmp_path / name).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (10_000, 10_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(MediaError, match=r"bomb\.png: the image has more than 67,108,864 pixels"):
            decode_image(png_header(width, height), "bomb.png")


def test_the_cap_is_below_the_warning_level_of_pillow() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif", ".bmp", ".tif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_truncated_file_is_refused_with_its_path(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=str(path)):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"not an image", b"<html></html>"])
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(MediaError, match="not an image"):
        open_image(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\.png: No such file"):
        open_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("error")
def test_random_damage_raises_nothing_else_and_warns_of_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        path = tmp_path / f"a.{suffix}"
        noise.save(path)
        whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[random.integers(0, min(len(whole), 200), 8)] = random.integers(0, 255, 8)
            with contextlib.suppress(MediaError):
                assert decode_image(damaged.tobytes(), "x").mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_cameras_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (4, 2))
    upright.putpixel((0, 0), (255, 0, 0))
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.png"
    stored.save(path, exif=exif)
    image = open_image(path)
    assert image.size == (4, 2)
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_malformed_metadata_do_not_cost_the_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", (4, 2), ORANGE).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01")
    assert open_image(path).size == (4, 2)


def saved(tmp_path: Path, image: Image.Image, suffix: str = ".png", **options: Any) -> Image.Image:
    path = tmp_path / f"a{suffix}"
    image.save(path, **options)
    return open_image(path)


def test_grey_and_black_and_white(tmp_path: Path) -> None:
    assert saved(tmp_path, Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert saved(tmp_path, Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert saved(tmp_path, Image.new("1", (2, 2), 0)).getpixel((0, 0)) == (0, 0, 0)


def test_palettes(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, *ORANGE])
    assert saved(tmp_path, palette).getpixel((0, 0)) == ORANGE


def test_a_transparent_entry_of_a_palette_becomes_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, *ORANGE])
    palette.putpixel((0, 0), 0)
    image = saved(tmp_path, palette, transparency=0)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == ORANGE
    image = saved(tmp_path, palette, transparency=bytes([0, 128]))
    assert np.abs(np.subtract(image.getpixel((1, 1)), (227, 177, 152))).max() <= 1


def test_a_transparent_colour_becomes_white(tmp_path: Path) -> None:
    assert saved(tmp_path, Image.new("RGB", (2, 2), ORANGE), transparency=ORANGE).getpixel((0, 0)) == (255, 255, 255)
    assert saved(tmp_path, Image.new("L", (2, 2), 9), transparency=9).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(("alpha", "expected"), [(0, (255, 255, 255)), (255, ORANGE), (128, (227, 177, 152))])
def test_transparency_is_laid_on_white(tmp_path: Path, alpha: int, expected: tuple[int, int, int]) -> None:
    image = saved(tmp_path, Image.new("RGBA", (2, 2), (*ORANGE, alpha)))
    assert np.abs(np.subtract(image.getpixel((0, 0)), expected)).max() <= 1
    grey = saved(tmp_path, Image.new("LA", (2, 2), (100, alpha)))
    assert abs(grey.getpixel((0, 0))[0] - (255 * (255 - alpha) + 100 * alpha) / 255) <= 1


def test_a_palette_with_alpha() -> None:
    image = Image.new("RGBA", (2, 2), (*ORANGE, 0)).convert("PA")
    assert to_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 255)).convert("PA")).mode == "RGB"


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257, 1), (65535, 255), (32896, 128), (300, 1)])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, suffix: str, value: int, expected: int) -> None:
    deep = Image.fromarray(np.full((2, 2), value, dtype=np.uint16))
    assert deep.mode == "I;16"
    assert saved(tmp_path, deep, suffix).getpixel((0, 0)) == (expected,) * 3


def test_sixteen_bits_in_the_other_byte_order() -> None:
    big = Image.frombytes("I;16B", (1, 1), struct.pack(">H", 32896))
    assert to_rgb(big).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(("white", "expected"), [(255, 128), (65535, 128), (2**31 - 1, 128)])
def test_integers_are_scaled_by_the_smallest_usual_white(tmp_path: Path, white: int, expected: int) -> None:
    values = np.array([[-5, round(white * 128 / 255), white]], dtype=np.int32)
    image = saved(tmp_path, Image.fromarray(values), ".tif")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, expected, 255]


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_floats_are_scaled_by_the_smallest_usual_white(tmp_path: Path, white: int) -> None:
    values = np.array([[-0.5, white * 128 / 255, white]], dtype=np.float32)
    image = saved(tmp_path, Image.fromarray(values), ".tif")
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_floats_that_are_no_brightness_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(MediaError, match=r"a\.tif: the image is damaged: pixels"):
        saved(tmp_path, Image.fromarray(np.full((2, 2), value, dtype=np.float32)), ".tif")


def test_printers_colours(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), ".jpg", quality=100)
    assert np.abs(np.subtract(image.getpixel((0, 0)), (255, 0, 0))).max() <= 4


def test_video_colours(tmp_path: Path) -> None:
    image = saved(tmp_path, Image.new("RGB", (8, 8), ORANGE).convert("YCbCr"), ".jpg", quality=100)
    assert np.abs(np.subtract(image.getpixel((0, 0)), ORANGE)).max() <= 4


def test_the_file_can_be_removed_while_the_image_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2), ORANGE).save(path)
    image = open_image(path)
    path.unlink()
    assert image.copy().getpixel((0, 0)) == ORANGE


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))


#: Images as they are found, with what becomes of them: their size in RGB, or why their sample is replaced.
FOUND: dict[str, tuple[str, Image.Image, dict[str, Any], tuple[int, int] | str]] = {
    "greyscale": (".jpg", Image.new("L", (6, 4), 77), {}, (6, 4)),
    "black and white": (".png", Image.new("1", (6, 4), 1), {}, (6, 4)),
    "palette": (".gif", Image.new("P", (6, 4), 1), {}, (6, 4)),
    "alpha": (".png", Image.new("RGBA", (6, 4), (*ORANGE, 9)), {}, (6, 4)),
    "grey with alpha": (".png", Image.new("LA", (6, 4), (77, 9)), {}, (6, 4)),
    "16 bit": (".png", Image.fromarray(np.full((4, 6), 300, dtype=np.uint16)), {}, (6, 4)),
    "32 bit floats": (".tif", Image.fromarray(np.full((4, 6), 0.5, dtype=np.float32)), {}, (6, 4)),
    "CMYK": (".jpg", Image.new("CMYK", (6, 4), (0, 255, 255, 0)), {}, (6, 4)),
    "EXIF rotation": (".jpg", Image.new("RGB", (6, 4), ORANGE), {"exif": exif(6)}, (4, 6)),
    "animated GIF": (
        ".gif",
        Image.new("RGB", (6, 4), "red"),
        {"save_all": True, "append_images": [Image.new("RGB", (6, 4), "blue")]},
        (6, 4),
    ),
    "animated WebP": (
        ".webp",
        Image.new("RGB", (6, 4), "red"),
        {"save_all": True, "append_images": [Image.new("RGB", (6, 4), "blue")]},
        (6, 4),
    ),
    "1 x 1": (".png", Image.new("RGB", (1, 1), ORANGE), {}, (1, 1)),
    "1 x 1 animated GIF": (
        ".gif",
        Image.new("RGB", (1, 1), "red"),
        {"save_all": True, "append_images": [Image.new("RGB", (1, 1), "blue")]},
        (1, 1),
    ),
    "4,000 x 1": (".png", Image.new("RGB", (4000, 1), ORANGE), {}, (4000, 1)),
    "12,000 x 9,000": (".png", Image.new("1", (12_000, 9_000)), {}, "more than 67,108,864 pixels"),
    "truncated": (".jpg", noise((64, 64)), {"truncate": 0.5}, "the image is damaged"),
    "an empty file": (".jpg", noise((8, 8)), {"truncate": 0}, "not an image"),
}


@pytest.mark.parametrize(("suffix", "image", "options", "expected"), FOUND.values(), ids=FOUND)
def test_images_as_they_are_found_are_read_or_their_sample_is_replaced(
    tmp_path: Path, suffix: str, image: Image.Image, options: dict[str, Any], expected: tuple[int, int] | str
) -> None:
    """Through a source: what cannot be read costs its own sample, named, and neither the check nor another sample."""
    path = tmp_path / f"a{suffix}"
    share = options.get("truncate", 1)
    image.save(path, **{name: value for name, value in options.items() if name != "truncate"})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    turns = [{"role": "user", "content": [{"type": "image", "path": path.name}]}, {"role": "assistant", "content": "x"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns, "id": "odd"}) + "\n")
    source = open_source(JsonlSource(source="jsonl", path=str(rows)))
    assert list(source.check()) == []
    if isinstance(expected, str):
        with pytest.raises(UnreadableSampleError, match=rf"odd: .*a\{suffix}: .*{expected}"):
            source[0]
        return
    loaded = source[0].messages[0]["content"][0]["image"]
    assert (loaded.mode, loaded.size) == ("RGB", expected)
