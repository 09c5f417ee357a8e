"""`theworld-train generate`: ask a checkpoint a question about an image or a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run directory, or an exported model.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image; may be repeated.")] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video file or a folder of frames; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    max_frames: Annotated[int, typer.Option(min=1, help="Frames taken from a video, 1 + 4k.")] = 9,
    world: Annotated[bool, typer.Option(help="Whether the model sees world tokens.")] = True,
) -> None:
    """Answer a question about images or clips, by greedy decoding.

    Example:
        theworld-train generate runs/quickstart/full --video clip.mp4 --prompt "Which way does it move?"
    """
    from theworld_train.cli.ranks import offline
    from theworld_train.config.errors import ConfigError

    if (max_frames - 1) % 4:
        raise ConfigError(f"--max-frames must be 1 + 4k, as the VAE compresses time by 4, got {max_frames}")
    content = _visual_parts(image or [], video or [], max_frames)
    offline()
    from theworld_train.evaluate.answer import answer

    content.append({"type": "text", "text": prompt})
    typer.echo(answer(checkpoint, content, max_new_tokens=max_new_tokens, enable_world=world))


def _visual_parts(images: list[Path], videos: list[Path], max_frames: int) -> list[dict[str, Any]]:
    """Loads the visual parts of the question.

    Raises:
        ConfigError: Naming every file that cannot be read.
    """
    from theworld_train.config.errors import ConfigError, Problem
    from theworld_train.data.images import open_image
    from theworld_train.data.source import MediaError
    from theworld_train.data.video import frame_files, read_clip, read_frames

    parts: list[dict[str, Any]] = []
    problems = []
    for option, paths in (("--image", images), ("--video", videos)):
        for path in paths:
            try:
                if not path.exists():
                    raise MediaError(f"no such file: {path}")
                if option == "--image":
                    parts.append({"type": "image", "image": open_image(path)})
                else:
                    folder = path.is_dir()
                    frames = read_frames(frame_files(path), max_frames, path) if folder else read_clip(path, max_frames)
                    parts.append({"type": "video", "video": frames})
            except MediaError as error:
                problems.append(Problem(str(error), source="command line", key=option))
    if problems:
        raise ConfigError(problems)
    return parts
