"""`theworld-train encode`: keep what a run's frozen encoders make of its media."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from theworld_train.cli.arguments import at_hand, one_run_config, split_overrides


def encode(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [KEY=VALUE ...]", help="A run config, and dotted keys to override.")
    ],
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="COMPONENT", help="Keep the work of this encoder alone.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read first what is there, to find damage.")] = False,
) -> None:
    """Write what the frozen encoders make of a run's images and clips into data.encoded, for training to read.

    What is there already is not encoded again: run it once more after it was stopped, or with more data. Several
    processes share the work under `torchrun -m theworld_train encode ...` or `accelerate launch`.

    Example:
        theworld-train encode configs/stages/projection.yaml data.encoded=runs/encoded --only world_encoder
    """
    from theworld_train.cli.ranks import offline, quiet_other_ranks

    paths, overrides = split_overrides(arguments)
    with quiet_other_ranks():
        path, config = one_run_config("encode", paths, overrides)
        offline()
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from theworld_train.cli.tables import output
        from theworld_train.encode import chosen_encoders
        from theworld_train.encode import encode as run

        chosen_encoders(config, only or ())  # what is wrong with the call is told before what is missing here
        config = at_hand(path, config)
        for kept in run(config, output(), only or (), verify=verify):
            output().print(str(kept), highlight=False, markup=False, soft_wrap=True)
