"""A run that is killed while it saves or tidies: the newest sealed checkpoint is always whole, and of one step."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.faults.conftest import KEPT, Save
from theworld_train.checkpoint_files import checkpoint_step, checkpoints, verify_checkpoint
from theworld_train.train.checkpoint import clear_remains

#: What Python does to files, as its audit events call it.
CALLS = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir"}


def killed_at(call: int, save: Save, directory: Path) -> bool:
    """Saves step 4 in a process that is killed before its n-th call on a file there; False if it makes fewer calls."""
    child = os.fork()
    if child == 0:
        seen = 0

        def audit(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in CALLS and str(arguments[0]).startswith(str(directory)):
                seen += 1
                if seen == call:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        save(directory, 4)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def killed_after(seconds: float, save: Save, directory: Path) -> bool:
    """Saves step 4 in a process that is killed after some time, wherever it is; False if it has ended by then."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process as SIGKILL does
        signal.setitimer(signal.ITIMER_REAL, seconds)
        save(directory, 4)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def check_killed(kill: Callable[[Path], bool], three: Path, directory: Path, save: Save) -> bool:
    """Kills a save and looks at what is left; says whether it was killed."""
    shutil.copytree(three, directory)
    killed = kill(directory)
    found = checkpoints(directory)
    assert len(found) >= KEPT
    for path in found:
        assert verify_checkpoint(path)["step"] == checkpoint_step(path)
    assert checkpoint_step(found[-1]) in (3, 4)
    clear_remains(directory)
    assert not list(directory.glob(".step-*"))
    save(directory, 4)
    assert [path.name for path in checkpoints(directory)][-KEPT:] == ["step-3", "step-4"]
    verify_checkpoint(directory / "step-4")
    shutil.rmtree(directory)
    return killed


@pytest.fixture(scope="module")
def three(save: Save, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with two checkpoints, the older of which the next save retires."""
    directory = tmp_path_factory.mktemp("kills") / "three"
    for step in (2, 3):
        save(directory, step)
    return directory


@pytest.mark.parametrize("offset", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_newest_checkpoint_is_whole_wherever_a_save_is_killed(offset: int, three: Path, save: Save, tmp_path: Path):
    stride = 3 if offset else 1  # the slow set takes every call
    calls = offset or 1
    while check_killed(partial(killed_at, calls, save), three, tmp_path / "run", save):
        calls += stride
    assert calls > 60, "it is killed at no fewer than so many places"


def test_without_a_kill_the_oldest_is_gone(three: Path, save: Save, tmp_path: Path):
    assert not check_killed(partial(killed_at, 10**6, save), three, tmp_path / "run", save)


@pytest.mark.parametrize("points", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_newest_checkpoint_is_whole_whenever_a_save_is_killed(points: int, three: Path, save: Save, tmp_path: Path):
    started = time.perf_counter()
    save(tmp_path / "other", 4)
    whole = time.perf_counter() - started
    moments = random.Random(points)
    killed = 0
    for _ in range(points):
        moment = moments.uniform(0.001, whole)
        killed += check_killed(partial(killed_after, moment, save), three, tmp_path / "run", save)
    assert killed > points / 4, "the others were faster than the first one"
