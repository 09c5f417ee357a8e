"""The tiny model of the quickstart, with a VAE whose statistics are those of moving-digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from theworld_train.config.errors import ConfigError
from theworld_train.config.sources import MovingDigitsSource
from theworld_train.data import open_source
from theworld_train.data.moving_digits import WORDS
from theworld_train.model.build import write_tiny
from theworld_train.model.processing import fit_frame


def build_tiny(directory: Path, seed: int = 0, resolution: int = 32) -> bool:
    """Writes the tiny Gemma 3 and the tiny video generator of the quickstart, unless they are there already.

    Args:
        directory: Receives `gemma/` and `cosmos/`.
        seed: Seed of the weights.
        resolution: Side that clips are fitted to while the VAE's statistics are measured.

    Returns:
        Whether anything was written.

    Raises:
        ConfigError: If the directory holds something else.
    """
    mark = directory / "tiny.json"
    facts = {"format": 2, "seed": seed, "resolution": resolution}
    if mark.is_file() and json.loads(mark.read_text()) == facts:
        return False
    if directory.exists() and not mark.is_file() and any(directory.iterdir()):
        raise ConfigError(f"{directory} holds something else than a tiny model; name another directory")
    clips = open_source(MovingDigitsSource(source="moving_digits", split="train", samples=128, speed=6))
    frames = []
    for index in range(len(clips)):
        video = clips[index].messages[0]["content"][0]["video"]
        frames.append(np.stack([np.asarray(fit_frame(frame, resolution, "pad")) for frame in video]))
    tensor = torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0)
    shutil.rmtree(directory, ignore_errors=True)
    write_tiny(directory, WORDS, tensor, seed)
    mark.write_text(json.dumps(facts))
    return True
