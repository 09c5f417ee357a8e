"""What `runtime.strategy: auto` stands for: resolved before a run starts, the same on every rank."""

from __future__ import annotations

import os

import typer

from theworld_train.cli.ranks import is_main_rank
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig, Strategy, able_strategies


def resolve_strategy(config: RunConfig, ranks: int) -> RunConfig:
    """Returns a config with the first strategy that fits in the place of `auto`, and says which it is.

    On a single process and without GPUs nothing has to fit: it is the one that divides least.

    Args:
        config: A run config whose strategy is `auto`.
        ranks: Processes of the run.

    Raises:
        ConfigError: If `accelerate launch` has named a strategy, or none fits; then with the cheapest change that does.
    """
    from theworld_train.train.accelerate_settings import take_over

    take_over(config, os.environ)
    able = strategies_of(config)
    memory = None if ranks == 1 else least_gpu_memory()
    if memory is None:
        chosen, reason = able[0], "one process" if ranks == 1 else f"{ranks} processes without GPUs"
    else:
        from theworld_train.plan.choice import first_that_fits

        if is_main_rank():
            typer.echo(f"{config.name}: planning, as runtime.strategy is auto", err=True)
        chosen, reason = first_that_fits(config, able, ranks, memory), f"{ranks} GPUs of {memory / 2**30:.1f} GiB"
    if is_main_rank():
        typer.echo(f"{config.name}: runtime.strategy is {chosen}, found for {reason}", err=True)
    return config.model_copy(update={"runtime": config.runtime.model_copy(update={"strategy": chosen})})


def strategies_of(config: RunConfig) -> tuple[Strategy, ...]:
    """Returns the strategies that can run a config on this machine, those that divide least first.

    Raises:
        ConfigError: If there are none.
    """
    from importlib.util import find_spec

    able = able_strategies(config, config.runtime.offload)
    if find_spec("deepspeed") is None:
        able = tuple(name for name in able if not name.startswith("zero"))
    if not able:
        hint = 'for ZeRO: pip install "theworld-train[deepspeed]"'
        message = f"no strategy that is installed can run this with offload: {config.runtime.offload}"
        raise ConfigError(Problem(message, key="runtime.strategy", value="auto", hint=hint))
    return able


def least_gpu_memory() -> int | None:
    """Returns the memory of the smallest GPU of this machine in bytes, or None without one."""
    import torch

    numbers = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(number).total_memory for number in numbers), default=None)
