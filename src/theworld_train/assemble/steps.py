"""What takes the optimizer steps of a run, loaded and in the state that the run starts from."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from theworld_train.accounting.ledger import ParameterLedger
from theworld_train.assemble.encoded import open_encoded
from theworld_train.assemble.inputs import Inputs, max_steps
from theworld_train.assemble.model import LoadedModel, build_stage, load_model, move
from theworld_train.config.schema import RunConfig
from theworld_train.data import Batching, Window, measure_lengths, part_ends, training_batches
from theworld_train.encoded_files import EncodedFiles
from theworld_train.model import TheWorldForConditionalGeneration
from theworld_train.train.checkpoint import OPTIMIZER_FILE, load_optimizer, restore_random_state, trained_parameters
from theworld_train.train.engine import Engine
from theworld_train.train.groups import build_optimizer
from theworld_train.train.handoff import Inheritance
from theworld_train.train.ledger import build_ledger, check_expectation, trainable_components
from theworld_train.train.runtime import Runtime
from theworld_train.train.stage import StageModule


@dataclass(frozen=True)
class ReadySteps:
    """What takes the steps of a run.

    Attributes:
        loaded: The model, and what it came from.
        inputs: What the run reads, with what its frozen encoders have made of it.
        known: That, by encoder; None if the run reads none.
        ledger: Its parameters.
        stage: The module of the step around it.
        engine: The stage, wrapped for the run's strategy, and its optimizer.
        max_steps: Optimizer steps of the whole run.
        windows: Given a first step and a number, this rank's share of the optimizer steps.
    """

    loaded: LoadedModel
    inputs: Inputs
    known: Mapping[str, EncodedFiles] | None
    ledger: ParameterLedger
    stage: StageModule
    engine: Engine
    max_steps: int
    windows: Callable[[int, int], Generator[Window, None, None]]


def prepare(
    config: RunConfig, inputs: Inputs, checkpoint: Path | None, runtime: Runtime, *, resume: bool = False
) -> ReadySteps:
    """Loads the model of a run and wraps it; every rank calls it.

    Args:
        config: The run config.
        inputs: What the run reads.
        checkpoint: A sealed checkpoint, or None to start from the bases.
        runtime: The process group.
        resume: Whether the run that wrote the checkpoint is continued.

    Raises:
        ConfigError: If weights are missing, or do not fit the config.
    """
    batching = _batching(config, inputs, runtime)
    with runtime.agreement():
        loaded = load_model(config, trainable_components(config), checkpoint, resume=resume)
        ledger = build_ledger(loaded.model, config)
        check_expectation(ledger, config)
        known = open_encoded(config, inputs.processor, loaded.model)
        inputs = replace(inputs, collator=inputs.collator.knowing(known))
    model, inheritance = loaded.model, loaded.inheritance
    stage = build_stage(model, config)
    move(model, runtime.device)
    engine = runtime.engine(stage, lambda: build_optimizer(model, config), config)
    runtime.seed(config.seed, inheritance.step)
    if resume and inheritance.source is not None:
        with runtime.agreement():
            _restore(engine, model, inheritance, runtime)
    windows = partial(_windows, config, inputs, batching, runtime)
    return ReadySteps(loaded, inputs, known, ledger, stage, engine, max_steps(config, len(inputs.train)), windows)


def _restore(
    engine: Engine, model: TheWorldForConditionalGeneration, inheritance: Inheritance, runtime: Runtime
) -> None:
    assert inheritance.source is not None
    load_optimizer(engine, trained_parameters(model), inheritance.source / OPTIMIZER_FILE)
    if runtime.world_size == len(inheritance.rng):
        restore_random_state(inheritance.rng[runtime.rank])


def _batching(config: RunConfig, inputs: Inputs, runtime: Runtime) -> Batching:
    """Returns how samples are laid into micro-batches; for their lengths, each rank measures a share of them."""
    kind = config.training.batching
    if kind == "padded":
        return Batching(kind, inputs.max_length)
    with runtime.agreement():
        own = range(runtime.rank, len(inputs.train), runtime.world_size)
        measured = measure_lengths(inputs.train, inputs.collator, own, config.data.num_workers, runtime.beat)
    lengths = np.zeros(len(inputs.train), dtype=np.int32)
    for rank, share in enumerate(runtime.gather(measured)):
        lengths[rank :: runtime.world_size] = share
    return Batching(kind, inputs.max_length, lengths, tuple(part_ends(inputs.train)))


def _windows(
    config: RunConfig, inputs: Inputs, batching: Batching, runtime: Runtime, start: int, number: int
) -> Generator[Window, None, None]:
    return training_batches(
        inputs.train,
        inputs.collator,
        inputs.order,
        batching,
        rank=runtime.rank,
        world_size=runtime.world_size,
        micro_batch_size=config.training.micro_batch_size,
        start_step=start,
        num_steps=number,
        num_workers=config.data.num_workers,
        pin_memory=runtime.device.type == "cuda",
    )
