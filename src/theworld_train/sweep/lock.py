"""Who looks after what: locks of a sweep and of its trials, which end when nobody is left who holds them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from theworld_train.config.errors import ConfigError, Problem

SWEEP_LOCK = ".sweep.lock"
TRIAL_LOCK = ".trial.lock"


@contextmanager
def sweep_lock(directory: Path) -> Generator[None]:
    """Holds a sweep while trials are chosen or its files are written; waits for others who do so.

    Raises:
        ConfigError: If the file system has no locks, without which two workers would run the same trial.
    """
    with (directory / SWEEP_LOCK).open("a") as file:
        _lock(file, fcntl.LOCK_EX, directory)
        yield


@dataclass(frozen=True)
class TrialLock:
    """A trial that this process looks after.

    The launched process inherits the open file, and with it the lock: it is free when both have ended.
    """

    file: IO[str]

    def release(self) -> None:
        """Gives the trial back; a process that was launched with the lock holds it on."""
        self.file.close()


def take(directory: Path) -> TrialLock | None:
    """Takes a trial's lock; None if somebody holds it.

    Args:
        directory: The trial's directory, which is made if there is none.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / TRIAL_LOCK).open("a+")
    if not _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, directory):
        file.close()
        return None
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    file.flush()
    return TrialLock(file)


def is_held(directory: Path) -> bool:
    """Whether somebody looks after a trial, or a process of it still runs."""
    try:
        with (directory / TRIAL_LOCK).open() as file:
            return not _lock(file, fcntl.LOCK_SH | fcntl.LOCK_NB, directory)
    except FileNotFoundError:
        return False


def is_orphan(directory: Path) -> bool:
    """Whether who looked after a trial on this machine has gone, and what is left of a launch holds its lock."""
    try:
        owner = json.loads((directory / TRIAL_LOCK).read_text())
        host, process = owner["host"], int(owner["pid"])
    except (ValueError, KeyError, FileNotFoundError):  # its owner is about to write it
        return False
    if host != socket.gethostname():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's process, so it lives
        return False
    return False


def _lock(file: IO[str], operation: int, directory: Path) -> bool:
    """Locks a file; False if another holds it."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise ConfigError(
            Problem(
                f"is on a file system without locks ({error.strerror}), so two workers could run one trial",
                key="output_dir",
                value=str(directory),
                hint="choose one on a file system with them",
            )
        ) from error
    return True
