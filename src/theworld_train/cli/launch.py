"""`theworld-train launch`: run one stage on all processes of this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from theworld_train.cli.arguments import one_run_config, split_overrides
from theworld_train.cli.exit_codes import INTERRUPTED, INTERRUPTED_LINE


def launch(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [KEY=VALUE ...]", help="A run config, and dotted keys to override.")
    ],
    nproc: Annotated[int, typer.Option("--nproc", help="Processes on each machine, one for each GPU.")] = 1,
    nnodes: Annotated[int, typer.Option("--nnodes", help="Machines; each of them runs this command.")] = 1,
    node_rank: Annotated[
        int | None, typer.Option("--node-rank", help="This machine's number; they number themselves if absent.")
    ] = None,
    rdzv_endpoint: Annotated[
        str | None, typer.Option("--rdzv-endpoint", metavar="HOST[:PORT]", help="Where machines meet.")
    ] = None,
    grace_s: Annotated[
        int | None,
        typer.Option("--grace-s", help="Seconds to save in after a signal; by the size of a checkpoint if absent."),
    ] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print the torchrun command instead.")] = False,
) -> None:
    """Train one stage on all processes of this machine, through torchrun, and end them with this process.

    Signals reach every process; docs/distributed.md says more.

    Exit codes: 0 complete, 69 ranks have waited for each other in vain, 75 stopped by a signal and saved, 128 + N
    ended by signal N without a save.

    Example:
        theworld-train launch configs/stages/full.yaml --nproc 8 runtime.strategy=zero2 resume=latest
    """
    paths, overrides = split_overrides(arguments)
    path, config = one_run_config("launch", paths, overrides)
    from theworld_train.launch import Topology, launch_command, run

    topology = Topology(nproc, nnodes, node_rank, rdzv_endpoint)
    command = launch_command(config, path, overrides, topology, grace_s)  # what is wrong with it is told first
    if config.runtime.strategy == "auto":
        from theworld_train.cli.ranks import offline
        from theworld_train.cli.strategy import resolve_strategy

        offline()
        resolved = resolve_strategy(config, nproc * nnodes)
        overrides = [*overrides, f"runtime.strategy={resolved.runtime.strategy}"]
        command = launch_command(resolved, path, overrides, topology, grace_s)
    if print_only:
        typer.echo(str(command))
    else:
        code = run(command)
        if code == INTERRUPTED:
            typer.echo(INTERRUPTED_LINE, err=True)
        raise typer.Exit(code)
