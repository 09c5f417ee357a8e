"""`theworld-train rollout`: generate the futures that a run reads, or say what that takes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from theworld_train.cli.arguments import at_hand, one_run_config, split_overrides

if TYPE_CHECKING:
    from theworld_train.accounting.gpus import GpuSpec
    from theworld_train.config.schema import RunConfig


def rollout(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [KEY=VALUE ...]", help="A run config, and dotted keys to override.")
    ],
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Generate for data.eval alone, to measure with what is generated.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what one sample takes, and generate nothing.")] = False,
    gpu: Annotated[str, typer.Option("--gpu", help="With --plan: kinds of GPU, such as l4; several with commas.")] = "",
) -> None:
    """Generate what follows the pictures of a run into data.encoded, for training with data.world.frames=rollout.

    Cosmos-Predict2 Video2World continues each picture under a prompt, as data.world.rollout says. What is there already
    is not generated again: run it once more after it was stopped, or with more data. Several processes share the work
    under `torchrun -m theworld_train rollout ...` or `accelerate launch`.

    Example:
        theworld-train rollout configs/quickstart/where-next.yaml data.world.frames=rollout data.encoded=runs/encoded
    """
    from theworld_train.cli.ranks import offline, quiet_other_ranks
    from theworld_train.config.errors import ConfigError, Problem

    paths, overrides = split_overrides(arguments)
    with quiet_other_ranks():
        path, config = one_run_config("rollout", paths, overrides)
        offline()
        if gpu and not plan:
            raise ConfigError(Problem("goes with --plan", key="--gpu", value=gpu))
        if held_out and plan:
            raise ConfigError(Problem("does not go with --plan, which plans a single sample", key="--held-out"))
        if plan:
            from theworld_train.accounting.gpus import gpu_spec

            _print_plan(config, [gpu_spec(name.strip(), key="--gpu") for name in gpu.split(",") if name.strip()])
            return
        config = at_hand(path, config, generating=True)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from theworld_train.cli.tables import output
        from theworld_train.rollout import rollout as run

        if (made := run(config, output(), only_held_out=held_out)) is not None:
            output().print(str(made), highlight=False, markup=False, soft_wrap=True)


def _print_plan(config: RunConfig, kinds: list[GpuSpec]) -> None:
    from rich.table import Table

    from theworld_train.cli.tables import output
    from theworld_train.plan.rollout import plan_rollout
    from theworld_train.rollout import check_rollout

    check_rollout(config)
    planned, rules = plan_rollout(config), config.data.world.rollout
    console = output()
    table = Table(title=f"{rules.pipeline}: {rules.num_frames} frames of {rules.height} x {rules.width}, {rules.dtype}")
    for name in ("part", "parameters", "weights GiB", "on the device GiB", "TFLOP", "calls"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in planned.parts:
        table.add_row(
            part.name,
            f"{part.parameters:,}",
            f"{part.weights / 2**30:.2f}",
            f"{planned.peak(part) / 2**30:.2f}",
            f"{sum(part.flops.values()) / 1e12:.1f}",
            str(part.calls),
        )
    console.print(table)
    console.print(f"most memory: {planned.largest.name}; of each sample {planned.kept} latent frames are kept")
    console.print("not counted: the guardrail's own models, which take turns with the others on the device")
    if kinds:
        fits = Table(title="one sample at a time on one GPU")
        for name in ("gpu", "fits", "GiB free", "seconds a sample", "samples an hour"):
            fits.add_column(name, justify="left" if name == "gpu" else "right")
        for kind in kinds:
            time, free = planned.seconds(kind), kind.usable_gib - planned.peak(planned.largest) / 2**30
            span = f"{time.expected:,.0f} ({time.best:,.0f} to {time.worst:,.0f})"
            fits.add_row(
                kind.name, "yes" if planned.fits(kind) else "no", f"{free:.1f}", span, f"{3600 / time.expected:,.0f}"
            )
        console.print(fits)
