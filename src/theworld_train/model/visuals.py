"""Images and clips as the processor takes them: which frames they have, which one is the present, what is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from theworld_train.accounting.tokens import clip_frames, first_offset
from theworld_train.batch import ROLLOUT, Blank, Known, KnownEncodings
from theworld_train.config.components import Component


@dataclass(frozen=True)
class Clip:
    """Frames in time order, one of which is the present.

    Attributes:
        frames: The frames.
        present: Index of the one that the vision tower sees; those before and after it come in fours.
    """

    frames: Sequence[Image.Image] | Blank
    present: int

    def __post_init__(self) -> None:
        """Checks that a latent frame ends in the present.

        Raises:
            ValueError: If none does.
        """
        first_offset(num_frames(self), self.present)


@dataclass(frozen=True)
class Rollout:
    """A present whose future has been generated.

    Attributes:
        present: What the vision tower sees.
        steps: Latent frames that follow it.
    """

    present: Image.Image | Blank
    steps: int


#: An image, or a clip; frames alone end in the present.
Visual = Image.Image | Sequence[Image.Image] | Blank | Clip | Rollout
#: What `TheWorldProcessor` takes: one image, the images of one text, or for each text its images and clips.
Images = Image.Image | Sequence[Image.Image] | Sequence[Sequence[Visual]] | None


def collect_visuals(messages: Sequence[dict[str, Any]]) -> list[Visual]:
    """Returns the images and clips of a conversation in the order of their parts.

    A part may state `present`, the index of the frame that the vision tower sees, or `steps`, the latent frames that
    have been generated from the present.

    Raises:
        ValueError: If a visual part holds no loaded image, or no latent frame ends in its present.
    """
    visuals: list[Visual] = []
    for message in messages:
        for part in message["content"] if not isinstance(message["content"], str) else ():
            if part["type"] not in ("image", "video"):
                continue
            visual = part.get(part["type"])
            if not isinstance(visual, Image.Image | Blank) and not (visual and isinstance(visual[0], Image.Image)):
                raise ValueError(f"a part of type {part['type']!r} holds no loaded image under {part['type']!r}")
            if part.get("steps") is not None:
                visual = Rollout(visual if isinstance(visual, Blank) else present_of(visual), part["steps"])
            elif part.get("present") is not None:
                visual = Clip([visual] if isinstance(visual, Image.Image) else visual, part["present"])
            visuals.append(visual)
    return visuals


def is_blank(visual: Visual) -> bool:
    """Whether there are no pixels."""
    inner = visual.frames if isinstance(visual, Clip) else visual.present if isinstance(visual, Rollout) else visual
    return isinstance(inner, Blank)


def num_frames(visual: Visual) -> int:
    """Returns the frames that a world block spans, generated ones included."""
    if isinstance(visual, Rollout):
        return clip_frames(1 + visual.steps)
    frames = visual.frames if isinstance(visual, Clip) else visual
    if isinstance(frames, Blank):
        return frames.frames
    return 1 if isinstance(frames, Image.Image) else len(frames)


def offset_of(visual: Visual) -> int:
    """Returns the offset of the first latent frame from the present.

    Raises:
        ValueError: If no latent frame ends in the present.
    """
    frames = num_frames(visual)
    if isinstance(visual, Rollout):
        return 0
    return first_offset(frames, visual.present if isinstance(visual, Clip) else frames - 1)


def frames_of(visual: Visual) -> Sequence[Image.Image]:
    """Returns the frames of a visual that is not blank; of a rollout, the present alone."""
    frames = visual.frames if isinstance(visual, Clip) else visual.present if isinstance(visual, Rollout) else visual
    assert not isinstance(frames, Blank | Clip | Rollout), "a blank has no frames"
    return [frames] if isinstance(frames, Image.Image) else frames


def present_of(visual: Visual) -> Image.Image:
    """Returns the frame that the vision tower sees, in RGB."""
    frame = frames_of(visual)[visual.present if isinstance(visual, Clip) else -1]
    return frame if frame.mode == "RGB" else frame.convert("RGB")


V = TypeVar("V")


def look_up(
    known: Known | None, visuals: Sequence[V], frames_of: Callable[[V], Sequence[Image.Image]]
) -> tuple[tuple[Tensor | None, ...], Sequence[V]]:
    """Returns what is known of each visual, and those that are not known; nothing and all if none is looked up."""
    if known is None:
        return (), visuals
    found = tuple(known.find(frames_of(visual)) for visual in visuals)
    return found, [visual for visual, there in zip(visuals, found, strict=True) if there is None]


def look_up_latents(
    known: KnownEncodings, visuals: Sequence[Visual]
) -> tuple[tuple[Tensor | None, ...], Sequence[Visual]]:
    """Does the same for world blocks; where rollouts are not looked up, they are left out of both.

    Raises:
        ValueError: If a rollout is missing or too short.
    """
    encoder, rollouts = known.get(Component.WORLD_ENCODER), known.get(ROLLOUT)
    if rollouts is None:
        return look_up(encoder, [visual for visual in visuals if not isinstance(visual, Rollout)], frames_of)
    found: list[Tensor | None] = []
    for visual in visuals:
        if isinstance(visual, Rollout):
            found.append(_find_rollout(rollouts, visual))
        else:
            found.append(None if encoder is None else encoder.find(frames_of(visual)))
    return tuple(found), [visual for visual, there in zip(visuals, found, strict=True) if there is None]


def _find_rollout(rollouts: Known, visual: Rollout) -> Tensor:
    latents = rollouts.find(frames_of(visual))
    if latents is None:
        raise ValueError("data.encoded holds no rollout of its image")
    if len(latents) <= visual.steps:
        raise ValueError(f"the rollout of its image has {len(latents) - 1} steps, and {visual.steps} are asked for")
    return latents[: 1 + visual.steps]


def nest_visuals(images: Images, texts: int) -> list[list[Visual]]:
    """Brings the forms that the processor accepts to a list of visuals for each text."""
    if images is None:
        return [[] for _ in range(texts)]
    if isinstance(images, Image.Image):
        return [[images]]
    single = [item for item in images if isinstance(item, Image.Image)]
    if texts == 1 and len(single) == len(images):
        return [[*single]]
    return [[item] if isinstance(item, Image.Image) else list(item) for item in images]
