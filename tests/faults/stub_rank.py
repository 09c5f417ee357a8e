"""A rank that does nothing but end, or wait for a signal, in the way that its first argument says.

Usage: launched as a module by `theworld_train.launch`.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from theworld_train.launch import as_rank
from theworld_train.train.stopping import SAVED_AND_STOPPED


def saved(*_: object) -> None:
    raise SystemExit(SAVED_AND_STOPPED)


def main() -> None:
    case, rank = sys.argv[1], int(os.environ["RANK"])
    launcher = os.getppid()
    with as_rank():
        if case == "finish":
            return
        if case == "wrong" and rank == 1:
            raise SystemExit(2)
        if case == "killed" and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "stop itself":
            saved()
        if case in ("save", "one saves", "too slow"):
            if rank == 0 or case == "save":
                signal.signal(signal.SIGUSR1, saved)
            elif case == "too slow":
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            # Both are ready before one of them has the signal sent to the launcher.
            ready = os.path.join(sys.argv[2], f"{case} {rank}")
            open(ready, "w").close()
            while rank == 0 and not os.path.exists(os.path.join(sys.argv[2], f"{case} 1")):
                time.sleep(0.01)
            if rank == 0:
                os.kill(launcher, signal.SIGUSR1)
        time.sleep(120)


if __name__ == "__main__":
    main()
