"""Stopping on a signal: noted when it comes, acted upon between two steps, where all ranks can agree."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

#: What schedulers and launchers send some time before they kill.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
#: Exit code of a run that a signal has stopped after it was saved: sysexits.h calls it a temporary failure.
SAVED_AND_STOPPED = 75


#: `prctl` option: the signal that the kernel sends to a process when its parent ends.
_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals) -> None:
    """Has the kernel send a signal to this process when its parent ends; whether it has ended before is not told.

    Args:
        number: The signal. On systems other than Linux nothing is asked for.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


class StoppedError(Exception):
    """A signal to any rank has ended the run between two steps; what it had done is saved."""

    def __init__(self, step: int) -> None:
        """Args: step: optimizer steps done."""
        super().__init__(f"stopped by a signal after step {step}")
        self.step = step


class StopRequest:
    """Whether this process has been told to stop."""

    def __init__(self) -> None:
        """Begins without a request."""
        self.made = False

    @contextmanager
    def listening(self) -> Generator[None]:
        """Notes signals while a block runs, however often they come; only a main thread can.

        Outside of it they end the process at once: before the first step there is nothing to save.
        """
        with _handling(self._note):
            yield

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.made = True


@contextmanager
def breaking_off(step: int) -> Generator[None]:
    """Has a signal break off a block of the main thread that nothing depends on.

    Args:
        step: Optimizer steps done.

    Raises:
        StoppedError: In the block, when the signal comes.
    """

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise StoppedError(step)

    with _handling(stop):
        yield


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
