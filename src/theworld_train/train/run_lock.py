"""One writer for each run directory, and for each directory of encoded media."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from theworld_train.config.errors import ConfigError, Problem

LOCK_FILE = ".run.lock"


@contextmanager
def run_lock(directory: Path, run: str, key: str = "output_dir") -> Generator[None]:
    """Holds a run directory; the lock ends with the process, however that ends, and a file that stays locks nothing.

    A POSIX lock: forked data workers do not inherit it, and cluster file systems pass it between machines. Where a
    file system has no locks, the directory is not guarded.

    Args:
        directory: The run directory.
        run: Name of the run.
        key: Configuration key that names the directory.

    Raises:
        ConfigError: If another process holds it, naming its host, process and run.
    """
    with (directory / LOCK_FILE).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _refusal(directory, (directory / LOCK_FILE).read_text(), key) from None
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "run": run}))
        file.flush()
        yield


def _refusal(directory: Path, text: str, key: str) -> ConfigError:
    try:
        owner = "run {run}, process {pid} on {host}".format(**json.loads(text))
    except (ValueError, KeyError):  # the other process is about to write it
        owner = "another run"
    return ConfigError(
        Problem(
            f"is being written by {owner}",
            key=key,
            value=str(directory),
            hint=f"wait for it or end it, or choose another {key}",
        )
    )
