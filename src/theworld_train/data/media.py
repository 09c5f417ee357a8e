"""Finds and loads the media that a row names; a row reaches nothing outside the directory of its own file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from theworld_train.batch import Blank
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.data.conversation import Conversation, ImagePart, TextPart, VideoPart
from theworld_train.data.images import open_image
from theworld_train.data.video import FRAME_SUFFIXES, clip_length, frame_files, read_clip, read_frames, select_frames

MISSING = "no such file"


def locate(root: Path, name: object) -> Path:
    """Returns the absolute path of a medium.

    Absolute paths, paths that lead out of the directory by `..` or by a symbolic link, and URLs are refused: a data
    file from elsewhere must not be able to read the rest of the disk or to reach the network.

    Args:
        root: Directory of the data file, resolved.
        name: Path relative to it.

    Raises:
        ValueError: If the path is refused; the message is for users.
    """
    if not isinstance(name, str) or not name:
        raise ValueError("a medium is named by its path")
    if "://" in name or name.startswith("data:"):
        raise ValueError("media are files; nothing is fetched while training")
    if "\0" in name:
        raise ValueError("the path holds a null character")
    if Path(name).is_absolute():
        raise ValueError(f"media paths are relative to the data file's directory, {root}")
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"the path leaves the data file's directory, {root}")
    return path


def check_media(conversation: Conversation, root: Path, source: str) -> Iterator[Problem]:
    """Yields a problem for each medium of a row that is refused or missing; opens none of them."""
    for part in conversation.media():
        for name, message in _media_problems(part, conversation, root):
            yield Problem(message, source=source, key=part.key, value=name, hint=_hint(message))


def load_messages(conversation: Conversation, root: Path, max_video_frames: int, source: str) -> list[dict[str, Any]]:
    """Loads the media of a row whose images are paths.

    Args:
        conversation: The parsed row.
        root: Directory of the data file, resolved.
        max_video_frames: Frames taken from a clip.
        source: Names the row in errors.

    Returns:
        Messages in the chat template's format.

    Raises:
        MediaError: If a medium is damaged or has gone missing.
        ConfigError: If a path is refused.
    """

    def image(part: ImagePart) -> Image.Image:
        return open_image(_path(root, _image_name(part, conversation), source))

    def video(part: VideoPart) -> list[Image.Image]:
        if part.frames:
            return read_frames([_path(root, name, source) for name in part.frames], max_video_frames)
        return read_clip(_path(root, part.path, source), max_video_frames)

    return build_messages(conversation, image, video)


def outline_messages(
    conversation: Conversation, root: Path, max_video_frames: int, source: str
) -> list[dict[str, Any]]:
    """Renders a row with blanks for its media; of clips, only video files are opened, to count their frames.

    Arguments and errors are those of `load_messages`.
    """

    def video(part: VideoPart) -> Blank:
        if part.frames:
            return Blank(len(select_frames(len(part.frames), max_video_frames)))
        return Blank(clip_length(_path(root, part.path, source), max_video_frames))

    return build_messages(conversation, lambda _: Blank(), video)


def _path(root: Path, name: object, source: str) -> Path:
    try:
        return locate(root, name)
    except ValueError as error:
        raise ConfigError(Problem(str(error), source=source, value=name)) from None


def build_messages(
    conversation: Conversation,
    image: Callable[[ImagePart], Image.Image | Blank],
    video: Callable[[VideoPart], list[Image.Image] | Blank],
) -> list[dict[str, Any]]:
    """Renders a parsed row in the chat template's format, its media loaded by the two functions."""

    def content(part: TextPart | ImagePart | VideoPart) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if isinstance(part, ImagePart):
            return {"type": "image", "image": image(part)}
        return {"type": "video", "video": video(part)}

    return [{"role": m.role, "content": [content(part) for part in m.parts]} for m in conversation.messages]


def _media_problems(
    part: ImagePart | VideoPart, conversation: Conversation, root: Path
) -> Iterator[tuple[object, str]]:
    """Yields the name and the message of each problem of one part."""
    if isinstance(part, ImagePart):
        names: tuple[object, ...] = (_image_name(part, conversation),)
    else:
        names = part.frames if part.path is None else (part.path,)
    for name in names:
        message = _file_problem(name, root, isinstance(part, VideoPart) and part.path is not None)
        if message is not None:
            yield name, message


def _image_name(part: ImagePart, conversation: Conversation) -> object:
    if part.path is not None:
        return part.path
    assert part.index is not None
    image: object = conversation.images[part.index]
    return image


def _file_problem(name: object, root: Path, is_clip: bool) -> str | None:
    try:
        path = locate(root, name)
    except ValueError as error:
        return str(error)
    if is_clip and path.is_dir():
        suffixes = ", ".join(FRAME_SUFFIXES)
        return None if frame_files(path) else f"the directory holds no frames ({suffixes})"
    return None if path.is_file() else MISSING


def _hint(message: str) -> str | None:
    return "paths are relative to the data file's directory" if message == MISSING else None
