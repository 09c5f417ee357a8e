"""Trains several run configs one after the other on the ranks that torchrun has started.

Usage: torchrun --standalone --nproc_per_node=2 worker_ddp.py CONFIG...
"""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_the_launcher() -> None:
    """Ends this process when the one that started it ends in whatever way, so that no rank is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    die_with_the_launcher()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from rich.console import Console

    from theworld_train.assemble.run import train
    from theworld_train.config import load_run_config
    from theworld_train.train.runtime import Runtime

    close = Runtime.close
    # A run ends its process group; the runs of this process share one, which saves the time of forming it.
    Runtime.close = lambda runtime: None  # type: ignore[method-assign]
    configs = [load_run_config(path) for path in sys.argv[1:]]
    for config in configs:
        train(config, Console(file=io.StringIO()))
    runtime = Runtime(configs[-1])
    assert runtime.world_size == int(os.environ["WORLD_SIZE"])
    close(runtime)


if __name__ == "__main__":
    main()
