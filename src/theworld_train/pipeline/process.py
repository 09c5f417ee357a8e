"""The processes of a pipeline's stages: one after the other, and told of every signal to stop."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from theworld_train.train.stopping import STOP_SIGNALS, end_with_parent

#: What the shell adds to the number of the signal that has ended a process.
SIGNAL_BASE = 128
#: Seconds that a stage has to end after Ctrl-C, and again after SIGTERM.
ENDING_S = 10


class Processes:
    """Runs one process after the other, and passes the signals on to it that a stage stops on.

    Attributes:
        stopped_by: The first signal that has come; None if there was none. No process is started after it.
    """

    def __init__(self) -> None:
        """Begins without a process."""
        self.stopped_by: signal.Signals | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Generator[None]:
        """Takes the signals while a block runs, between its processes too."""
        before = {number: signal.signal(number, self._pass_on) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.stopped_by = self.stopped_by or signal.Signals(number)
        if self._process is not None:
            self._process.send_signal(number)

    def call(self, command: Sequence[str]) -> int:
        """Runs a process, which must not outlive this one.

        Returns:
            Its exit code, or 128 + the signal that has ended it.

        Raises:
            KeyboardInterrupt: After Ctrl-C, once the process has ended.
        """
        # Blocked until there is a process to pass them on to; that begins as if they were not.
        own, mask = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            if self.stopped_by is not None:
                return SIGNAL_BASE + self.stopped_by
            process = self._process = subprocess.Popen(command, preexec_fn=lambda: _begin_stage(own))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        try:
            returncode = process.wait()
        except (
            BaseException
        ):  # such as Ctrl-C, which the terminal sends to the stage too: it gets time to end its ranks
            for end in (process.terminate, process.kill):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(ENDING_S)
                end()  # nothing, if it has ended
            process.wait()
            raise
        finally:
            self._process = None
        return returncode if returncode >= 0 else SIGNAL_BASE - returncode


def _begin_stage(pipeline: int) -> None:
    """Has a stage stop when the pipeline's process ends in whatever way, and take signals again."""
    end_with_parent(signal.SIGTERM)
    if os.getppid() != pipeline:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
