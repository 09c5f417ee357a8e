"""A component that an earlier stage has trained stays, byte for byte, in every checkpoint of a later one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from theworld_train.checkpoint_files import verify_checkpoint
from theworld_train.config.schema import RunConfig

SETTINGS: dict[str, Any] = {"training__max_steps": 3, "checkpoint__every_steps": 1, "checkpoint__keep_last": 1}


def test_a_carried_file_outlives_the_checkpoint_that_it_came_from(
    shipped: Callable[..., RunConfig], finish: Callable[[RunConfig], Any], tmp_path: Path
) -> None:
    vision = finish(shipped("vision", tmp_path / "vision", training__max_steps=1))
    trained = (vision.checkpoint / "vision_tower.safetensors").read_bytes()
    language = shipped("language", tmp_path / "language", init_from=str(tmp_path / "vision"), **SETTINGS)
    first = finish(language)
    assert (first.checkpoint / "vision_tower.safetensors").read_bytes() == trained
    shutil.rmtree(tmp_path / "vision")
    longer = shipped(
        "language",
        tmp_path / "language",
        resume="latest",
        **SETTINGS | {"training__max_steps": 6, "allow_changed": ["training.max_steps"]},
    )
    resumed = finish(longer)
    assert [path.name for path in sorted((tmp_path / "language").glob("step-*"))] == ["step-6"]
    assert "vision_tower.safetensors" in verify_checkpoint(resumed.checkpoint)["files"]
    assert (resumed.checkpoint / "vision_tower.safetensors").read_bytes() == trained
