"""What a step takes in time: the run config's sizes, put into the closed formulas of `accounting`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from theworld_train.accounting.collectives import Collective, Exchanged, collectives
from theworld_train.accounting.flops import StepModel, StepSettings, StepShape, StepWork, step_work
from theworld_train.accounting.gpus import Efficiencies, GpuSpec, efficiencies
from theworld_train.accounting.pieces import Attention
from theworld_train.accounting.step_time import RunTime, StepTime, run_time, step_time
from theworld_train.assemble.encoded import kept_encoders
from theworld_train.assemble.model import describe_model, trims_last_layers
from theworld_train.config.schema import RunConfig
from theworld_train.plan.advice import Setting
from theworld_train.plan.dry_run import DryRun

#: How the model's kinds of attention compute their scores.
_ATTENTION: dict[str, Attention] = {
    "auto": "banded",
    "banded": "banded",
    "flex": "structured",
    "sdpa": "sdpa",
    "eager": "eager",
}


@dataclass(frozen=True)
class PlannedTime:
    """What a run takes in time on one kind of GPU.

    Attributes:
        step: One optimizer step.
        run: The whole run, if the config says how many steps it has.
    """

    step: StepTime
    run: RunTime | None


def plan_time(
    config: RunConfig, dry: DryRun, setting: Setting, gpu: GpuSpec, shares: Efficiencies | None = None
) -> PlannedTime:
    """Returns the time of a run.

    Args:
        config: The run config.
        dry: The dry run that its memory was planned by, for the shape of a sample and the parameters.
        setting: How the run is laid out.
        gpu: What it runs on.
        shares: Of the GPU's peaks, as measured; the shipped ones if absent.
    """
    shares = efficiencies(gpu) if shares is None else shares
    work = planned_work(config, dry, setting)
    exchanges: tuple[Collective, ...] = ()
    if setting.ranks > 1:
        wrapped = [parameter for parameter in dry.parameters if parameter.unit is not None]
        sizes = {trains: sum(p.numel for p in wrapped if p.trains is trains) for trains in (True, False)}
        units = len({parameter.unit for parameter in wrapped})
        computed = 4 if config.precision == "fp32" else 2
        # ZeRO-3 gathers masters; the world encoder, small beside the rest, is not told apart here.
        stored = computed if config.precision == "bf16_pure" or setting.strategy.name != "zero3" else 4
        exchanged = Exchanged(sizes[True], sizes[False], units, trainable_bytes=stored, frozen_bytes=computed)
        exchanges = collectives(setting.strategy.name, exchanged, _accumulation(config, dry, setting))
    precision = "fp32" if config.precision == "fp32" else "bf16"
    step = step_time(work, gpu, shares, ranks=setting.ranks, exchanges=exchanges, precision=precision)
    steps = config.training.max_steps
    return PlannedTime(step, None if steps is None else run_time(step, steps, setting.ranks))


def planned_work(config: RunConfig, dry: DryRun, setting: Setting) -> StepWork:
    """Returns what one rank computes in an optimizer step; arguments as in `plan_time`."""
    training = config.training
    return step_work(
        StepModel.from_config(describe_model(config).to_dict()),
        StepShape(
            setting.micro_batch_size,
            dry.shape.positions,
            dry.shape.supervised,
            images=dry.shape.images,
            frames=dry.shape.frames,
            gradient_accumulation_steps=_accumulation(config, dry, setting),
        ),
        StepSettings(
            trainable=frozenset(config.trainable),
            # Where the time goes: what `selective` computes again is no product, and costs little.
            gradient_checkpointing=training.gradient_checkpointing.language_model == "full",
            attention=_ATTENTION[config.model.attention],
            chunk_size=training.loss_chunk_size,
            precision="fp32" if config.precision == "fp32" else "bf16",
            world_encoder_precision="bf16" if config.model.world.encoder_dtype == "bfloat16" else "fp32",
            cached=kept_encoders(config),
            trims=trims_last_layers(config),
            optimizer_shards=1 if setting.strategy.name == "ddp" else setting.ranks,
            adapters={
                component: sum(p.numel for p in dry.parameters if p.trains and p.component == component)
                for component, entry in config.trainable.items()
                if entry.adapter is not None
            },
        ),
    )


def _accumulation(config: RunConfig, dry: DryRun, setting: Setting) -> int:
    samples = setting.micro_batch_size * setting.ranks * dry.shape.images
    return max(1, math.ceil(config.training.global_batch_size / samples))
