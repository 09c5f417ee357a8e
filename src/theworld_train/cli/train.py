"""`theworld-train train`: run one stage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from theworld_train.cli.arguments import at_hand, one_run_config, split_overrides

if TYPE_CHECKING:
    from theworld_train.config.schema import RunConfig
    from theworld_train.train.metrics import Forecast, Resources


def train(
    arguments: Annotated[
        list[str], typer.Argument(metavar="CONFIG [KEY=VALUE ...]", help="A run config, and dotted keys to override.")
    ],
) -> None:
    """Train one stage on this process, or on all processes of `accelerate launch -m theworld_train train ...`.

    Exit codes: 0 complete, 69 ranks have waited for each other in vain, 75 stopped by a signal and saved (resume=latest
    goes on).

    Example:
        theworld-train train configs/stages/projection.yaml training.epochs=null training.max_steps=100
    """
    from theworld_train.cli.ranks import offline, quiet_other_ranks
    from theworld_train.launch import as_rank

    paths, overrides = split_overrides(arguments)
    with as_rank(), quiet_other_ranks():
        path, config = one_run_config("train", paths, overrides)
        offline()
        config = at_hand(path, config)
        if config.runtime.strategy == "auto":
            from theworld_train.cli.strategy import resolve_strategy

            config = resolve_strategy(config, int(os.environ.get("WORLD_SIZE", "1")))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from theworld_train.assemble.run import train as run
        from theworld_train.cli.tables import output
        from theworld_train.train.stopping import SAVED_AND_STOPPED, StoppedError

        try:
            run(config, output(), _predict)
        except StoppedError as stopped:
            if os.environ.get("RANK", "0") == "0":
                typer.echo(f"{config.name}: {stopped}; resume=latest goes on from there", err=True)
            raise SystemExit(SAVED_AND_STOPPED) from None


def _predict(config: RunConfig, taken: Resources) -> Forecast:
    """Plans a run that has ended, to be held against what it has taken."""
    from theworld_train.plan.calibration import predict

    return predict(config, taken)
