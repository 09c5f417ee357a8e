"""Reads clips: video files, directories of frames and lists of frames, by one rule for which frames are taken."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.images import MAX_PIXELS, open_image
from theworld_train.data.source import MediaError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer

#: Files of a directory that are taken for frames.
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
#: Containers that are opened. Playlists, which name further files and addresses, are not among them.
CONTAINERS = ("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpeg", "mpegts", "gif")


@dataclass(frozen=True)
class Timing:
    """Which stretch of a clip its frames are taken from; at most one of the first two is set.

    Attributes:
        window_s: The so many seconds next to the present; as far as the clip reaches if None.
        sample_fps: So many frames a second, counted from the present; as many as fit if None.
        directory_fps: Frames a second of clips whose frames are single images; None if unknown.
        present: Where in the clip the present lies, from 0 (its first frame) to 1 (its last).
        later: Whether the frames are taken from the present on, and not up to it.
        exact: Whether fewer frames than are asked for are refused.
    """

    window_s: float | None = None
    sample_fps: float | None = None
    directory_fps: float | None = None
    present: float = 1.0
    later: bool = False
    exact: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether the frames of a clip depend on its frame rate."""
        return self.window_s is not None or self.sample_fps is not None


#: Frames from the whole clip up to its last one, whatever its frame rate.
WHOLE_CLIP = Timing()


def select_frames(
    available: int, max_frames: int, timing: Timing = WHOLE_CLIP, frame_rate: float | None = None
) -> list[int]:
    """Returns the indices of the frames that are taken from a clip.

    Their number is the largest 1 + 4k that neither exceeds what there is nor what is asked for, since the video VAE
    keeps the first frame by itself and compresses the others by four. They are spread evenly and end in the present,
    or begin with it.

    Args:
        available: Frames of the clip, at least 1.
        max_frames: Frames that are asked for, at least 1.
        timing: Which stretch of the clip they come from.
        frame_rate: Frames of the clip a second; needed if `timing` depends on it.

    Raises:
        MediaError: If there are too few, and `timing` asks for the exact number.
    """
    present = round(timing.present * (available - 1))
    reach = available - present if timing.later else present + 1
    found = _up_to_present(reach, max_frames, timing, frame_rate)
    if timing.exact and len(found) < max_frames:
        side = "from the present on" if timing.later else "up to the present"
        sampled = f", of which the source's rule of time gives {len(found)}" if timing.is_needed else ""
        steps = (max_frames - 1) // 4
        message = f"has {reach} frames {side}{sampled}, and {steps} world steps need {max_frames}, 1 + 4 x {steps}"
        raise MediaError(message)
    # The future is taken by the same rule, looking the other way.
    return [present + reach - 1 - index for index in reversed(found)] if timing.later else found


def _up_to_present(available: int, max_frames: int, timing: Timing, frame_rate: float | None) -> list[int]:
    """Returns the indices of frames that end in the last one of those that there are."""
    if not timing.is_needed:
        return _spread(0, available - 1, min(available, max_frames))
    assert frame_rate is not None, "whoever asks for a stretch in seconds knows the frame rate"
    if timing.window_s is not None:
        # So many intervals reach back to the window's beginning; the tolerance is for products such as 0.3 s x 10 fps.
        frames = min(available, 1 + int(timing.window_s * frame_rate + 1e-6))
        return _spread(available - frames, available - 1, min(frames, max_frames))
    assert timing.sample_fps is not None
    stride = max(frame_rate / timing.sample_fps, 1.0)
    frames = min(1 + int((available - 1) / stride + 1e-6), max_frames)
    intervals = (frames - 1) // 4 * 4
    return [available - 1 - round(i * stride) for i in range(intervals, -1, -1)]


def _spread(first: int, last: int, most: int) -> list[int]:
    """Returns the largest 1 + 4k of at most `most` indices, spread evenly from `first` to `last`."""
    intervals = (most - 1) // 4 * 4
    if not intervals:
        return [last]
    return [first + (2 * i * (last - first) + intervals) // (2 * intervals) for i in range(intervals + 1)]


def read_clip(path: Path, max_frames: int, timing: Timing = WHOLE_CLIP) -> list[Image.Image]:
    """Reads a video file, or a directory whose images in name order are the frames.

    Args:
        path: File or directory.
        max_frames: Most frames to take.
        timing: Which stretch of the clip they come from.

    Returns:
        The frames that `select_frames` names, in RGB and upright.

    Raises:
        MediaError: If the clip is damaged, of no known format, too large, empty or too short; the message names it.
        ConfigError: If the package that decodes videos is missing.
    """
    if path.is_dir():
        return read_frames(frame_files(path), max_frames, path, timing)
    return read_video(path, str(path), max_frames, timing)


def read_video(file: Path | bytes, name: str, max_frames: int, timing: Timing = WHOLE_CLIP) -> list[Image.Image]:
    """Reads a video file, or what it holds, like `read_clip`; `name` names it in errors."""
    _require_decoder(name)
    packets = _count_packets(file, name)
    frame_rate = _frame_rate(file, name) if timing.is_needed else None
    frames, decoded = _decode(file, name, select(name, max(packets, 1), max_frames, timing, frame_rate))
    if decoded != packets:
        # Some packets hold no frame, or several; only decoding tells, and then the choice is made again.
        if not decoded:
            raise MediaError(f"{name}: the video holds no frames")
        frames, _ = _decode(file, name, select(name, decoded, max_frames, timing, frame_rate))
    return frames


def clip_length(path: Path, max_frames: int, timing: Timing = WHOLE_CLIP) -> int:
    """Returns the frames that `read_clip` takes; a directory is listed for it, of a video file the packets counted.

    Where packets hold no frame, or several, only decoding would tell.

    Raises:
        MediaError: If the clip is damaged, of no known format, too large or empty; the message names it.
        ConfigError: If the package that decodes videos is missing.
    """
    if path.is_dir():
        files = frame_files(path)
        if not files:
            raise MediaError(f"{path}: the directory holds no frames")
        return len(select(str(path), len(files), max_frames, timing, timing.directory_fps))
    return video_length(path, str(path), max_frames, timing)


def video_length(file: Path | bytes, name: str, max_frames: int, timing: Timing = WHOLE_CLIP) -> int:
    """Returns the frames that `read_video` takes, like `clip_length`."""
    _require_decoder(name)
    frame_rate = _frame_rate(file, name) if timing.is_needed else None
    return len(select(name, max(_count_packets(file, name), 1), max_frames, timing, frame_rate))


def read_frames(
    paths: Sequence[Path], max_frames: int, name: Path | None = None, timing: Timing = WHOLE_CLIP
) -> list[Image.Image]:
    """Reads a clip whose frames are image files, in the order given; `name` names the clip in errors."""
    if not paths:
        raise MediaError(f"{name}: the directory holds no frames")
    selected = select(str(name or paths[0]), len(paths), max_frames, timing, timing.directory_fps)
    return [open_image(paths[index]) for index in selected]


def select(name: str, available: int, max_frames: int, timing: Timing, frame_rate: float | None) -> list[int]:
    """Selects frames of a clip as `select_frames` does; errors name the clip, or the first of its frames."""
    try:
        return select_frames(available, max_frames, timing, frame_rate)
    except MediaError as error:
        raise MediaError(f"{name}: the clip {error}") from error


def frame_files(directory: Path) -> list[Path]:
    """Returns the images of a directory in name order; hidden files are left out."""
    files = [f for f in directory.iterdir() if f.suffix.lower() in FRAME_SUFFIXES and not f.name.startswith(".")]
    return sorted(files, key=lambda file: file.name)


def missing_decoder(source: str) -> Problem | None:
    """Returns a problem that says how to install the package that decodes video files, if it is missing."""
    if find_spec("av") is not None:
        return None
    message = "reading video files needs the package 'av', which is not installed"
    return Problem(message, source=source, hint="pip install 'theworld-train[video]'")


def _require_decoder(name: str) -> None:
    problem = missing_decoder(name)
    if problem is not None:
        raise ConfigError(problem)


def _open(file: Path | bytes, name: str) -> InputContainer:
    import av

    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    opened = io.BytesIO(file) if isinstance(file, bytes) else str(file)
    container = av.open(opened, mode="r", options=options)
    if not container.streams.video:
        container.close()
        raise MediaError(f"{name}: the file holds no video")
    stream = container.streams.video[0]
    if stream.codec_context.width * stream.codec_context.height > MAX_PIXELS:
        container.close()
        raise MediaError(f"{name}: the frames have more than {MAX_PIXELS:,} pixels")
    return container


def _count_packets(file: Path | bytes, name: str) -> int:
    with _damage(name), _open(file, name) as container:
        return sum(1 for packet in container.demux(video=0) if packet.size)


def _frame_rate(file: Path | bytes, name: str) -> float:
    """Returns the frames of a video a second, on average."""
    with _damage(name), _open(file, name) as container:
        rate = container.streams.video[0].average_rate
    if not rate:
        raise MediaError(f"{name}: the video does not tell its frame rate")
    return float(rate)


def _decode(file: Path | bytes, name: str, wanted: Collection[int]) -> tuple[list[Image.Image], int]:
    """Returns the wanted frames that there are, and the number of frames that there are."""
    frames = []
    count = 0
    with _damage(name), _open(file, name) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            if count in wanted:
                frames.append(_upright(frame))
            count += 1
    return frames, count


@contextmanager
def _damage(name: str) -> Iterator[None]:
    """Turns whatever a decoder raises into a `MediaError` that names the file."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{name}: not a video in a known format, or damaged: {error}") from error


def _upright(frame: VideoFrame) -> Image.Image:
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
