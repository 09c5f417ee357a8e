"""Which moments a run asks for: what is refused before anything is opened, and how many frames it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from theworld_train.config import Problem
from theworld_train.config.sources import (
    ClipsSource,
    HubSource,
    JsonlSource,
    MixtureSource,
    MovingDigitsSource,
    WebDatasetSource,
    WorldFrames,
    frames_of,
    frames_problem,
)

DIGITS = "data.train={source: moving_digits, split: train, samples: 8, frames: 9, later_frames: 8}"
IMAGES = "data.train={source: captions, path: rows.jsonl}"


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["data.world.frames=image", "data.world.steps=2"], "data.world", "frames: image holds the present alone"),
        (["data.world.frames=rollout"], "data.world", "frames: rollout needs steps"),
        (["data.world.frames=rollout", "data.world.steps=0"], "data.world", "frames: rollout needs steps"),
        (
            ["data.world.frames=rollout", "data.world.steps=1"],
            "data",
            "world.frames: rollout reads what has been generated from data.encoded, which is not set",
        ),
        (
            [
                "data.world={frames: rollout, steps: 1}",
                "data.encoded=cache",
                "trainable.world_encoder={}",
                "expect_trainable=null",
            ],
            "",
            "data.world.frames: rollout reads latents of a frozen world encoder, and world_encoder is in trainable",
        ),
        (
            ["data.world={frames: rollout, steps: 5}", "data.encoded=cache"],
            "",
            "data.world.steps is 5, reaching 5 latent frames from the present, but model.world.max_world_steps is 4",
        ),
        (
            ["data.world.steps=5"],
            "",
            "data.world.steps is 5, reaching 5 latent frames from the present, but model.world.max_world_steps is 4",
        ),
        (
            ["data.train.max_video_frames=21"],
            "",
            "data.train has clips of 21 frames, reaching 5 latent frames from the present, but "
            "model.world.max_world_steps is 4",
        ),
        (
            ["data.world.frames=future"],
            "data",
            "data.world.frames: future needs later frames, and data.train.present of 1 makes the last frame of each "
            "clip the present",
        ),
        (
            ["data.world.steps=1", "data.train.present=0.0"],
            "data",
            "data.world.frames: history needs earlier frames, and data.train.present of 0 makes the first frame",
        ),
        (
            ["data.world.frames=future", IMAGES],
            "data",
            "data.world.frames: future needs clips, and data.train is a source of images (captions)",
        ),
        (
            ["data.world={frames: history, steps: 3}", DIGITS],
            "data",
            "data.world.frames: history with 3 steps needs data.train.frames of at least 13, got 9",
        ),
        (
            ["data.world={frames: future, steps: 3}", DIGITS],
            "data",
            "data.world.frames: future with 3 steps needs data.train.later_frames of at least 12, got 8",
        ),
        (["model.world.pool=3"], "model.world.pool", "expected one of 1, 2, 4"),
        (
            ["model.world={pool: 4, resolution: 40}"],
            "model.world",
            "pool must divide the 5 latent cells along a side of 40 pixels, got 4",
        ),
    ],
)
@pytest.mark.usefixtures("folder")
def test_frames_that_cannot_be_had_are_refused(
    the_problem_of: Callable[..., Problem], overrides: list[str], key: str, message: str
):
    problem = the_problem_of("base.yaml", *overrides)
    assert message in problem.message
    assert (problem.key or "") == key


@pytest.mark.usefixtures("folder")
def test_choices_are_named(the_problem_of: Callable[..., Problem]):
    problem = the_problem_of("base.yaml", "data.world.frames=futur")
    assert (problem.key, problem.hint) == ("data.world.frames", "did you mean 'future'?")
    assert "expected one of image, history, future, rollout" in problem.message


JSONL = JsonlSource(source="jsonl", path="rows.jsonl", max_video_frames=13, present=0.5)
CLIPS = ClipsSource(source="clips", path="clips")
MOVING = MovingDigitsSource(source="moving_digits", split="train", samples=8, frames=5, later_frames=8)


@pytest.mark.parametrize(
    ("world", "jsonl", "moving"),
    [
        (WorldFrames(), 13, 5),
        (WorldFrames(frames="history", steps=0), 1, 1),
        (WorldFrames(frames="history", steps=1), 5, 5),
        (WorldFrames(frames="future"), 13, 9),
        (WorldFrames(frames="future", steps=2), 9, 9),
        (WorldFrames(frames="image"), 1, 1),
        (WorldFrames(frames="rollout", steps=3), 13, 13),
    ],
)
def test_frames_of_a_block(world: WorldFrames, jsonl: int, moving: int):
    assert frames_of(None, world) == 1
    assert frames_of(JSONL, world) == jsonl
    assert frames_of(MOVING, world) == moving
    parts = {"a": {"data": JSONL.model_dump()}, "b": {"data": MOVING.model_dump()}}
    mixture = MixtureSource.model_validate({"source": "mixture", "parts": parts})
    assert frames_of(mixture, world) == max(jsonl, moving)


@pytest.mark.parametrize(
    "source",
    [
        HubSource(source="hub", id="owner/name", present=0.5),
        WebDatasetSource(source="webdataset", path="shards", present=0.5),
    ],
    ids=lambda source: source.source,
)
def test_a_source_of_one_frame_a_clip_has_no_future(source: HubSource | WebDatasetSource):
    problem = frames_problem(source, WorldFrames(frames="future"), "data.train")
    assert "data.train.max_video_frames is 1: set it, or data.world.steps" in (problem or "")
    assert frames_problem(source, WorldFrames(frames="future", steps=1), "data.train") is None
    assert frames_problem(source, WorldFrames(frames="future", steps=0), "data.train") is None
    longer = source.model_copy(update={"max_video_frames": 5})
    assert frames_problem(longer, WorldFrames(frames="future"), "data.train") is None


def test_a_mixture_needs_one_part_that_has_the_frames():
    future = WorldFrames(frames="future", steps=1)
    lacking = {"a": {"data": CLIPS.model_dump()}, "b": {"data": {"source": "vsr", "path": "x.jsonl"}}}
    mixture = MixtureSource.model_validate({"source": "mixture", "parts": lacking})
    assert "data.train.parts.a.data.present of 1" in (frames_problem(mixture, future, "data.train") or "")
    parts = {**lacking, "c": {"data": JSONL.model_dump()}}
    having = MixtureSource.model_validate({"source": "mixture", "parts": parts})
    assert frames_problem(having, future, "data.train") is None
    assert frames_problem(None, future, "data.eval") is None
