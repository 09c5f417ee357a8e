"""Encodes, or generates, as one rank of a launch, in shards of a few entries; it may kill itself while it writes one.

Arguments: the run config, the number of shards after which it dies, half a shard written (0: it lives), and `encode`
or `rollout`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from theworld_train import encode, encoded_files
from theworld_train.config import load_run_config
from theworld_train.rollout import rollout

LISTED_TOGETHER = 2
#: A handful of pictures, or two futures of the tiny model.
SHARD_BYTES = {"encode": 20_000, "rollout": 4_096}


def main() -> None:
    left = int(sys.argv[2])
    sync = encoded_files.sync

    def sync_or_die(path: Path) -> None:
        nonlocal left
        if path.name.endswith(".safetensors." + str(os.getpid()) + ".partial"):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    command = sys.argv[3]
    encoded_files.SHARD_BYTES, encode.LISTED_TOGETHER = SHARD_BYTES[command], LISTED_TOGETHER
    encoded_files.sync = sync_or_die
    work = {"encode": encode.encode, "rollout": rollout}[command]
    print(work(load_run_config(sys.argv[1]), Console()))


if __name__ == "__main__":
    main()
