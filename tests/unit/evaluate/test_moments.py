"""The same questions measured with other frames: each against a run of its own that reads these frames."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from tests.helpers.tiny import TinyCheckpoint, write_run
from theworld_train.assemble import run
from theworld_train.assemble.encoded import recipe_of, rollout_recipe
from theworld_train.assemble.inputs import open_evaluation_inputs, open_processor
from theworld_train.assemble.model import load_model
from theworld_train.batch import ROLLOUT
from theworld_train.cli.app import app
from theworld_train.config import load_run_config, parse_run_config
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import ABLATIONS, RunConfig
from theworld_train.encoded_files import ShardWriter, frames_digest
from theworld_train.evaluate import ablations
from theworld_train.evaluate.ablations import run_ablations
from theworld_train.evaluate.moments import _order, fitting_ablations, with_frames

NEXT = {"questions": ["where_next"], "canvas": 24, "digit": 8, "grid": 8, "speed": 1, "later_frames": 8}
DIGITS = {"source": "moving_digits", "samples": 6, **NEXT}


def data(**world: Any) -> dict[str, Any]:
    return {
        "train": {**DIGITS, "split": "train"},
        "eval": {**DIGITS, "split": "eval"},
        "num_workers": 0,
        "world": world,
    }


@pytest.fixture(autouse=True, scope="module")
def _random_state() -> Iterator[None]:
    """Runs seed this process, and other modules' draws shall not depend on it."""
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture(scope="module")
def trained(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step over real futures."""
    path = write_run(tiny, tmp_path_factory.mktemp("run"), steps=1, batch=2, data=data(frames="future", steps=2))
    config = load_run_config(path)
    run.train(config, Console(file=io.StringIO()))
    return Path(config.output_dir)


def loss(directory: Path, ablation: str = "as_trained", *overrides: str) -> float:
    """Held-out loss under one ablation, exactly."""
    value = run_ablations(directory, [ablation], overrides).results[ablation].total.loss.value  # type: ignore[list-item, index]
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("ablation", "world"),
    [("frames_image", "{frames: image, steps: null}"), ("frames_history", "{frames: history, steps: 2}")],
)
def test_an_ablation_of_frames_measures_what_a_run_with_them_measures(trained: Path, ablation: str, world: str):
    measured = loss(trained, ablation)
    assert measured == loss(trained, "as_trained", f"data.world={world}")
    assert measured != loss(trained)
    assert loss(trained, "frames_future", f"data.world={world}") == loss(trained)


def test_shuffled_frames_are_others_but_the_same_for_any_batch(trained: Path):
    alone, together = (loss(trained, "frames_shuffled", f"evaluation.micro_batch_size={size}") for size in (1, 6))
    assert alone == pytest.approx(together, rel=1e-5)
    assert abs(alone - loss(trained)) > 1e-4
    only = "data.world={frames: image, steps: null}"
    assert loss(trained, "frames_shuffled", only) == loss(trained, "as_trained", only)


class _Asked:
    """Notes by what rollouts are looked up."""

    def __init__(self) -> None:
        self.digests: list[str] = []

    def find(self, frames: Sequence[Image.Image], prompt: str = "") -> Tensor:
        self.digests.append(frames_digest(frames, prompt))
        return torch.zeros(9, 16, 1, 1)


def keep_futures_as_rollouts(config: RunConfig, directory: Path) -> None:
    """Writes the latents of the real futures of the held-out samples as if they had been generated."""
    model, processor = load_model(config, ()).model, open_processor(config)
    recipe = rollout_recipe(config, recipe_of(Component.WORLD_ENCODER, config, processor, model), "weights")
    writer = ShardWriter(recipe.write(directory), {"device": "cpu"})
    changed = config.model_copy(update={"data": config.data.model_copy(update={"encoded": str(directory)})})
    real, made = open_evaluation_inputs(config), open_evaluation_inputs(with_frames(changed, "rollout"))
    for index in range(len(real.held_out)):
        asked = _Asked()
        made.collator.knowing({ROLLOUT: asked}).encode(made.held_out[index])
        batch = real.collator([real.held_out[index]])
        with torch.no_grad():
            latents = model.encode_world(batch.world_frames, batch.world_frame_counts)
        (digest,) = asked.digests
        writer.add(digest, latents, 0.0)
    writer.seal()


def test_rollouts_that_come_true_are_as_good_as_the_future(trained: Path, tmp_path: Path):
    config = load_run_config(trained / "config.yaml")
    keep_futures_as_rollouts(config, tmp_path)
    encoded = f"data.encoded={tmp_path}"
    assert loss(trained, "frames_rollout", encoded) == pytest.approx(loss(trained), rel=1e-4)
    rollout = "data.world={frames: rollout, steps: 2}"
    assert loss(trained, "as_trained", encoded, rollout) == loss(trained, "frames_rollout", encoded)
    assert loss(trained, "frames_image", encoded, rollout) == loss(trained, "frames_image")
    assert abs(loss(trained, "frames_shuffled", encoded, rollout) - loss(trained)) > 1e-4
    config, *_ = run.load_run(trained, [encoded])
    assert fitting_ablations(config)[len(ABLATIONS) :] == [
        "frames_image",
        "frames_history",
        "frames_rollout",
        "frames_shuffled",
    ]
    with pytest.raises(ConfigError, match=r"its rollouts differ in encoder.resolution: 32 there, 40 in this run"):
        loss(trained, "frames_rollout", encoded, "model.world.resolution=40")


# -- what is measured by default, and what is refused -----------------------------------------------------------------

Make = Callable[..., RunConfig]


@pytest.fixture
def make(tiny: TinyCheckpoint) -> Make:
    def make(*, enabled: bool = True, most: int = 4, **sections: Any) -> RunConfig:
        world = {"encoder": tiny.cosmos, "resolution": 32, "max_world_steps": most, "enabled": enabled}
        return parse_run_config(
            {
                "name": "run",
                "output_dir": "unused",
                "model": {"base": tiny.gemma, "world": world},
                "trainable": {"world_projector": {}} if enabled else {"language_model": {}},
                "training": {"max_steps": 1},
                "data": data(),
            }
            | sections
        )

    return make


def images(**fields: Any) -> dict[str, Any]:
    return {"train": {"source": "captions", "path": "a.json", **fields}, "eval": {"source": "vsr", "path": "b.jsonl"}}


def clips(**fields: Any) -> dict[str, Any]:
    return {"train": {"source": "vsr", "path": "b.jsonl"}, "eval": {"source": "clips", "path": "clips", **fields}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, ["frames_image", "frames_future", "frames_shuffled"]),
        ({"data": data(frames="future", steps=1)}, ["frames_image", "frames_history", "frames_shuffled"]),
        ({"data": data(frames="image")}, ["frames_history", "frames_future"]),
        ({"data": data(frames="history", steps=0)}, ["frames_future"]),
        (
            {"data": data(frames="rollout", steps=1) | {"encoded": "x"}},
            ["frames_image", "frames_history", "frames_future"],
        ),
        ({"data": images()}, []),
        ({"data": clips()}, ["frames_image", "frames_shuffled"]),
        ({"data": clips(present=0.5)}, ["frames_image", "frames_future", "frames_shuffled"]),
        ({"data": clips(present=0.0)}, ["frames_future"]),
    ],
)
def test_by_default_what_changes_something_is_measured(make: Make, sections: dict[str, Any], expected: list[str]):
    assert fitting_ablations(make(**sections)) == [*ABLATIONS, *expected]


def test_a_model_without_a_world_path_has_no_frames(make: Make):
    assert fitting_ablations(make(enabled=False)) == ["as_trained", "image_blanked"]


@pytest.mark.parametrize(
    ("sections", "choice", "message"),
    [
        ({"data": clips()}, "future", "data.eval.present of 1 makes the last frame of each clip the present"),
        ({"data": images()}, "future", "needs clips, and data.eval is a source of images (vsr)"),
        (
            {"data": data(frames="image"), "most": 1},
            "future",
            "data.eval has 2 latent frames besides the present, and ",
        ),
        ({}, "rollout", "rollouts are read from data.encoded, which is not set"),
        ({"data": images() | {"encoded": "x"}}, "rollout", "set data.world.steps"),
        (
            {"data": data() | {"encoded": "x"}, "trainable": {"world_projector": {}, "world_encoder": {}}},
            "rollout",
            "latents of a frozen world encoder, and the run trains world_encoder",
        ),
    ],
)
def test_frames_that_are_not_there_are_refused(make: Make, sections: dict[str, Any], choice: Any, message: str):
    with pytest.raises(ConfigError) as caught:
        with_frames(make(**sections), choice)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert (problem.key, problem.value) == ("--ablation", f"frames_{choice}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("frames_rollout", ["rollouts are read from data.encoded, which is not set"]),
        ("frames_shufled", ["no such ablation 'frames_shufled'", "did you mean 'frames_shuffled'?"]),
    ],
)
def test_the_command_says_what_cannot_be_measured(trained: Path, name: str, words: list[str]):
    result = CliRunner().invoke(app, ["evaluate", str(trained), "--ablation", name])
    assert result.exit_code == 2
    assert all(word in " ".join(result.stderr.split()) for word in words)


def test_one_generated_frame_has_no_other_order(trained: Path, tmp_path: Path):
    world = ["data.world={frames: rollout, steps: 1}", f"data.encoded={tmp_path}"]
    with pytest.raises(ConfigError, match=r"--ablation: data.world.steps of 1 holds one generated latent frame"):
        run_ablations(trained, ["frames_shuffled"], world)


def test_variants_that_cannot_be_opened_are_left_out_unless_they_are_named(
    trained: Path, monkeypatch: pytest.MonkeyPatch
):
    """As when the clips have no 8 frames before the present."""
    opened = ablations.open_evaluation_inputs

    def short(config: RunConfig) -> Any:
        if config.data.world.frames == "history":
            raise ConfigError(Problem("none of 6 samples can be read", key="data"))
        return opened(config)

    monkeypatch.setattr(ablations, "open_evaluation_inputs", short)
    monkeypatch.setattr(ablations, "fitting_ablations", lambda config: ["as_trained", "frames_history"])
    measured = run_ablations(trained)
    assert list(measured.results) == ["as_trained"]
    assert measured.left_out == {"frames_history": "data: none of 6 samples can be read"}
    result = CliRunner().invoke(app, ["evaluate", str(trained)])
    assert result.exit_code == 0
    assert "frames_history is not measured: data: none of 6 samples can be read" in result.stdout
    with pytest.raises(ConfigError) as caught:
        run_ablations(trained, ["frames_history"])
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("--ablation", "frames_history")
    assert "none of 6 samples can be read" in problem.message


def test_no_order_is_the_given_one():
    for count in (3, 5):
        for name in "abcdefghij":
            assert _order((count,), [0], [name]).tolist() != list(range(count))


def test_the_order_keeps_presents_and_depends_on_the_sample_alone():
    counts, presents = (9, 1, 5, 9), [0, 0, 4, 8]
    order = _order(counts, presents, ["a/0", "a/1", "b/0", "a/0"]).tolist()
    blocks = [order[:9], order[9:10], order[10:15], order[15:]]
    for block, first, present in zip(blocks, (0, 9, 10, 15), presents, strict=True):
        assert sorted(block) == list(range(first, first + len(block)))
        assert block[present] == first + present
    assert blocks[0] != list(range(9))
    # The same drawn order, around another present.
    assert [frame - 1 for frame in blocks[0] if frame] == [frame - 15 for frame in blocks[3] if frame != 23]
    assert _order((9,), [0], ["b/0"]).tolist() != blocks[0]
