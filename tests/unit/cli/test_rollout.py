"""`theworld-train rollout`: what it prints and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint, write_run

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tiny: TinyCheckpoint, tmp_path: Path) -> str:
    rules = {"pipeline": tiny.cosmos, "height": RESOLUTION, "width": RESOLUTION, "num_frames": 5}
    rules |= {"num_inference_steps": 1, "negative_prompt": "bad", "dtype": "float32"}
    data = {
        "train": {"source": "moving_digits", "split": "train", "samples": 2, "frames": 1, "canvas": 32},
        "encoded": str(tmp_path / "encoded"),
        "num_workers": 0,
        "world": {"frames": "rollout", "steps": 1, "rollout": rules},
    }
    model = {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION, "max_world_steps": 1}}
    return str(write_run(tiny, tmp_path, steps=1, batch=2, data=data, model=model))


def test_generates_what_is_missing(call: Call, config: str):
    code, said, _ = call("rollout", config)
    assert code == 0
    assert "rollout: 2 generated, 2 kept" in said
    assert "rollout: 0 generated, 2 kept" in call("rollout", config)[1]


def test_plans(call: Call, config: str):
    code, said, _ = call("rollout", config, "--plan", "--gpu", "l4,h100-80gb")
    assert code == 0
    for words in ("text encoder", "transformer, a step", "most memory", "h100-80gb", "yes"):
        assert words in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "l4"], "--gpu: goes with --plan"),
        (["--plan", "--held-out"], "--held-out: does not go with --plan"),
        (["--held-out"], "data.eval: the run has no held-out samples"),
        (["--plan", "--gpu", "l5"], "no GPU of this name is known (got 'l5')"),
        (["data.world.frames=image", "data.world.steps=null"], "data.world.frames: nothing to generate"),
        (["data.world.frames=image", "data.world.steps=null", "--plan"], "data.world.frames: nothing to generate"),
        (["data.encoded=null"], "data.encoded, which is not set"),
        (["data.world.steps=2", "data.world.rollout.num_frames=9"], "model.world.max_world_steps"),
        (["data.world.rollout.height=30"], "multiples of 16"),
        (["data.world.rollout.num_frames=6"], "1 + 4k"),
        (["data.world.rollout.promt=x"], "prompt"),
        (["data.world.rollout.pipeline=nowhere/"], "data.world.rollout.pipeline"),
    ],
)
def test_wrong_input(call: Call, config: str, arguments: list[str], said: str):
    code, _, printed = call("rollout", config, *arguments)
    assert code == 2
    assert said in printed
