"""What every command that runs a model sets up: the hub offline, and one voice for all ranks."""

from __future__ import annotations

import logging
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
    quieten()


def quieten() -> None:
    """Leaves out what a library says at each start and nobody can act on."""
    # diffusers imports bitsandbytes where it is installed, which then asks for a kernel that only 4-bit weights need.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "Failed to load CPU gemm_4bit_forward" not in record.getMessage()
    )


def is_main_rank() -> bool:
    """Whether this process is the one that prints and writes; the launcher has numbered the ranks."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def quiet_other_ranks() -> Generator[None]:
    """Lets one process of each node report a user's error: its other ranks meet, or are told of, the same one."""
    from theworld_train.config.errors import ConfigError

    try:
        yield
    except ConfigError:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None
        raise
