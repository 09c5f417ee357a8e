"""`theworld-train generate`: ask a checkpoint a question about an image or a clip."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from theworld_train.evaluate.answer import AnsweringModel, Future

#: Frames taken from a video unless told otherwise, as sources of training data do.
DEFAULT_FRAMES = 9


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, a run directory, or an exported model.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[list[Path] | None, typer.Option(help="An image; may be repeated.")] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video file or a folder of frames; may be repeated.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 64,
    max_frames: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most frames taken from a video, 1 + 4k; 9 if absent, or fewer if the model takes fewer."
        ),
    ] = None,
    world: Annotated[
        bool | None,
        typer.Option("--world/--no-world", help="Whether the model sees world tokens; if absent, whether it can."),
    ] = None,
    rollout: Annotated[
        int | None,
        typer.Option("--rollout", min=1, help="Latent frames to generate behind each image, or the end of each clip."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="With --rollout: a run config that says how; that of the checkpoint's run if absent."),
    ] = None,
) -> None:
    """Answer a question about images or clips, by greedy decoding.

    With --rollout, Cosmos-Predict2 continues the picture first, as data.world.rollout of a run config says, and the
    model sees what it makes of it.

    Example:
        theworld-train generate runs/quickstart/full --video clip.mp4 --prompt "Which way does it move?"
    """
    from theworld_train.cli.ranks import offline

    offline()
    from theworld_train.evaluate.answer import answer, find_model

    source = find_model(checkpoint, world)
    frames = _frames_to_take(max_frames, source.max_frames)
    future = _future(source, rollout, config)
    content = _content(image or [], video or [], frames, prompt)
    typer.echo(answer(source, content, max_new_tokens=max_new_tokens, future=future))


def _future(source: AnsweringModel, steps: int | None, config: Path | None) -> Future | None:
    """Returns how futures are generated, if they are.

    Raises:
        ConfigError: If the model takes fewer steps, or the config does not generate so many.
    """
    from theworld_train import hub
    from theworld_train.config import load_run_config
    from theworld_train.config.errors import ConfigError, Problem
    from theworld_train.evaluate.answer import Future, find_rules

    if steps is None:
        if config is not None:
            raise ConfigError(Problem("goes with --rollout", key="--config", value=str(config)))
        return None
    most = 0 if source.max_frames is None else (source.max_frames - 1) // 4
    message = f"the model takes at most {most}, its max_world_steps" if most else "the model sees no world tokens"
    if steps > most:
        raise ConfigError(Problem(message, key="--rollout", value=steps))
    rules = find_rules(source.path) if config is None else load_run_config(config).data.world.rollout
    if 1 + 4 * steps > rules.num_frames:
        message = f"{steps} steps reach over {1 + 4 * steps} frames, and {rules.num_frames} are generated"
        raise ConfigError(Problem(message, key="data.world.rollout.num_frames", value=rules.num_frames))
    return Future(steps, hub.pin_rules(rules, hub.read_lock(hub.LOCK_FILE)))


def _frames_to_take(wanted: int | None, most: int | None) -> int:
    """Returns the most frames that are taken from a video, given the most that the model takes.

    Raises:
        ConfigError: If they are no 1 + 4k, or the model takes fewer.
    """
    from theworld_train.config.errors import ConfigError, Problem

    if wanted is None:
        return DEFAULT_FRAMES if most is None else min(DEFAULT_FRAMES, most)
    message = None
    if (wanted - 1) % 4:
        message = "must be 1 + 4k, as the VAE compresses time by 4"
    elif most is not None and wanted > most:
        message = f"the model takes at most {most} frames, 1 + 4 x its max_world_steps of {(most - 1) // 4}"
    if message is not None:
        raise ConfigError(Problem(message, key="--max-frames", value=wanted))
    return wanted


def _content(images: list[Path], videos: list[Path], max_frames: int, prompt: str) -> list[dict[str, Any]]:
    """Loads the parts of the question.

    Raises:
        ConfigError: Naming every file that cannot be read, and a prompt that asks nothing.
    """
    from theworld_train.config.errors import ConfigError, Problem
    from theworld_train.config.layers import COMMAND_LINE
    from theworld_train.data.images import open_image
    from theworld_train.data.source import MediaError
    from theworld_train.data.video import frame_files, read_clip, read_frames

    parts: list[dict[str, Any]] = []
    problems = [] if prompt.strip() else [Problem("the question is empty", source=COMMAND_LINE, key="--prompt")]
    for option, paths in (("--image", images), ("--video", videos)):
        for path in paths:
            try:
                if not path.exists():
                    raise MediaError(f"{path}: no such file")
                if option == "--image":
                    parts.append({"type": "image", "image": open_image(path)})
                else:
                    folder = path.is_dir()
                    frames = read_frames(frame_files(path), max_frames, path) if folder else read_clip(path, max_frames)
                    parts.append({"type": "video", "video": frames})
            except MediaError as error:
                problems.append(Problem(str(error), source=COMMAND_LINE, key=option))
    if problems:
        raise ConfigError(problems)
    return [*parts, {"type": "text", "text": prompt}]
