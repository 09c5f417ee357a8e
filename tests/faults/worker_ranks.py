"""Runs configs that fail on some rank, one after the other in one process group, and writes what each rank was told.

`{rank}` in a config stands for the rank, as if the nodes saw different file systems.

Usage: torchrun --standalone --nproc_per_node=2 worker_ranks.py REPORT_DIRECTORY CONFIG...
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from pathlib import Path

from theworld_train.train.stopping import end_with_parent


def main() -> None:
    end_with_parent(signal.SIGKILL)  # the launcher, in whatever way it ends
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from rich.console import Console

    from theworld_train.assemble import inputs, run
    from theworld_train.config import load_run_config
    from theworld_train.config.errors import ConfigError
    from theworld_train.train.checkpoint import CheckpointWriter
    from theworld_train.train.runtime import Runtime

    def fail(*_args: object, **_kwargs: object) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    inputs.check_budget = lambda *_: []  # which would find before the first step that nothing is readable
    close, write = Runtime.close, CheckpointWriter.write
    Runtime.close = Runtime.abort = lambda runtime: None  # type: ignore[method-assign]
    rank = os.environ["RANK"]
    report: dict[str, list[str]] = {}
    for path in map(Path, sys.argv[2:]):
        own = path.with_name(f"{path.stem}.{rank}.yaml")
        own.write_text(path.read_text().replace("{rank}", rank))
        config = load_run_config(own)
        CheckpointWriter.write = fail if config.name.startswith("save") else write  # type: ignore[method-assign]
        try:
            run.train(config, Console(file=io.StringIO()))
        except ConfigError as error:
            report[path.stem] = ["ConfigError", str(error)]
        except Exception as error:
            report[path.stem] = [type(error).__name__, str(error)]
        else:
            report[path.stem] = ["", ""]
    runtime = Runtime(config)
    assert runtime.world_size == int(os.environ["WORLD_SIZE"])
    (Path(sys.argv[1]) / f"rank-{rank}.json").write_text(json.dumps(report))
    close(runtime)


if __name__ == "__main__":
    main()
