"""Run configs, batches and stages on the tiny model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny import RESOLUTION, Message, TinyCheckpoint
from theworld_train.batch import Batch
from theworld_train.checkpoint_files import Origin
from theworld_train.config import parse_run_config
from theworld_train.config.components import Component
from theworld_train.config.schema import CheckpointingMode, GradientCheckpointing, RunConfig
from theworld_train.data import Collator, Sample
from theworld_train.model import TheWorld
from theworld_train.model.digest import base_digests
from theworld_train.train.checkpoint import Base, Carried, CheckpointWriter, RunRecord, random_state, take_snapshot
from theworld_train.train.engine import Engine, ReplicatedEngine
from theworld_train.train.freeze import Precision, apply_trainable
from theworld_train.train.stage import StageModule

#: What each of the shipped stages trains.
STAGES: dict[str, tuple[str, ...]] = {
    "projection": ("world_projector",),
    "vision": ("world_projector", "vision_tower", "multi_modal_projector"),
    "language": ("world_projector", "language_model"),
    "full": ("world_projector", "vision_tower", "multi_modal_projector", "language_model", "world_encoder"),
}


@pytest.fixture(params=STAGES)
def trainable(request: pytest.FixtureRequest) -> tuple[Component, ...]:
    """The components that train, in each of the four stages."""
    return tuple(Component(name) for name in STAGES[request.param])


@pytest.fixture
def run_config(tiny: TinyCheckpoint, tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes a run config on the tiny model: the components that train, and sections that differ."""

    def make(*components: str | Component, **sections: Any) -> RunConfig:
        moving_digits = {"source": "moving_digits", "samples": 32}
        return parse_run_config(
            {
                "name": "test",
                "output_dir": str(tmp_path / "run"),
                "precision": "fp32",
                "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION}},
                "trainable": {str(Component(name)): {} for name in components or ("world_projector",)},
                "data": {
                    "train": {**moving_digits, "split": "train"},
                    "eval": {**moving_digits, "split": "eval"},
                    "num_workers": 0,
                },
                "training": {"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 4},
            }
            | sections
        )

    return make


@pytest.fixture
def make_batch(tiny: TinyCheckpoint) -> Callable[..., Batch]:
    """Makes a batch of conversations, a kind of question for each if wanted."""
    collator = Collator(tiny.processor(), 4096)

    def make(*conversations: Sequence[Message]) -> Batch:
        return collator([Sample(str(index), "all", list(turns)) for index, turns in enumerate(conversations)])

    return make


@pytest.fixture
def make_stage(tiny: TinyCheckpoint) -> Callable[..., StageModule]:
    """Makes a stage on the tiny model."""

    def make(
        trainable: Sequence[Component],
        precision: Precision = "fp32",
        *,
        chunk_size: int = 1024,
        gradient_checkpointing: CheckpointingMode | GradientCheckpointing = "none",
        activation_offload: bool = False,
        model: TheWorld | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> StageModule:
        model = tiny.theworld(dtype=dtype) if model is None else model
        apply_trainable(model, trainable, precision)
        stage = StageModule(
            model,
            trainable,
            precision=precision,
            chunk_size=chunk_size,
            gradient_checkpointing=GradientCheckpointing.model_validate(gradient_checkpointing),
            activation_offload=activation_offload,
        )
        stage.set_training_modes()
        return stage

    return make


@pytest.fixture
def write_checkpoint(tiny: TinyCheckpoint) -> Callable[..., Path]:
    """Writes a checkpoint as a run does that trains the named components."""

    def write(
        directory: Path,
        step: int = 1,
        *,
        model: TheWorld | None = None,
        trained: Sequence[str] = ("world_projector",),
        initialised: Sequence[str] = (),
        carried: dict[str, Carried] | None = None,
        engine: Engine | None = None,
        keep_last: int = 2,
        digests: dict[str, str] | None = None,
        run_name: str = "test",
        base: str | None = None,
        init_from: Origin | None = None,
    ) -> Path:
        model = tiny.theworld() if model is None else model
        if engine is None:
            engine = ReplicatedEngine(model, lambda: torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]))
        record = RunRecord(
            run_name=run_name,
            config_yaml="name: test\n",
            model=model,
            processor=tiny.processor(),
            base=Base(base or tiny.gemma, None),
            encoder=Base(tiny.cosmos, None) if model.config.enable_world else None,
            init_from=init_from,
            trained=tuple(trained),
            initialised=tuple(initialised),
            base_digests=(
                base_digests(tiny.theworld(enable_world=model.config.enable_world)) if digests is None else digests
            ),
            ledger={},
        )
        snapshot = take_snapshot(model, engine, (*trained, *initialised), keep=True)
        return CheckpointWriter(directory, keep_last, record, carried or {}).write(step, snapshot, [random_state()])

    return write
