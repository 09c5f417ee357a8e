"""`theworld-train plan`: what a run will take of a GPU's memory, whether it fits, and what to change if it does not."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from theworld_train.cli.arguments import split_overrides

if TYPE_CHECKING:
    from theworld_train.accounting.gpus import Efficiencies, GpuSpec
    from theworld_train.config.schema import Offload, Strategy
    from theworld_train.plan.advice import Planner, Setting


@contextmanager
def _uncollected() -> Generator[None]:
    """Leaves cycles among the objects of a plan where they are: to look for them takes a sixth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def plan(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [KEY=VALUE ...]", help="Run configs, and keys to override.")
    ],
    gpus: Annotated[str, typer.Option("--gpus", help="GPUs that share the work; several numbers with commas.")] = "1",
    gpu: Annotated[str, typer.Option("--gpu", help="Kind of GPU, such as h100-80gb; several with commas.")] = "",
    strategy: Annotated[
        str, typer.Option("--strategy", help="ddp, zero1, zero2, zero3 or fsdp2; all that make sense if absent.")
    ] = "",
    offload: Annotated[
        str, typer.Option("--offload", help="What the host keeps: none, optimizer or all; the config's if absent.")
    ] = "",
    positions: Annotated[
        int | None, typer.Option("--positions", min=1, help="Tokens of a sample; data.max_sequence_length if absent.")
    ] = None,
    supervised: Annotated[
        int | None, typer.Option("--supervised", min=1, help="Supervised tokens of a sample; all text if absent.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw memory over the step into this PNG file.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="A run directory: hold the run against its plan, and take efficiencies from it.")
    ] = None,
) -> None:
    """Plan memory and time of runs without a GPU, by two optimizer steps of the trainer over fake tensors.

    Nothing is downloaded and no weights are read. With several kinds of GPU, or numbers of them, a table says for each
    which strategy fits.

    Example:
        theworld-train plan configs/stages/projection.yaml --gpus 8 --gpu h100-80gb
    """
    from theworld_train.cli.ranks import offline
    from theworld_train.config import load_run_config
    from theworld_train.config.errors import ConfigError

    paths, overrides = split_overrides(arguments)
    if not paths:
        raise ConfigError("plan takes at least one config")
    offline()
    ranks = _numbers(gpus)
    from theworld_train.accounting.gpus import gpu_spec

    with _without_bitsandbytes():
        from theworld_train.cli.plan_views import Group, print_matrix, print_one, rows
        from theworld_train.plan.advice import Planner
        from theworld_train.plan.strategies import offload_of, strategy_of

    kinds = [gpu_spec(name, key="--gpu") for name in _names(gpu)]
    kept = offload_of(offload) if offload else None
    chosen = [strategy_of(name) for name in _names(strategy)]
    planners = [Planner(load_run_config(path, overrides), positions, supervised) for path in paths]
    groups = [Group(each, number, _settings(each, number, chosen, kept)) for each in planners for number in ranks]
    is_matrix = len(groups) * max(1, len(kinds)) > 1
    _check_single(is_matrix and not as_json, "--calibrate", calibrate)
    _check_single(is_matrix, "--plot", plot)
    shares = None if calibrate is None else _shares(calibrate, kinds)
    if plot is not None:
        from theworld_train.plan.picture import draw

        draw(plot, groups[0].planner, groups[0].settings[0])
    if as_json:
        typer.echo(json.dumps({"plans": [row for group in groups for row in rows(group, kinds, shares)]}, indent=1))
    elif is_matrix:
        print_matrix(groups, kinds)
    else:
        print_one(groups[0], kinds, shares)


def _settings(planner: Planner, ranks: int, chosen: Sequence[Strategy], offload: Offload | None) -> tuple[Setting, ...]:
    """Returns what is planned of a run on so many GPUs.

    Args:
        planner: Of the run.
        ranks: GPUs.
        chosen: Strategies that are asked for; none for all that make sense.
        offload: What is offloaded; the config's if None. A single GPU offloads nothing.

    Raises:
        ConfigError: If a strategy cannot run the config.
    """
    from theworld_train.config.errors import ConfigError, Problem
    from theworld_train.config.schema import able_strategies

    if ranks == 1 and offload not in (None, "none"):
        message = "needs two GPUs or more: one process offloads nothing"
        raise ConfigError(Problem(message, key="--offload", value=offload))
    config = planner.config
    kept = offload or ("none" if ranks == 1 else config.runtime.offload)
    able = able_strategies(config, kept)
    wrong = [name for name in chosen if name not in able]
    if wrong:
        asked = "" if kept == "none" else f" with {kept} offloaded"
        message, hint = f"cannot run {config.name}{asked}", f"these can: {', '.join(able)}"
        raise ConfigError([Problem(message, key="--strategy", value=name, hint=hint) for name in wrong])
    names = chosen or (able if ranks > 1 else able[:1])
    return tuple(planner.setting(name, ranks, kept) for name in names)


def _check_single(several: bool, key: str, value: Path | None) -> None:
    """Refuses an option that says something of one run on one kind of GPU alone."""
    from theworld_train.config.errors import ConfigError, Problem

    if several and value is not None:
        message = "goes with one config, one number of GPUs and one kind of them"
        raise ConfigError(Problem(message, key=key, value=str(value)))


def _shares(directory: Path, kinds: Sequence[GpuSpec]) -> Efficiencies:
    """Prints a measured run beside its plan and returns the efficiencies that follow."""
    from theworld_train.config.errors import ConfigError, Problem
    from theworld_train.plan.calibration import calibrate_by, read_run

    if len(kinds) != 1:
        raise ConfigError(Problem("names the one kind of GPU that the run was measured on", key="--gpu"))
    found = calibrate_by(read_run(directory), kinds[0])
    taken = found.run.taken
    measured = statistics.median(found.run.steps)
    typer.echo(
        f"{found.run.config.name}, measured on {taken.ranks} x {taken.device}: a step of {measured:.3f} s "
        f"({found.planned_seconds:.3f} planned), a peak of {taken.peak_bytes / 2**30:.2f} GiB "
        f"({found.planned_peak / 2**30:.2f} planned)",
        err=True,
    )
    return found.shares


@contextmanager
def _without_bitsandbytes() -> Generator[None]:
    """Spares a plan what diffusers and peft import for quantised models, which takes more than a second."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    absent = modules.setdefault("bitsandbytes", None) is None
    try:
        yield
    finally:
        if absent:
            del modules["bitsandbytes"]


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    from theworld_train.config.errors import ConfigError, Problem

    names = _names(text)
    if not names or not all(name.isdecimal() and int(name) > 0 for name in names):
        raise ConfigError(Problem("takes numbers above zero, such as 8 or 1,2,8", key="--gpus", value=text))
    return [int(name) for name in names]
