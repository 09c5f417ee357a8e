"""Launchers: what is put before a training command, and how many processes it starts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

#: Flags of launchers that say how many processes there are: on each machine, of machines, and of all together.
_PROCESS_FLAGS = ("--nproc", "--nproc-per-node", "--nproc_per_node")
_MACHINE_FLAGS = ("--nnodes",)
_ALL_PROCESSES_FLAGS = ("--num_processes", "--num-processes", "--ntasks")


def ranks_of(launcher: Sequence[str]) -> int | None:
    """Returns how many processes a launcher starts; None if its words do not say."""
    if not launcher:
        return 1
    words = [part for word in launcher for part in (word.split("=", 1) if word.startswith("--") else [word])]
    numbers = {flag: int(value) for flag, value in pairwise(words) if value.isdecimal()}

    def first(flags: Sequence[str]) -> int | None:
        return next((numbers[flag] for flag in flags if flag in numbers), None)

    processes, machines = first(_PROCESS_FLAGS), first(_MACHINE_FLAGS) or 1
    return first(_ALL_PROCESSES_FLAGS) if processes is None else processes * machines
