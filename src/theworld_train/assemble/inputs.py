"""What a run reads, opened and checked before any model loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.gates import kind_of
from theworld_train.config.schema import RunConfig
from theworld_train.config.sources import frames_of
from theworld_train.data import (
    Check,
    Collator,
    ExcludingSource,
    MixedSource,
    MixtureOrder,
    Order,
    Source,
    UnreadableSampleError,
    check_budget,
    check_rows,
    open_source,
    question_of,
    read_exclusions,
    training_order,
)
from theworld_train.data.source import MAX_PROBLEMS
from theworld_train.model import TheWorldProcessor
from theworld_train.model.world_encoder import read_vae_config
from theworld_train.train.gates import Gates
from theworld_train.train.metrics import missing_trackers
from theworld_train.train.scoring import unscorable

#: Tokens of text that fit beside the largest image or clip where `data.max_sequence_length` is not set.
DEFAULT_TEXT = 2048


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation reads, opened and checked.

    Attributes:
        collator: Turns samples into batches.
        held_out: Held-out samples, if there are any.
    """

    collator: Collator
    held_out: Source | None

    @property
    def processor(self) -> TheWorldProcessor:
        """Turns conversations into tokens and pixels."""
        assert isinstance(self.collator.encoder, TheWorldProcessor)
        return self.collator.encoder

    @property
    def max_length(self) -> int:
        """Tokens that a sample may have."""
        return self.collator.max_length


@dataclass(frozen=True)
class Inputs(EvaluationInputs):
    """What a training run reads, opened and checked.

    Attributes:
        train: Training samples.
        order: Which of them each optimizer step takes.
        check: What is wrong with rows of the training data, which are met as samples that cannot be used.
    """

    train: Source
    order: Order
    check: Check


def open_inputs(config: RunConfig, *, allow_wrong_rows: bool = False) -> Inputs:
    """Opens data and processor and checks every row and the sequence budget; no weights are read.

    Args:
        config: The run config.
        allow_wrong_rows: Whether any number of rows of the training data may be wrong, short of all of them, and not
            `data.max_bad_samples` alone.

    Raises:
        ConfigError: With everything that is wrong.
    """
    world = config.data.world
    train = open_source(config.data.train, world)
    held_out = None if config.data.eval is None else open_source(config.data.eval, world)
    sources = [train] if held_out is None else [train, held_out]
    excluded = read_exclusions(Path(path) for path in config.data.exclude)
    allowed = None if allow_wrong_rows else config.data.max_bad_samples
    check = check_rows(train, "data.train", allowed, excluded)
    found = [*missing_trackers(config.tracking.trackers), *check.refusals(allowed)]
    collator = _check_inputs(config, sources, [*found, *_held_out_problems(held_out)])
    if held_out is not None:
        check_metrics(config, held_out)
        gates = "training.advance_when, training.stop_when"
        check_kinds(config, held_out, Gates(config.training).metrics, key=gates)
    order = training_order(config.data.train, train, config.seed, config.training.global_batch_size)
    _check_capacity(config, order, len(train))
    if excluded or check.wrong:
        train = ExcludingSource(train, excluded, check.wrong)
    return Inputs(collator, held_out, train, order, check)


def open_evaluation_inputs(config: RunConfig) -> EvaluationInputs:
    """Opens and checks what an evaluation needs, as `open_inputs` does; the training samples need not be there.

    Raises:
        ConfigError: With everything that is wrong.
    """
    assert config.data.eval is not None
    held_out = open_source(config.data.eval, config.data.world)
    collator = _check_inputs(config, [held_out], _held_out_problems(held_out))
    check_metrics(config, held_out)
    return EvaluationInputs(collator, held_out)


def _held_out_problems(held_out: Source | None) -> list[Problem]:
    """Returns what is wrong with the held-out split, of which no row may be: a result would be one of other samples."""
    return [] if held_out is None else list(check_rows(held_out, "data.eval", allowed=0).problems)


def check_kinds(
    config: RunConfig, held_out: Source, metrics: Sequence[str], *, key: str, source: str | None = None
) -> None:
    """Makes sure that the kinds of question that metrics are about are among the samples that are measured.

    Args:
        config: Says how many samples are measured.
        held_out: The held-out samples.
        metrics: Metrics that are read; those over all samples are about no kind.
        key: What reads them, for problems.
        source: The file that says so.

    Raises:
        ConfigError: With every metric whose kind is not among them.
    """
    read = {metric: kind for metric in metrics if (kind := kind_of(metric))}
    if not read:
        return
    measured = min(len(held_out), config.evaluation.max_samples or len(held_out))
    found: set[str] = set()
    for index in range(measured):
        with suppress(UnreadableSampleError):  # it is left out, and counted
            found.add(held_out.outline(index).kind)
    kinds = sorted(found)
    problems = [
        Problem(
            f"reads {metric}, but no held-out sample is of the kind {kind!r}",
            source=source,
            key=key,
            hint=did_you_mean(kind, kinds),
        )
        for metric, kind in read.items()
        if kind not in kinds
    ]
    if problems:
        raise ConfigError(problems)


def check_metrics(config: RunConfig, held_out: Source) -> None:
    """Makes sure that `evaluation.metrics` fits the held-out samples that are measured.

    Raises:
        ConfigError: With every kind that none of them is of, and the first references that its metric cannot score.
    """
    section = config.evaluation
    if not section.metrics:
        return
    most = section.max_samples
    problems: list[Problem] = []
    seen: dict[str, None] = {}
    for index in range(len(held_out) if most is None else min(most, len(held_out))):
        try:
            sample = held_out.outline(index)
        except UnreadableSampleError:
            continue  # it is left out, and counted
        seen[sample.kind] = None
        metric, expected = section.metrics.get(sample.kind), question_of(sample).expected
        reason = None if metric is None else unscorable(metric, expected)
        if reason is not None and len(problems) < MAX_PROBLEMS:
            key = f"evaluation.metrics.{sample.kind}"
            problems.append(Problem(f"the expected answer {reason}", source=sample.id, key=key, value=expected))
    problems += [
        Problem(
            "no held-out sample is of this kind", key=f"evaluation.metrics.{kind}", hint=did_you_mean(kind, [*seen])
        )
        for kind in section.metrics
        if kind not in seen
    ]
    if problems:
        raise ConfigError(problems)


def _check_capacity(config: RunConfig, order: Order, samples: int) -> None:
    """Makes sure that a mixture has samples for all steps."""
    needed = max_steps(config, samples) * config.training.global_batch_size
    if isinstance(order, MixtureOrder) and order.capacity < needed:
        message = f"the run draws {needed:,} samples, and with max_epochs the parts give {int(order.capacity):,}"
        raise ConfigError(Problem(message, key="data.train.parts", hint="raise a part's max_epochs, or train less"))


def _check_inputs(config: RunConfig, sources: Sequence[Source], problems: Sequence[Problem]) -> Collator:
    """Checks the sequence budget, and returns what turns samples into batches.

    Raises:
        ConfigError: With the problems that were found before, if there are any, or with what is wrong.
    """
    if problems:
        raise ConfigError(problems)
    processor = open_processor(config)
    if config.model.world.enabled:
        read_vae_config(config.model.world.encoder, config.model.world.encoder_revision)
    max_length = config.data.max_sequence_length or _default_length(config, processor)
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
    collator = Collator(processor, max_length, too_long=config.data.too_long)
    parts = [
        part for source in sources for part in (source.parts.values() if isinstance(source, MixedSource) else [source])
    ]
    for part in parts:
        if unfit := check_budget(part, collator):
            raise ConfigError(unfit)
    return collator


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
            world_pool=world.pool,
        )
    except (OSError, ValueError) as error:  # the hub refuses a name that is no repository with a ValueError
        raise ConfigError(
            Problem(f"cannot read tokenizer and processor: {error}", key="model.base", value=config.model.base)
        ) from error
    return processor


def _default_length(config: RunConfig, processor: TheWorldProcessor) -> int:
    """Returns the tokens of the largest image or clip and of some text, within the base's context length."""
    base = AutoConfig.from_pretrained(config.model.base, revision=config.model.revision or "main")
    frames = max(frames_of(data, config.data.world) for data in (config.data.train, config.data.eval))
    context = int(base.get_text_config().max_position_embeddings)
    return min(context, processor.num_visual_tokens(frames) + DEFAULT_TEXT)


def max_steps(config: RunConfig, samples: int) -> int:
    """Returns the optimizer steps of a run; `epochs` is rounded up to whole steps."""
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    assert training.epochs is not None
    return math.ceil(training.epochs * samples / training.global_batch_size)
