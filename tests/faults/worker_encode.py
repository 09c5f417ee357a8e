"""Encodes as one rank of a launch, in shards of a few entries; it may kill itself while it writes one.

Arguments: the run config, and the number of shards after which it dies, half a shard written (0: it lives).
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from rich.console import Console

from theworld_train import encode, encoded_files
from theworld_train.config import load_run_config

SHARD_BYTES, LISTED_TOGETHER = 20_000, 2


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

    encoded_files.SHARD_BYTES, encode.LISTED_TOGETHER = SHARD_BYTES, LISTED_TOGETHER
    encoded_files.sync = sync_or_die
    for kept in encode.encode(load_run_config(sys.argv[1]), Console()):
        print(kept)


if __name__ == "__main__":
    main()
