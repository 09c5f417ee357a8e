"""Heartbeats tell where a rank is, and only ranks that have really stayed behind end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from theworld_train.train import watchdog as module
from theworld_train.train.watchdog import HEARTBEATS, STUCK, Watchdog, clear_heartbeats

#: Seconds; the thread looks ten times within it.
LIMIT_S = 0.05
#: Seconds after which what should have happened counts as never doing so.
PATIENCE_S = 30


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Whether the process would have been ended; the thread ends in its place."""
    event = threading.Event()

    def end(code: int) -> None:
        assert code == STUCK
        event.set()
        raise SystemExit

    monkeypatch.setattr(module.os, "_exit", end)
    monkeypatch.setattr(module, "COLLECT_S", 0.0)
    return event


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Waits until watchdogs have looked so many times."""
    semaphore, write = threading.Semaphore(0), Watchdog._write

    def counted(watchdog: Watchdog, here: Any) -> None:
        write(watchdog, here)
        semaphore.release()

    monkeypatch.setattr(Watchdog, "_write", counted)

    def wait(times: int) -> None:
        for _ in range(times):
            assert semaphore.acquire(timeout=PATIENCE_S)

    return wait


def heartbeat(directory: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((directory / HEARTBEATS / f"rank-{rank}.json").read_text())


def test_heartbeat_says_where_the_rank_is(tmp_path: Path, looked: Callable[[int], None]):
    with Watchdog(tmp_path, 3, 8, 100.0) as watchdog:
        watchdog.enter("training", 7, ["a", "b"])
        looked(2)
        beat = heartbeat(tmp_path, 3)
        assert (beat["rank"], beat["phase"], beat["step"], beat["sample_ids"]) == (3, "training", 7, ["a", "b"])
        watchdog.beat()
        looked(2)
        assert heartbeat(tmp_path, 3)["time"] > beat["time"]
        assert heartbeat(tmp_path, 3) | {"time": ""} == beat | {"time": ""}


def test_rank_that_stays_behind_ends_and_says_where(tmp_path: Path, ended: threading.Event):
    with Watchdog(tmp_path, 0, 2, LIMIT_S) as watchdog:
        watchdog.enter("evaluating", 5)
        assert ended.wait(PATIENCE_S)
    report = (tmp_path / "stuck-step-5.txt").read_text()
    assert "rank 0: evaluating, step 5" in report
    assert "rank 1: has left no heartbeat -- says nothing any more" in report
    assert "test_rank_that_stays_behind_ends_and_says_where" in report.split("== stacks of rank 0")[1]


def test_only_one_rank_reports(tmp_path: Path, ended: threading.Event):
    with Watchdog(tmp_path, 1, 2, 1000.0, "now") as watchdog:
        watchdog._interval_s = LIMIT_S
        (tmp_path / HEARTBEATS / "rank-0.now.stacks").write_text("of rank 0")
        assert ended.wait(PATIENCE_S), "it ends with the one that has noticed"
    assert (tmp_path / HEARTBEATS / "rank-1.now.stacks").is_file()
    assert not list(tmp_path.glob("stuck-*"))


def test_others_wait_for_the_report(tmp_path: Path, ended: threading.Event, monkeypatch: pytest.MonkeyPatch):
    waited, report = threading.Event(), tmp_path / "stuck-step-4.txt"

    def write_after_a_while(_: float) -> None:
        waited.set()
        report.touch()

    with Watchdog(tmp_path, 1, 2, 1000.0, "now") as watchdog:
        watchdog.enter("loading", 4)
        (tmp_path / HEARTBEATS / "rank-0.now.stacks").write_text("of rank 0")
        monkeypatch.setattr(module, "COLLECT_S", float(PATIENCE_S))
        monkeypatch.setattr(module.time, "sleep", write_after_a_while)
        watchdog._interval_s = LIMIT_S
        assert ended.wait(PATIENCE_S)
        assert waited.is_set(), "a launcher would have ended rank 0 before its report was written"


def test_rank_of_an_earlier_launch_that_wakes_ends_nobody(
    tmp_path: Path, ended: threading.Event, looked: Callable[[int], None]
):
    with Watchdog(tmp_path, 1, 2, 1000.0, "now") as watchdog:
        watchdog._interval_s = LIMIT_S
        (tmp_path / HEARTBEATS / "rank-0.before.stacks").write_text("of rank 0")
        looked(5)
        assert not ended.is_set()


@pytest.mark.parametrize(("ranks", "patience"), [(2, 1000.0), (1, 1.0)], ids=["patient", "alone"])
def test_rank_that_may_take_longer_goes_on(
    ranks: int, patience: float, tmp_path: Path, ended: threading.Event, looked: Callable[[int], None]
):
    with Watchdog(tmp_path, 0, ranks, LIMIT_S) as watchdog:
        watchdog.enter("saving", 5, patience=patience)
        looked(30)  # three times the limit
        assert not ended.is_set()


def test_heartbeat_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looked: Callable[[int], None]
):
    def fail(*_: object) -> None:
        raise OSError("no space left")

    with Watchdog(tmp_path, 0, 2, 100.0) as watchdog:
        monkeypatch.setattr(module, "_replace", fail)
        watchdog.beat()
        looked(3)
        assert watchdog._thread.is_alive()


def test_stacks_of_an_earlier_process_are_gone(tmp_path: Path):
    (tmp_path / HEARTBEATS).mkdir()
    (tmp_path / HEARTBEATS / "rank-1.stacks").touch()
    clear_heartbeats(tmp_path)
    assert not (tmp_path / HEARTBEATS).exists()
    clear_heartbeats(tmp_path)
