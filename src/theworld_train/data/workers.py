"""The beginning and the end of a data worker, whatever it loads."""

from __future__ import annotations

import os
import signal


def start_worker(_worker: int) -> None:
    """Has a worker ignore the signals that the training process acts upon, and its tokenizer run in one thread.

    A scheduler signals the whole job. Only the training process may react, by saving at the next step; a worker that
    died of the signal would take the step with it. Workers end when the training process does.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Tokenizers would warn in every worker that their own threads cannot be forked.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def end_workers(iterator: object) -> None:
    """Asks the workers of a loader's iterator to end, and kills those that do not."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is None:
        return
    shutdown()
    for worker in getattr(iterator, "_workers", ()):
        if worker.is_alive():
            worker.kill()
