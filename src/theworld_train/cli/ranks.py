"""What every command that runs a model sets up: the hub offline, and one voice for all ranks."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager


def offline() -> None:
    """Keeps this process off the network: weights and data come from directories or from the cache that `fetch` filled.

    Called before anything imports the hub's client, which reads the variables once.
    """
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ[variable] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def quiet_other_ranks() -> Generator[None]:
    """Lets rank 0 alone report a user's error; every rank meets the same one."""
    from theworld_train.config.errors import ConfigError

    try:
        yield
    except ConfigError:
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2) from None
        raise
