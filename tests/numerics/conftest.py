"""Models, data and runs that the tests of training share."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.assemble import run, steps
from theworld_train.assemble.inputs import Inputs, open_inputs
from theworld_train.assemble.model import LoadedModel, load_model
from theworld_train.config import load_run_config
from theworld_train.config.schema import RunConfig
from theworld_train.config.sources import MovingDigitsSource
from theworld_train.data import Batching, Window, training_batches
from theworld_train.data.moving_digits import WORDS, MovingDigits
from theworld_train.model import TheWorld
from theworld_train.model.build import write_tiny
from theworld_train.pipeline.tiny import build_tiny
from theworld_train.train.engine import ReplicatedEngine
from theworld_train.train.groups import build_optimizer
from theworld_train.train.ledger import build_ledger, trainable_components
from theworld_train.train.metrics import read_metrics
from theworld_train.train.quarantine import Quarantine
from theworld_train.train.runtime import Runtime
from theworld_train.train.stage import StageModule
from theworld_train.train.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "configs" / "quickstart"

Rows = list[dict[str, Any]]


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def quickstart_model(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """The tiny model of the quickstart, as `theworld-train tiny` writes it."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    build_tiny(directory)
    return TinyCheckpoint(directory)


@pytest.fixture(scope="session")
def write_small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyCheckpoint]:
    """Writes a tiny model with a language model of two layers, through which rounding grows less than through four."""

    def write(**text: Any) -> TinyCheckpoint:
        samples = MovingDigits(MovingDigitsSource(source="moving_digits", split="train", samples=4))
        clips = [samples[index].messages[0]["content"][0]["video"] for index in range(4)]
        pixels = torch.stack([torch.from_numpy(np.stack([np.asarray(frame) for frame in clip])) for clip in clips])
        directory = tmp_path_factory.mktemp("models") / "small"
        layers = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
        write_tiny(directory, WORDS, pixels.permute(0, 4, 1, 2, 3).float().div(127.5).sub(1.0), **layers, **text)
        return TinyCheckpoint(directory)

    return write


@pytest.fixture(scope="session")
def small_model(write_small: Callable[..., TinyCheckpoint]) -> TinyCheckpoint:
    """The tiny model with two layers."""
    return write_small()


# -- data -------------------------------------------------------------------------------------------------------------

#: What the conversations show, in turn.
KINDS = ("image", "clip", "two images", "text", "clip", "text")
#: How many words they answer, in turn: the next to nothing of some rows and the length of others make micro-batches
#: whose shares of the supervised tokens differ by far.
ANSWER_LENGTHS = (1, 1, 40, 3, 12, 1, 25)


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 48 conversations: text alone, one or two images, clips of 5 and 9 frames."""
    directory = tmp_path_factory.mktemp("conversations")
    draw = np.random.default_rng(0)
    words = [word for word in WORDS if word not in ("user", "model")]

    def write_image(name: str) -> str:
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(directory / name)
        return name

    def image(name: str) -> dict[str, Any]:
        return {"type": "image", "path": write_image(name)}

    rows = []
    for index in range(48):
        kind = KINDS[index % len(KINDS)]
        content: list[dict[str, Any]] = [{"type": "text", "text": "Which digit is it?"}]
        if kind == "clip":
            frames = [write_image(f"{index}-{frame}.png") for frame in range((5, 9)[index // len(KINDS) % 2])]
            content.insert(0, {"type": "video", "frames": frames})
        elif kind != "text":
            content.insert(0, image(f"{index}.png"))
        if kind == "two images":
            content.append(image(f"{index}-second.png"))
        answer = " ".join(draw.choice(words, ANSWER_LENGTHS[index % len(ANSWER_LENGTHS)]))
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"{kind}-{index}", "kind": kind, "messages": turns})
    path = directory / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def quickstart_stage(quickstart_model: TinyCheckpoint) -> Callable[..., RunConfig]:
    """Loads a stage of the quickstart as it is shipped, but for where it reads and writes."""

    def load(stage: str, directory: Path, **overrides: Any) -> RunConfig:
        places = {
            "model.base": quickstart_model.gemma,
            "model.world.encoder": quickstart_model.cosmos,
            "output_dir": str(directory),
            "data.num_workers": 0,
        }
        return load_run_config(
            CONFIGS / f"{stage}.yaml", places | {key.replace("__", "."): value for key, value in overrides.items()}
        )

    return load


@pytest.fixture(scope="session")
def shipped(quickstart_stage: Callable[..., RunConfig]) -> Callable[..., RunConfig]:
    """Loads a stage of the quickstart, made short: two steps of four samples, and two held out."""
    short = {
        "schedule__warmup_steps": 2,
        "training__max_steps": 2,
        "training__global_batch_size": 4,
        "training__micro_batch_size": 4,
        "evaluation__max_samples": 2,
        "evaluation__micro_batch_size": 2,
    }
    return lambda stage, directory, **overrides: quickstart_stage(stage, directory, **short | overrides)


@dataclass(frozen=True)
class FinishedRun:
    """A run that has come to its end in this process.

    Attributes:
        directory: Of the run.
        model: As its last step left it.
    """

    directory: Path
    model: TheWorld

    @property
    def train(self) -> Rows:
        """A row for each optimizer step."""
        return read_metrics(self.directory / "metrics.jsonl", "train")

    @property
    def eval(self) -> Rows:
        """A row for each measurement of the held-out samples."""
        return read_metrics(self.directory / "metrics.jsonl", "eval")

    @property
    def checkpoint(self) -> Path:
        """Its last checkpoint."""
        return self.directory / f"step-{self.train[-1]['step']}"


@pytest.fixture
def finish(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig], FinishedRun]:
    """Runs a config as `theworld-train train` does."""

    def finish(config: RunConfig) -> FinishedRun:
        loaded: list[LoadedModel] = []

        def keep(*args: Any, **kwargs: Any) -> LoadedModel:
            loaded.append(load_model(*args, **kwargs))
            return loaded[-1]

        with monkeypatch.context() as patch:
            patch.setattr(steps, "load_model", keep)
            run.train(config, Console(file=io.StringIO()))
        return FinishedRun(Path(config.output_dir), loaded[0].model)

    return finish


@dataclass(frozen=True)
class Parts:
    """The objects of a run before its first step."""

    config: RunConfig
    inputs: Inputs
    model: TheWorld
    stage: StageModule
    runtime: Runtime
    trainer: Trainer

    def windows(self, steps: int) -> Iterator[Window]:
        """Returns the first optimizer steps' samples."""
        training = self.config.training
        return training_batches(
            self.inputs.train,
            self.inputs.collator,
            self.inputs.order,
            Batching("padded", self.inputs.max_length),
            rank=0,
            world_size=1,
            micro_batch_size=training.micro_batch_size,
            start_step=0,
            num_steps=steps,
            num_workers=0,
            pin_memory=False,
        )


@pytest.fixture
def assembled() -> Iterator[Callable[[RunConfig], Parts]]:
    """Puts a run's objects together, for tests that take its steps one by one."""
    runtimes: list[Runtime] = []

    def put_together(config: RunConfig) -> Parts:
        runtimes.append(Runtime(config))
        inputs = open_inputs(config)
        trainable = trainable_components(config)
        model = load_model(config, trainable).model
        stage = StageModule(
            model,
            trainable,
            precision=config.precision,
            chunk_size=config.training.loss_chunk_size,
            gradient_checkpointing=config.training.gradient_checkpointing,
        )
        stage.set_training_modes()
        assert config.training.max_steps is not None
        trainer = Trainer(
            config=config,
            ledger=build_ledger(model, config),
            runtime=runtimes[-1],
            stage=stage,
            engine=ReplicatedEngine(stage, lambda: build_optimizer(model, config)),
            max_steps=config.training.max_steps,
            first_step=0,
            windows=lambda *_: iter(()),
            quarantine=Quarantine(),
        )
        return Parts(config, inputs, model, stage, runtimes[-1], trainer)

    yield put_together
    for runtime in runtimes:
        runtime.close()
