"""Protects what the end of a trial's process is taken for."""

from __future__ import annotations

import signal

import pytest

from theworld_train.sweep.launching import ending

TRACEBACK = ["Traceback (most recent call last):", '  File "x.py", line 1', "ValueError: no such thing", "bye"]
CUDA = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB"
CPU = "RuntimeError: [enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("code", "tail", "kind", "why"),
    [
        (0, ["done"], "exited", None),
        (1, TRACEBACK, "failed", "exit code 1: ValueError: no such thing"),
        (2, ["error: 1 problem", "  optimizer.lr: expected a number"], "failed", "exit code 2: error: 1 problem"),
        (3, [], "failed", "exit code 3: it printed nothing"),
        (1, ["x", CUDA, "rank 0 ended first, with exit code 1"], "out_of_memory", CUDA),
        (1, [CPU], "out_of_memory", CPU),
        (1, ["ValueError: a key 'MemoryError' is unknown"], "failed", None),
        (-signal.SIGKILL, ["step 3"], "failed", "killed (exit code 137), often for a lack of host memory"),
        (75, ["stopped by a signal after step 3"], "interrupted", "stopped by a signal (exit code 75)"),
        (-signal.SIGTERM, [], "interrupted", "stopped by a signal (exit code 143)"),
        (138, [CUDA], "interrupted", "stopped by a signal (exit code 138)"),
    ],
)
def test_endings(code: int, tail: list[str], kind: str, why: str | None):
    found = ending(code, tail)
    assert found[0] == kind
    if why is not None or kind == "exited":
        assert found[1] == why
