"""The picture of a plan: memory over the events of its last step."""

from __future__ import annotations

from pathlib import Path

from theworld_train.config.errors import ConfigError
from theworld_train.memory import picture
from theworld_train.plan.advice import Planner, Setting


def draw(path: Path, planner: Planner, setting: Setting) -> None:
    """Draws the last step of a plan into a PNG file.

    Args:
        path: The file.
        planner: Plans the run.
        setting: How the run is laid out.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    run = planner.run(setting)
    share = "" if setting.ranks == 1 else f", {setting.strategy.name} on {setting.ranks} GPUs"
    title = (
        f"{planner.config.name}: one optimizer step, micro-batch {setting.micro_batch_size} of"
        f" {run.shape.positions:,} positions{share}"
    )
    try:
        picture.draw(path, planner.timeline(setting), run.steps - 1, title, "one GPU")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'theworld-train[plot]'") from error
