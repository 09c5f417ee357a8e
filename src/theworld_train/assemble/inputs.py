"""What a run reads, opened and checked before any model loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import AutoConfig

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.data import (
    Collator,
    Source,
    check_budget,
    open_source,
)
from theworld_train.model import TheWorldProcessor
from theworld_train.model.world_encoder import read_vae_config
from theworld_train.train.metrics import missing_trackers


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation reads, opened and checked.

    Attributes:
        processor: Turns conversations into tokens and pixels.
        max_length: Tokens that a sample may have.
        held_out: Held-out samples, if there are any.
    """

    processor: TheWorldProcessor
    max_length: int
    held_out: Source | None


@dataclass(frozen=True)
class Inputs(EvaluationInputs):
    """What a training run reads, opened and checked.

    Attributes:
        train: Training samples.
    """

    train: Source


def open_inputs(config: RunConfig) -> Inputs:
    """Opens data and processor and checks every row and the sequence budget; no weights are read.

    Raises:
        ConfigError: With everything that is wrong.
    """
    train = open_source(config.data.train)
    held_out = None if config.data.eval is None else open_source(config.data.eval)
    sources = [train] if held_out is None else [train, held_out]
    processor, max_length = _check_inputs(config, sources, missing_trackers(config.tracking.trackers))
    return Inputs(processor, max_length, held_out, train)


def open_evaluation_inputs(config: RunConfig) -> EvaluationInputs:
    """Opens and checks what an evaluation needs, as `open_inputs` does; the training samples need not be there.

    Raises:
        ConfigError: With everything that is wrong.
    """
    assert config.data.eval is not None
    held_out = open_source(config.data.eval)
    processor, max_length = _check_inputs(config, [held_out])
    return EvaluationInputs(processor, max_length, held_out)


def _check_inputs(
    config: RunConfig, sources: Sequence[Source], problems: Sequence[Problem] = ()
) -> tuple[TheWorldProcessor, int]:
    """Checks sources and sequence budget, and returns the processor and the tokens that a sample may have.

    Raises:
        ConfigError: With everything that is wrong; `problems` are what was found before.
    """
    found = [*problems, *(problem for source in sources for problem in source.check())]
    if found:
        raise ConfigError(found)
    processor = open_processor(config)
    if config.model.world.enabled:
        read_vae_config(config.model.world.encoder, config.model.world.encoder_revision)
    max_length = config.data.max_sequence_length or _context_length(config)
    smallest = processor.num_visual_tokens()
    if max_length <= smallest:
        raise ConfigError(
            Problem(
                f"too small for a single image, which takes {smallest} tokens at a world resolution of "
                f"{config.model.world.resolution}",
                key="data.max_sequence_length",
                value=max_length,
                hint="raise it, or lower model.world.resolution",
            )
        )
    for source in sources:
        if unfit := check_budget(source, Collator(processor, max_length)):
            raise ConfigError(unfit)
    return processor, max_length


def open_processor(config: RunConfig, *, enable_world: bool = True) -> TheWorldProcessor:
    """Returns the processor of a run, made from the base's tokenizer and image processor."""
    world = config.model.world
    try:
        processor: TheWorldProcessor = TheWorldProcessor.from_pretrained(
            config.model.base,
            revision=config.model.revision or "main",
            enable_world=world.enabled and enable_world,
            world_resolution=world.resolution,
            world_resize=world.resize,
            world_tokens=world.tokens,
        )
    except (OSError, ValueError) as error:  # the hub refuses a name that is no repository with a ValueError
        raise ConfigError(
            Problem(f"cannot read tokenizer and processor: {error}", key="model.base", value=config.model.base)
        ) from error
    return processor


def _context_length(config: RunConfig) -> int:
    base = AutoConfig.from_pretrained(config.model.base, revision=config.model.revision or "main")
    return int(base.get_text_config().max_position_embeddings)


def max_steps(config: RunConfig, samples: int) -> int:
    """Returns the optimizer steps of a run; `epochs` is rounded up to whole steps."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    assert training.epochs is not None
    return math.ceil(training.epochs * samples / training.global_batch_size)
