"""Data workers, whatever they load: processes that begin, work and end with the one that trains."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


def in_workers(
    dataset: Dataset[T], requests: Iterable[Any], num_workers: int, *, pin_memory: bool = False
) -> Generator[T, None, None]:
    """Yields what a dataset has for each request, in order, from worker processes, and ends them whatever happens.

    Args:
        dataset: Has an item for each request; an error that it raises is a bug, and one of the user's a value.
        requests: Made one by one, as they are needed.
        num_workers: Worker processes; 0 loads in this process.
        pin_memory: Put tensors into page-locked memory, for GPUs.
    """
    loader: DataLoader[T] = DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        collate_fn=_identity,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        # A generator of its own: the loader would otherwise draw from the global one, which belongs to the model.
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    try:
        yield from iterator
    finally:
        _end_workers(iterator)


def _identity(loaded: object) -> object:
    return loaded


def _start_worker(_worker: int) -> None:
    """Has a worker ignore the signals that the training process acts upon, and its tokenizer run in one thread.

    A scheduler signals the whole job. Only the training process may react, by saving at the next step; a worker that
    died of the signal would take the step with it. Workers end when the training process does.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Tokenizers would warn in every worker that their own threads cannot be forked.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_workers(iterator: object) -> None:
    """Asks the workers of a loader's iterator to end, and kills those that do not."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is None:
        return
    shutdown()
    for worker in getattr(iterator, "_workers", ()):
        if worker.is_alive():
            worker.kill()
