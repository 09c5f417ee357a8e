"""Ablations: what a trained model still answers when one part of it, or of its input, is taken away."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theworld_train.accounting.frames import with_frames
from theworld_train.accounting.intervals import CONFIDENCE
from theworld_train.assemble.encoded import check_rollouts, open_rollouts
from theworld_train.assemble.inputs import EvaluationInputs, open_evaluation_inputs, open_processor
from theworld_train.assemble.model import load_model, move
from theworld_train.assemble.run import held_out_batches, load_run
from theworld_train.checkpoint_files import checkpoint_step, origin_of
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import (
    FRAME_ABLATIONS,
    WORLDLESS_ABLATIONS,
    Ablation,
    GradientCheckpointing,
    RunConfig,
)
from theworld_train.data import Collator, EvaluationBatch
from theworld_train.evaluate.moments import fitting_ablations, lacks_order, shuffled
from theworld_train.model import TheWorldForConditionalGeneration
from theworld_train.train.evaluation import DEFAULT_METRIC, EvaluationResult, EvaluationTally, Evaluator, in_step
from theworld_train.train.runtime import Runtime
from theworld_train.train.stage import Features, StageModule

#: Version of the JSON that a measurement is written as.
FORMAT = 1
#: What each ablation does, for people.
DESCRIPTIONS: dict[Ablation, str] = {
    "as_trained": "as trained",
    "world_masked": "world tokens masked from attention",
    "untrained_projection": "world projector freshly initialised",
    "world_disabled": "no world tokens in the prompt (enable_world=False)",
    "image_blanked": "a grey image for the vision tower",
    "frames_image": "the present alone (k = 0)",
    "frames_history": "frames up to the present",
    "frames_future": "real frames from the present on (oracle)",
    "frames_rollout": "frames generated from the present",
    "frames_shuffled": "frames in another order, but for the present",
}


@dataclass(frozen=True)
class Measurement:
    """A checkpoint that was measured.

    Attributes:
        config: The config of its run, as it was measured.
        checkpoint: The checkpoint.
        results: The result of each variant.
        left_out: Of variants that nobody named, and that the held-out samples do not allow, why not.
    """

    config: RunConfig
    checkpoint: Path
    results: dict[Ablation, EvaluationResult]
    left_out: dict[Ablation, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the measurement as JSON-ready values; decision 15 tells the format."""
        section, data = self.config.evaluation, self.config.data.eval
        assert data is not None
        kinds = dict.fromkeys(kind for result in self.results.values() for kind in result.kinds)
        metrics = {kind: section.metrics.get(kind, DEFAULT_METRIC) for kind in kinds}
        return {
            "format": FORMAT,
            "run": self.config.name,
            "checkpoint": {
                "path": str(self.checkpoint),
                "step": checkpoint_step(self.checkpoint.resolve()),
                "manifest_sha256": origin_of(self.checkpoint).manifest_sha256,
            },
            "data": data.model_dump(mode="json"),
            "max_new_tokens": section.max_new_tokens,
            "confidence": CONFIDENCE,
            "metrics": {
                kind: metric.model_dump(mode="json", exclude_defaults=True) for kind, metric in metrics.items()
            },
            "ablations": {
                name: {"description": DESCRIPTIONS[name], **result.to_dict()} for name, result in self.results.items()
            },
        }


def run_ablations(checkpoint: Path, ablations: Sequence[Ablation] = (), overrides: Sequence[str] = ()) -> Measurement:
    """Measures a checkpoint on its run's held-out split.

    Args:
        checkpoint: A checkpoint, or a run directory, whose newest one is taken.
        ablations: Variants to measure; all that the run and its data have if empty.
        overrides: `key=value` texts for the run's config, such as `data.eval.path=other.jsonl`.

    Raises:
        ConfigError: If the run has no held-out split, or an ablation has no meaning for its model or data.
    """
    config, path = load_run(checkpoint, overrides)
    if config.data.eval is None:
        raise ConfigError(Problem("the run has no held-out split", source=str(path), key="data.eval"))
    if not config.model.world.enabled and (unfit := sorted(set(ablations) - set(WORLDLESS_ABLATIONS))):
        raise ConfigError(f"{path} has no world path, so there is nothing to take away for {', '.join(unfit)}")
    if "frames_shuffled" in ablations and (reason := lacks_order(config)):
        raise ConfigError(Problem(reason, key="--ablation", value="frames_shuffled"))
    inputs = _open(config)
    named, left_out = bool(ablations), dict[Ablation, str]()
    ablations = ablations or fitting_ablations(config)
    reframed: dict[Ablation, tuple[RunConfig, EvaluationInputs]] = {}
    for ablation in ablations:
        if (choice := FRAME_ABLATIONS.get(ablation)) is not None:
            with _unless_left_out(ablation, None if named else left_out):
                changed = with_frames(config, choice)
                reframed[ablation] = changed, _open(changed)
    with Runtime(config) as runtime:
        model = load_model(config, (), path).model
        inputs = _knowing_rollouts(config, inputs, model)
        for ablation, (changed, others) in reframed.items():
            with _unless_left_out(ablation, None if named else left_out):
                reframed[ablation] = changed, _knowing_rollouts(changed, others, model)
        ablations = [ablation for ablation in ablations if ablation not in left_out]
        reframed = {ablation: opened for ablation, opened in reframed.items() if ablation not in left_out}
        stage = StageModule(
            model,
            (),
            precision=config.precision,
            chunk_size=config.training.loss_chunk_size,
            gradient_checkpointing=GradientCheckpointing.everywhere("none"),
        )
        move(model, runtime.device)
        results = _measure(config, inputs, stage, runtime, ablations, reframed)
        return Measurement(config, path, results, left_out)


@contextmanager
def _unless_left_out(ablation: Ablation, left_out: dict[Ablation, str] | None) -> Generator[None]:
    """Opens what an ablation measures; if that fails, notes why where left_out is given.

    Raises:
        ConfigError: Naming the ablation, if it was asked for.
    """
    try:
        yield
    except ConfigError as error:
        if left_out is None:
            raise ConfigError(
                [
                    problem if problem.key == "--ablation" else Problem(str(problem), key="--ablation", value=ablation)
                    for problem in error.problems
                ]
            ) from error
        left_out[ablation] = str(error)


def _open(config: RunConfig) -> EvaluationInputs:
    """Opens and checks the held-out samples, and the rollouts that they need."""
    inputs = open_evaluation_inputs(config)
    check_rollouts(config, inputs.processor)
    return inputs


def _knowing_rollouts(
    config: RunConfig, inputs: EvaluationInputs, model: TheWorldForConditionalGeneration
) -> EvaluationInputs:
    """Returns inputs whose samples come with their rollouts, if the config asks for some."""
    known = open_rollouts(config, inputs.processor, model)
    return replace(inputs, collator=inputs.collator.knowing(known)) if known else inputs


def _measure(
    config: RunConfig,
    inputs: EvaluationInputs,
    stage: StageModule,
    runtime: Runtime,
    ablations: Sequence[Ablation],
    reframed: Mapping[Ablation, tuple[RunConfig, EvaluationInputs]],
) -> dict[Ablation, EvaluationResult]:
    """Measures all variants; those that share a prompt share the data and the frozen encoders' work."""
    tallies = {ablation: EvaluationTally(config.evaluation) for ablation in ablations}
    evaluator = Evaluator(stage, stage, runtime, config.evaluation, inputs.processor.decode_answer)
    stage.eval()
    with_world = [ablation for ablation in ablations if ablation != "world_disabled" and ablation not in reframed]
    fresh = _fresh_projector(stage, config.seed) if "untrained_projection" in with_world else {}
    if with_world:
        for item, features, chunks in _encoded(config, inputs, stage, runtime):
            for ablation in with_world:
                with _ablated(stage, item, features, ablation, fresh) as (changed, encoded):
                    evaluator.score(changed, encoded, chunks, tallies[ablation])
    if "world_disabled" in ablations:
        collator = inputs.collator
        encoder = open_processor(config, enable_world=False)
        plain = replace(inputs, collator=Collator(encoder, collator.max_length, too_long=collator.too_long))
        for item, features, chunks in _encoded(config, plain, stage, runtime):
            evaluator.score(item, features, chunks, tallies["world_disabled"])
    for name, (changed_config, others) in reframed.items():
        for item, features, chunks in _encoded(changed_config, others, stage, runtime):
            evaluator.score(item, features, chunks, tallies[name])
    return {ablation: tally.result(runtime) for ablation, tally in tallies.items()}


def _encoded(
    config: RunConfig, inputs: EvaluationInputs, stage: StageModule, runtime: Runtime
) -> Generator[tuple[EvaluationBatch, Features, int], None, None]:
    for item, chunks in in_step(held_out_batches(config, inputs, runtime), stage.chunk_size, runtime):
        moved = replace(item, batch=item.batch.to(runtime.device))
        yield moved, stage.encode(moved.batch), chunks


@contextmanager
def _ablated(
    stage: StageModule, item: EvaluationBatch, features: Features, ablation: Ablation, fresh: dict[str, Tensor]
) -> Generator[tuple[EvaluationBatch, Features], None, None]:
    """Takes away what an ablation names: from the batch, from its features, or for a while from the model."""
    batch = item.batch
    if ablation == "world_masked":
        ids = torch.tensor(stage.model.config.world_token_ids, device=batch.input_ids.device)
        visible = batch.attention_mask * ~torch.isin(batch.input_ids, ids)
        yield replace(item, batch=replace(batch, attention_mask=visible)), features
    elif ablation == "image_blanked" and batch.pixel_values is not None:
        grey = stage.encode(replace(batch, pixel_values=torch.zeros_like(batch.pixel_values), world_frames=None))
        yield item, replace(features, image_states=grey.image_states)
    elif ablation == "frames_shuffled" and features.world_latents is not None:
        yield item, shuffled(stage, batch, features)
    elif ablation == "untrained_projection":
        trained = copy.deepcopy(stage.model.world_projector.state_dict())
        stage.model.world_projector.load_state_dict(fresh)
        try:
            yield item, features
        finally:
            stage.model.world_projector.load_state_dict(trained)
    else:
        yield item, features


def _fresh_projector(stage: StageModule, seed: int) -> dict[str, Tensor]:
    """Returns weights of the world projector drawn as for a new run; not the ones that this run has started from."""
    fresh = copy.deepcopy(stage.model.world_projector)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh.reset_parameters()
    return dict(fresh.state_dict())
