"""Finds and loads the media that a row names; a row reaches nothing outside of one directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from theworld_train.batch import Blank
from theworld_train.config.errors import Problem
from theworld_train.data.conversation import Conversation, ImagePart, TextPart, VideoPart
from theworld_train.data.formats import Adapted
from theworld_train.data.images import decode_image, open_image
from theworld_train.data.rows import Later
from theworld_train.data.source import MediaError
from theworld_train.data.video import (
    FRAME_SUFFIXES,
    WHOLE_CLIP,
    Timing,
    clip_length,
    frame_files,
    read_clip,
    read_frames,
    read_video,
    select,
    video_length,
)

#: Bytes of a name that file systems take.
LONGEST_NAME = 255
MISSING = "no such file"
NO_FRAME_RATE = "the clip does not tell its frame rate"
NO_PATHS = "paths have no meaning in a dataset, whose media are its 'images' and 'videos'"
NO_BYTES = "the image or clip has no bytes"
#: How to mend what is wrong with a medium.
HINTS = {
    MISSING: "paths are relative to the media root, the data file's directory unless media_root is set",
    NO_FRAME_RATE: "set directory_fps",
    NO_PATHS: "use a part with an 'index'",
    NO_BYTES: "save the dataset with its media embedded",
}


class RefusedMediumError(ValueError):
    """Raised for a path that a row may not name, or a clip that the source's settings do not fit; for users to read."""


def locate(root: Path, name: object) -> Path:
    """Returns the absolute path of a medium.

    Absolute paths, paths that lead out of the directory by `..` or by a symbolic link, and URLs are refused: a data
    file from elsewhere must not be able to read the rest of the disk or to reach the network.

    Args:
        root: Directory that it must not leave, resolved: that of the data file unless the config names another.
        name: Path relative to it.

    Raises:
        RefusedMediumError: If the path is refused; the message is for users.
    """
    if not isinstance(name, str) or not name:
        raise RefusedMediumError("a medium is named by its path")
    if "://" in name or name.startswith("data:"):
        raise RefusedMediumError("media are files; nothing is fetched while training")
    if "\0" in name:
        raise RefusedMediumError("the path holds a null character")
    if Path(name).is_absolute():
        raise RefusedMediumError(f"media paths are relative to the media root, {root}")
    if any(len(part.encode()) > LONGEST_NAME for part in Path(name).parts):
        raise RefusedMediumError("a part of the path is too long for a name: is it the medium itself?")
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # links that lead in a circle
        raise RefusedMediumError(f"the path cannot be followed: {error}") from error
    if not path.is_relative_to(root):
        raise RefusedMediumError(f"the path leaves the media root, {root}")
    return path


@dataclass(frozen=True)
class Media:
    """Where the media of a source are, and how its clips are read.

    Attributes:
        root: Directory that paths are relative to, resolved; None if the rows hold their images themselves, and paths
            are refused.
        max_video_frames: Frames that are taken from a clip at most.
        timing: Which stretch of a clip they come from.
    """

    root: Path | None
    max_video_frames: int = 1
    timing: Timing = WHOLE_CLIP

    def check(self, conversation: Conversation, source: str) -> Iterator[Problem]:
        """Yields a problem for each medium of a row that is refused or missing; opens none of them.

        Args:
            conversation: The parsed row.
            source: Names the row in problems.
        """
        for part in conversation.media():
            for name, message in self._problems(part, conversation):
                yield Problem(message, source=source, key=part.key, value=name, hint=HINTS.get(message))

    def load(self, conversation: Conversation, adapted: Adapted) -> list[dict[str, Any]]:
        """Loads the media of a row.

        Args:
            conversation: The parsed row.
            adapted: What it was parsed from, which names its fields and may retouch its images.

        Returns:
            Messages in the chat template's format.

        Raises:
            MediaError: If a medium is damaged or has gone missing, or a clip is too short.
            RefusedMediumError: If a path is refused, or a clip lacks its frame rate.
        """

        def image(part: ImagePart) -> Image.Image:
            entry = _entry(part, conversation)
            data = embedded(entry)
            name = adapted.own_key(part.key)
            loaded = open_image(self._locate(entry)) if data is None else decode_image(_read(data, name), name)
            return loaded if adapted.retouch is None else adapted.retouch(loaded)

        def video(part: VideoPart) -> list[Image.Image]:
            if part.frames:
                self._check_frame_rate()
                paths = [self._locate(name) for name in part.frames]
                return read_frames(paths, self.max_video_frames, timing=self.timing)
            entry = _entry(part, conversation)
            data = embedded(entry)
            if data is not None:
                name = adapted.own_key(part.key)
                return read_video(_read(data, name), name, self.max_video_frames, self.timing)
            return read_clip(self._locate_clip(entry), self.max_video_frames, self.timing)

        return build_messages(conversation, image, video, self._present)

    def outline(self, conversation: Conversation, adapted: Adapted) -> list[dict[str, Any]]:
        """Renders a row with blanks for its media; of clips, only video files are opened, to count their frames.

        Args:
            conversation: The parsed row.
            adapted: What it was parsed from, which names its fields.

        Raises:
            MediaError: If a video file is damaged or has gone missing, or a clip is too short.
            RefusedMediumError: If a path is refused, or a clip lacks its frame rate.
        """

        def video(part: VideoPart) -> Blank:
            timing, most = self.timing, self.max_video_frames
            if part.frames:
                self._check_frame_rate()
                first = str(self._locate(part.frames[0]))
                return Blank(len(select(first, len(part.frames), most, timing, timing.directory_fps)))
            entry = _entry(part, conversation)
            data = embedded(entry)
            if data is not None:
                name = adapted.own_key(part.key)
                return Blank(video_length(_read(data, name), name, most, timing))
            return Blank(clip_length(self._locate_clip(entry), most, timing))

        return build_messages(conversation, lambda _: Blank(), video, self._present)

    @property
    def _present(self) -> int | None:
        """Index of the present among the frames of a clip; None if it is the last one."""
        return 0 if self.timing.later else None

    def holds_video_file(self, conversation: Conversation) -> bool:
        """Whether a row whose media were checked needs the package that decodes video files."""
        videos = (part for part in conversation.media() if isinstance(part, VideoPart))
        entries = [_entry(video, conversation) for video in videos if not video.frames]
        return any(embedded(entry) is not None or self._locate(entry).is_file() for entry in entries)

    def _locate(self, entry: object) -> Path:
        """Returns the path of a medium, which an image may hold beside the bytes that it lacks."""
        name = entry.get("path") if isinstance(entry, dict) else entry
        if self.root is None:
            raise RefusedMediumError(NO_PATHS if name else NO_BYTES)
        return locate(self.root, name)

    def _locate_clip(self, name: object) -> Path:
        path = self._locate(name)
        if path.is_dir():
            assert self.root is not None, "without a root, no path is located"
            for frame in frame_files(path):
                if frame.is_symlink() and not frame.resolve().is_relative_to(self.root):
                    raise RefusedMediumError(f"its frame {frame.name} leaves the media root, {self.root}")
            self._check_frame_rate()
        return path

    def _check_frame_rate(self) -> None:
        """Refuses a clip of single images if its frame rate is needed and not stated."""
        if self.timing.is_needed and self.timing.directory_fps is None:
            raise RefusedMediumError(NO_FRAME_RATE)

    def _problems(self, part: ImagePart | VideoPart, conversation: Conversation) -> Iterator[tuple[object, str]]:
        """Yields the name and the message of each problem of one part."""
        names: tuple[object, ...]
        if isinstance(part, VideoPart) and part.frames:
            names = part.frames
        else:
            entry = _entry(part, conversation)
            names = () if embedded(entry) is not None else (entry,)
        is_clip = isinstance(part, VideoPart) and not part.frames
        for name in names:
            message = self._file_problem(name, is_clip)
            if message is not None:
                yield name, message
        if isinstance(part, VideoPart) and part.frames:
            try:
                self._check_frame_rate()
            except RefusedMediumError as error:
                yield None, str(error)

    def _file_problem(self, entry: object, is_clip: bool) -> str | None:
        try:
            path = self._locate_clip(entry) if is_clip else self._locate(entry)
            if is_clip and path.is_dir():
                suffixes = ", ".join(FRAME_SUFFIXES)
                return None if frame_files(path) else f"the directory holds no frames ({suffixes})"
            return None if path.is_file() else MISSING
        except RefusedMediumError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror}"


def embedded(entry: object) -> bytes | Later | None:
    """Returns the bytes of an image or a clip that a row holds itself, or None if it names a file."""
    data = entry.get("bytes") if isinstance(entry, dict) else entry
    return data if isinstance(data, bytes | Later) else None


def _read(data: bytes | Later, name: str) -> bytes:
    """Returns the bytes of a medium that a row holds; raises MediaError, which names it."""
    try:
        return data.read() if isinstance(data, Later) else data
    except OSError as error:
        raise MediaError(f"{name}: cannot be read: {error}") from error


def build_messages(
    conversation: Conversation,
    image: Callable[[ImagePart], Image.Image | Blank],
    video: Callable[[VideoPart], list[Image.Image] | Blank],
    present: int | None = None,
) -> list[dict[str, Any]]:
    """Renders a parsed row in the chat template's format, its media loaded by the two functions.

    Args:
        conversation: The parsed row.
        image: Loads an image.
        video: Loads a clip.
        present: Index of the present among the frames of each clip; the last one if None.
    """
    stated = {} if present is None else {"present": present}

    def content(part: TextPart | ImagePart | VideoPart) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if isinstance(part, ImagePart):
            return {"type": "image", "image": image(part)}
        return {"type": "video", "video": video(part), **stated}

    return [{"role": m.role, "content": [content(part) for part in m.parts]} for m in conversation.messages]


def _entry(part: ImagePart | VideoPart, conversation: Conversation) -> object:
    """Returns the path of a medium that is no list of frames, or what the row lists for it."""
    if part.path is not None:
        return part.path
    assert part.index is not None
    entry: object = (conversation.images if isinstance(part, ImagePart) else conversation.videos)[part.index]
    return entry
