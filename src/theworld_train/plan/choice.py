"""The choice of a strategy: the first one that fits the GPUs at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

from theworld_train.accounting.gpus import GpuSpec
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig, Strategy
from theworld_train.plan.advice import GIB, Change, Planner, judge


def first_that_fits(config: RunConfig, strategies: Sequence[Strategy], ranks: int, memory: int) -> Strategy:
    """Returns the first of several strategies under which a run fits with room to spare.

    Args:
        config: The run config.
        strategies: In the order of preference.
        ranks: Processes of the run.
        memory: Bytes of each GPU.

    Raises:
        ConfigError: If none fits, with the cheapest change that makes the run fit.
    """
    planner, gpu = Planner(config), gpu_of_memory(memory)
    for name in strategies:
        if judge(planner.need(planner.setting(name, ranks, config.runtime.offload)), gpu).word == "fits":
            return name
    last = planner.setting(strategies[-1], ranks, config.runtime.offload)
    assessment = planner.assess(last, gpu)
    change = assessment.change
    hint = (
        f"set {_keys(change)}"
        if change
        else "no change that a plan knows makes it fit: `theworld-train plan` says more"
    )
    message = f"none of {', '.join(strategies)} fits {ranks} GPUs of {memory / GIB:.1f} GiB with room to spare"
    raise ConfigError(Problem(message, key="runtime.strategy", value="auto", hint=hint))


def why_not(config: RunConfig, strategies: Sequence[Strategy], ranks: int, gpu: GpuSpec) -> str | None:
    """Says why a run cannot fit a GPU under any of several strategies, or None if it may.

    Args:
        config: The run config.
        strategies: Those that it may take.
        ranks: Processes of the run, a GPU each.
        gpu: The GPU.
    """
    planner = Planner(config)
    offload = "none" if ranks == 1 else config.runtime.offload
    verdicts = [judge(planner.need(planner.setting(name, ranks, offload)), gpu) for name in strategies]
    if any(verdict.word != "does not fit" for verdict in verdicts):
        return None
    need = min((verdict.need for verdict in verdicts), key=lambda need: need.least)
    return (
        f"the plan says that it takes {need.least / GIB:.2f} GiB at least, and the GPU has {gpu.usable_gib:.2f} "
        f"({need.setting.strategy.name} on {ranks}, micro-batch {need.setting.micro_batch_size})"
    )


def _keys(change: Change) -> str:
    """Renders a change as arguments of a run."""
    setting = change.verdict.need.setting
    keys = [f"{key}={json.dumps(value)}" for key, value in change.overrides]
    return " ".join([*keys, f"runtime.strategy={setting.strategy.name}", f"runtime.offload={setting.offload}"])


def gpu_of_memory(memory: int) -> GpuSpec:
    """Returns a GPU of which nothing but its memory is known."""
    return GpuSpec(
        name="at-hand",
        title="GPU at hand",
        architecture="unknown",
        memory_gb=memory / 1e9,
        usable_gib=memory / GIB,
        tflops={},
        memory_gb_per_s=0,
        link="unknown",
        link_gb_per_s=0,
        gpus_per_node=1,
        network_gb_per_s=0,
        source="this machine",
    )
