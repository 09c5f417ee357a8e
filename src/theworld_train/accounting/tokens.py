"""How many tokens an image or a clip takes in the sequence: pure arithmetic on sides and frames."""

from __future__ import annotations

from typing import Literal

#: Pixels along one side of a latent cell of the Wan 2.1 VAE.
SPATIAL_COMPRESSION = 8
#: Frames that one latent frame after the first covers, in the same VAE.
TEMPORAL_COMPRESSION = 4

TokenLayout = Literal["spatial", "channel"]


def latent_frames(frames: int) -> int:
    """Returns the latent frames of a clip of 1 + 4k frames, which are 1 + k.

    Raises:
        ValueError: If `frames` is not 1 + 4k.
    """
    if frames < 1 or (frames - 1) % TEMPORAL_COMPRESSION:
        raise ValueError(f"a clip needs 1 + {TEMPORAL_COMPRESSION}k frames, got {frames}")
    return 1 + (frames - 1) // TEMPORAL_COMPRESSION


def clip_frames(latents: int) -> int:
    """Returns the frames of the clip that so many latent frames are of; `latent_frames` backwards."""
    return 1 + TEMPORAL_COMPRESSION * (latents - 1)


def latent_cells(resolution: int, pool: int = 1) -> int:
    """Returns the latent cells of a square frame with `resolution` pixels a side, averaged over `pool` x `pool`."""
    return (resolution // SPATIAL_COMPRESSION // pool) ** 2


def first_offset(frames: int, present: int) -> int:
    """Returns the offset from the present, in latent frames, of the first latent frame of a block.

    Args:
        frames: Frames of the block, 1 + 4k.
        present: Index of the present among them.

    Raises:
        ValueError: If no latent frame ends in the present.
    """
    if not 0 <= present < frames or present % TEMPORAL_COMPRESSION:
        raise ValueError(f"the present must be frame 0, 4, 8, ... of {frames}, got {present}")
    return -(present // TEMPORAL_COMPRESSION)


def world_tokens_per_frame(layout: TokenLayout, resolution: int, channels: int, *, pool: int) -> int:
    """Returns the `<world>` tokens of one latent frame: one per cell (`spatial`) or one per channel (`channel`)."""
    return latent_cells(resolution, pool) if layout == "spatial" else channels


def world_features(layout: TokenLayout, resolution: int, channels: int, *, pool: int) -> int:
    """Returns the features of one world token: the channels of a cell (`spatial`) or the cells of a channel."""
    return channels if layout == "spatial" else latent_cells(resolution, pool)


def world_tokens(layout: TokenLayout, resolution: int, channels: int, frames: int, *, pool: int) -> int:
    """Returns the `<world>` tokens of an image (`frames=1`) or clip, brackets not counted."""
    return latent_frames(frames) * world_tokens_per_frame(layout, resolution, channels, pool=pool)
