"""A tiny checkpoint on disk, what is loaded from it, and conversations to feed it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, Gemma3ForConditionalGeneration, Gemma3Processor

from theworld_train.batch import Batch
from theworld_train.config import dump_config, parse_run_config
from theworld_train.config.schema import RunConfig
from theworld_train.config.sources import MovingDigitsSource
from theworld_train.data import Collator, open_source
from theworld_train.data.moving_digits import WORDS, MovingDigits
from theworld_train.model import TheWorld, TheWorldProcessor
from theworld_train.model.build import write_tiny

#: Side that the tests fit frames to: 16 world tokens for each latent frame.
RESOLUTION = 32
#: Tokens of an image in the tiny model.
IMAGE_LENGTH = 16

Message = dict[str, Any]


@dataclass(frozen=True)
class TinyCheckpoint:
    """A tiny Gemma 3 and a tiny video VAE in the hub's layout.

    Attributes:
        directory: Holds `gemma/` and `cosmos/vae/`.
    """

    directory: Path

    @property
    def gemma(self) -> str:
        """Directory of the tiny Gemma 3."""
        return str(self.directory / "gemma")

    @property
    def cosmos(self) -> str:
        """Directory that has the tiny VAE under `vae`."""
        return str(self.directory / "cosmos")

    def theworld(self, seed: int = 0, **kwargs: Any) -> TheWorld:
        """Returns TheWorld on the tiny Gemma 3, its projector drawn from `seed`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return TheWorld.from_pretrained(self.gemma, **{"cosmos": self.cosmos, "resolution": RESOLUTION} | kwargs)

    def gemma3(self, **kwargs: Any) -> Gemma3ForConditionalGeneration:
        """Returns the tiny Gemma 3 as transformers loads it."""
        return Gemma3ForConditionalGeneration.from_pretrained(self.gemma, **kwargs)

    def processor(self, **kwargs: Any) -> TheWorldProcessor:
        """Returns TheWorld's processor on the tiny Gemma 3's."""
        return TheWorldProcessor.from_pretrained(self.gemma, **{"world_resolution": RESOLUTION} | kwargs)

    def gemma3_processor(self) -> Gemma3Processor:
        """Returns the tiny Gemma 3's own processor."""
        processor = AutoProcessor.from_pretrained(self.gemma)
        assert type(processor) is Gemma3Processor
        return processor


def digit_clips(number: int = 4) -> torch.Tensor:
    """Returns clips of moving digits `(number, 3, 9, 64, 64)` in [-1, 1]."""
    samples = MovingDigits(MovingDigitsSource(source="moving_digits", split="train", samples=number))
    clips = [samples[index].messages[0]["content"][0]["video"] for index in range(number)]
    pixels = torch.stack([torch.from_numpy(np.stack([np.asarray(frame) for frame in clip])) for clip in clips])
    return pixels.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0)


def write_tiny_checkpoint(directory: Path) -> TinyCheckpoint:
    """Writes a tiny checkpoint whose latent statistics are those of a few moving digits."""
    write_tiny(directory, WORDS, digit_clips())
    return TinyCheckpoint(directory)


def image(seed: int = 0, size: tuple[int, int] = (64, 64), mode: str = "RGB") -> Image.Image:
    """Returns an image of noise, different for each seed."""
    width, height = size
    channels = {"L": (), "LA": (2,), "P": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    if mode == "P":
        return Image.fromarray(pixels).convert("RGB").convert("P")
    return Image.fromarray(pixels, mode) if mode == "LA" else Image.fromarray(pixels)


def clip(seed: int = 0, frames: int = 5) -> list[Image.Image]:
    """Returns a clip of noise, different for each seed."""
    return [image(1000 * (seed + 1) + index) for index in range(frames)]


def parts(*contents: str | Image.Image | Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Returns content parts: strings are text, images are images and lists of images are clips."""
    result: list[dict[str, Any]] = []
    for content in contents:
        if isinstance(content, str):
            result.append({"type": "text", "text": content})
        elif isinstance(content, Image.Image):
            result.append({"type": "image", "image": content})
        else:
            result.append({"type": "video", "video": list(content)})
    return result


def user(*contents: str | Image.Image | Sequence[Image.Image]) -> Message:
    """Returns a turn of the user."""
    return {"role": "user", "content": parts(*contents)}


def assistant(text: str) -> Message:
    """Returns a turn of the model."""
    return {"role": "assistant", "content": parts(text)}


def write_run(
    tiny: TinyCheckpoint, directory: Path, *, steps: int, batch: int, workers: int = 0, **sections: Any
) -> Path:
    """Writes the config of a projection-only run in `directory/run`, for ranks that are launched, and returns it."""
    values = {
        "name": "run",
        "output_dir": str(directory / "run"),
        "precision": "fp32",
        "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION}},
        "trainable": {"world_projector": {}},
        "data": {
            "train": {"source": "moving_digits", "split": "train", "samples": 64, "frames": 1, "canvas": 32},
            "num_workers": workers,
        },
        "training": {"max_steps": steps, "global_batch_size": batch, "micro_batch_size": 1},
    }
    path = directory / "run.yaml"
    path.write_text(dump_config(parse_run_config(values | sections)))
    return path


def held_out(checkpoint: Path, config: RunConfig) -> Batch:
    """Returns the first four held-out samples of a run, as a checkpoint's processor encodes them."""
    source = open_source(config.data.eval)
    return Collator(TheWorldProcessor.from_pretrained(checkpoint), 4096)([source[index] for index in range(4)])


@torch.no_grad()
def logits(model: TheWorld, batch: Batch, **kwargs: Any) -> torch.Tensor:
    """Returns a model's logits of a batch."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
        pixel_values=batch.pixel_values,
        world_frames=batch.world_frames,
        world_frame_counts=batch.world_frame_counts,
        **kwargs,
    ).logits
