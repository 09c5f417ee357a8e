"""Trains several run configs one after the other on the ranks that torchrun has started, and may measure a checkpoint.

Usage: torchrun --standalone --nproc_per_node=2 worker_ddp.py CONFIG...
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Collection, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from theworld_train.train.stopping import end_with_parent

#: Variable that says how many nodes the ranks are to take themselves for.
NODES = "TEST_NODES"
#: Variables that name a checkpoint to measure when all runs are done, and the file for what is found.
MEASURE, FOUND = "TEST_MEASURE", "TEST_FOUND"
#: Name of runs in which only samples of some kinds have labels.
UNLABELLED = "unlabelled"
LABELLED = ("clip",)


@contextmanager
def supervising(kinds: Collection[str]) -> Generator[None]:
    """Lets no sample but those of some kinds have labels, as no data could be written that had none."""
    from theworld_train.data import Collator

    original = Collator.collate

    def collate(self: Any, rows: Any) -> Any:
        shown = [
            [
                (sample, encoded if sample.kind in kinds else replace(encoded, supervised=encoded.supervised & False))
                for sample, encoded in row
            ]
            for row in rows
        ]
        return original(self, shown)

    Collator.collate = collate  # type: ignore[method-assign]
    try:
        yield
    finally:
        Collator.collate = original  # type: ignore[method-assign]


def main() -> None:
    end_with_parent(signal.SIGKILL)  # the launcher, in whatever way it ends
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["WORLD_SIZE"]) // int(os.environ.get(NODES, "1")))
    from rich.console import Console

    from theworld_train.assemble.run import train
    from theworld_train.config import load_run_config
    from theworld_train.train.runtime import Runtime

    close = Runtime.close
    # A run ends its process group; the runs of this process share one, which saves the time of forming it.
    Runtime.close = Runtime.abort = lambda runtime: None  # type: ignore[method-assign]
    configs = [load_run_config(path) for path in sys.argv[1:]]
    for config in configs:
        with supervising(LABELLED) if config.name == UNLABELLED else nullcontext():
            train(config, Console(file=io.StringIO()))
    if MEASURE in os.environ:
        measure(Path(os.environ[MEASURE]), Path(os.environ[FOUND]))
    runtime = Runtime(configs[-1])
    assert runtime.world_size == int(os.environ["WORLD_SIZE"])
    check_timeouts(configs[-1].runtime.timeout_s)
    close(runtime)


def measure(checkpoint: Path, file: Path) -> None:
    """Has the main rank write what all of them find."""
    from theworld_train.config.schema import ABLATIONS
    from theworld_train.evaluate.ablations import run_ablations

    found = run_ablations(checkpoint, ABLATIONS).to_dict()
    if os.environ["RANK"] == "0":
        file.write_text(json.dumps(found))


def check_timeouts(seconds: int) -> None:
    """Makes sure that every group, those of engines too, has the timeout of the config or that of a long wait."""
    import torch
    from torch.distributed import distributed_c10d

    from theworld_train.train.runtime import PATIENCE
    from theworld_train.train.watchdog import REPORT_S

    backends = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    found = {backend.options._timeout.total_seconds() for backend in backends}
    assert found == {seconds + REPORT_S, PATIENCE.total_seconds()}, found


if __name__ == "__main__":
    main()
