"""`theworld-train profile`: where the time and the memory of a run's steps go, and two runs side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from theworld_train.cli.arguments import at_hand, one_run_config, split_overrides

if TYPE_CHECKING:
    from theworld_train.config.schema import RunConfig
    from theworld_train.profiling.report import Planned
    from theworld_train.profiling.steps import Profile

#: Where profiles go, in a directory named after the run.
PROFILES = Path("runs/profiles")


def profile(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [KEY=VALUE ...]", help="A run config, and dotted keys to override.")
    ],
    compare: Annotated[
        str | None,
        typer.Option(metavar="OTHER", help="Profile this config too, with the same keys, and print both as one table."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps against the clock alone, and as many more under the profiler.")
    ] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them, which are not measured.")] = 2,
    output: Annotated[
        Path | None, typer.Option("--output", help="The directory to write; runs/profiles/NAME if absent.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier profile there.")] = False,
) -> None:
    """Take the first steps of a run and measure them: time by component, operations, memory beside the plan, loss.

    The steps are those of `train`: same samples, rates and random numbers, from the bases or `init_from`; one more, the
    last, has its storages followed. The run's own directory is neither read nor written. One process takes the whole
    global batch; under several ranks it is refused. Of two configs each runs in a process of its own.

    Example:
        theworld-train profile configs/quickstart/projection.yaml --compare configs/quickstart/gemma-only.yaml
    """
    from theworld_train.cli.ranks import offline
    from theworld_train.config.errors import ConfigError, Problem

    paths, overrides = split_overrides(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        hint = "start it without accelerate launch or torchrun"
        raise ConfigError(
            Problem("a profile has one process", key="WORLD_SIZE", value=os.environ["WORLD_SIZE"], hint=hint)
        )
    path, config = one_run_config("profile", paths, overrides)
    offline()
    if compare is None:
        _profile_one(at_hand(path, config), steps, warmup, output or PROFILES / config.name, force)
    else:
        if Path(path).resolve() == Path(compare).resolve():
            raise ConfigError(Problem("is the config that it would be compared with", key="--compare", value=compare))
        _, other = one_run_config("profile", [compare], overrides)
        for each, its in ((path, config), (compare, other)):
            at_hand(each, its)
        second = other.name if other.name != config.name else f"{other.name}-2"
        target = output or PROFILES / f"{config.name}-and-{second}"
        options = ["--steps", str(steps), "--warmup", str(warmup)]
        _profile_two({config.name: path, second: compare}, [*overrides, *options], target, force)


def _profile_one(config: RunConfig, steps: int, warmup: int, target: Path, force: bool) -> None:
    """Profiles a run in this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would say that it starts and stops
    from theworld_train.profiling.directory import new_directory, profile_run
    from theworld_train.profiling.steps import Schedule

    with new_directory(target, force=force) as directory:
        report, said = profile_run(config, Schedule(warmup, steps), directory, _plan)
    typer.echo(report)
    for line in said:
        typer.echo(line, err=True)
    typer.echo(f"{config.name}: {target}")


def _profile_two(configs: dict[str, str], arguments: Sequence[str], target: Path, force: bool) -> None:
    """Profiles two runs one after the other, each in a process of its own: what one has held is not the other's."""
    from theworld_train.profiling.directory import new_directory, write_comparison
    from theworld_train.train.stopping import end_with_parent

    with new_directory(target, force=force) as directory:
        for name, path in configs.items():
            command = [sys.executable, "-m", "theworld_train", "profile", path, *arguments]
            done = subprocess.run(
                [*command, "--output", str(directory / name)],
                stdout=subprocess.DEVNULL,
                preexec_fn=partial(end_with_parent, signal.SIGTERM),
                check=False,
            )
            if done.returncode:
                raise typer.Exit(done.returncode)
            typer.echo(f"{name}: profiled", err=True)
        first, second = configs
        table = write_comparison(directory, (first, second))
    typer.echo(table)
    typer.echo(f"{' and '.join(configs)}: {target}")


def _plan(profile: Profile) -> Planned:
    """Plans the step whose storages were followed."""
    from theworld_train.plan.calibration import predict_step
    from theworld_train.profiling.report import Planned

    (step,) = profile.taken("followed")
    return Planned(
        *predict_step(profile.config, step.longest, step.supervised, "cpu" if profile.device == "cpu" else "cuda")
    )
