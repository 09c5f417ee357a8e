"""Takes the screenshots of docs/reports.md: `make screenshots`, of runs that are there."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

IMAGES = Path(__file__).parent / "images"
#: Colours of the pictures, which keeps them small.
COLOURS = 256
MAX_BYTES = 200_000
WIDTH, HEIGHT = 1200, 2680
#: Pixels left below the last line of a short page.
MARGIN = 24
DARK, LIGHT = 0, 1
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def main() -> None:
    """Writes `report-run.png`, `report-pipeline.png` and `report-sweep.png`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    for kind in ("run", "pipeline", "sweep"):
        parser.add_argument(f"--{kind}", type=Path, required=True, help=f"directory of a {kind}")
    arguments = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"error: none of {', '.join(BROWSERS)} was found")
    IMAGES.mkdir(exist_ok=True)
    for kind, scheme in (("run", LIGHT), ("pipeline", DARK), ("sweep", LIGHT)):
        with tempfile.TemporaryDirectory() as folder:
            page, picture = Path(folder, "page.html"), Path(folder, "page.png")
            command = [sys.executable, "-m", "theworld_train", "report", str(getattr(arguments, kind))]
            subprocess.run([*command, "--out", str(page)], check=True)
            _photograph(browser, page, picture, scheme)
            _shrink(picture, IMAGES / f"report-{kind}.png")


def _photograph(browser: str, page: Path, picture: Path, scheme: int) -> None:
    command = [browser, "--headless", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={page.parent}/profile"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has no sandbox for root
    command += [f"--blink-settings=preferredColorScheme={scheme}", f"--window-size={WIDTH},{HEIGHT}"]
    command += [f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def _shrink(picture: Path, target: Path) -> None:
    """Writes a picture with few colours, without the empty rest below a short page."""
    image = Image.open(picture).convert("RGB")
    ground = Image.new("RGB", image.size)
    ground.paste(image.crop((0, image.height - 1, 1, image.height)).resize(image.size))
    box = ImageChops.difference(image, ground).getbbox()
    lowest = image.height if box is None else min(image.height, box[3] + MARGIN)
    whole = image.crop((0, 0, image.width, lowest))
    # Maximum coverage keeps the colours of thin lines, which a median cut gives up for shades of grey.
    few = whole.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(target, optimize=True)
    size = target.stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"error: {target} has {size:,} bytes, more than {MAX_BYTES:,}")
    print(f"{target}: {image.width} x {lowest} px, {size:,} bytes")


if __name__ == "__main__":
    main()
