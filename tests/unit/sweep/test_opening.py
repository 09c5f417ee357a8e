"""Protects the beginning of a sweep and the going on: nothing is mixed, and only what may change does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.sweeps import write_sweep
from theworld_train.config import ConfigError, load_sweep_config
from theworld_train.sweep.lock import is_orphan, take
from theworld_train.sweep.opening import Checked, begin, go_on


def begun(folder: Path, **settings: Any) -> Checked:
    path = write_sweep(folder, **settings)
    found = begin(load_sweep_config(path), "sweep.yaml")
    (found.directory / "trials").mkdir(exist_ok=True)  # as the first trial does
    return found


def refused(folder: Path, **settings: Any) -> str:
    with pytest.raises(ConfigError) as error:
        begun(folder, **settings)
    return str(error.value)


def test_a_sweep_goes_on_with_more_trials_and_other_workers(tmp_path: Path):
    settings = {"search": "random", "trials": 3}
    found = begun(tmp_path, **settings)
    assert (found.directory / "base" / "config.yaml").is_file()
    assert begun(tmp_path, search="random", trials=5, workers={"count": 3}).wanted == 5
    assert go_on(found.directory).sweep.workers.count == 3
    assert go_on(found.directory, ["trials=7"]).wanted == 7
    assert go_on(found.directory).wanted == 7


def test_a_directory_that_was_moved_goes_on(tmp_path: Path):
    found = begun(tmp_path)
    moved = found.directory.rename(tmp_path / "elsewhere")
    assert go_on(moved).directory == moved


def test_another_sweep_is_not_mixed_in(tmp_path: Path):
    begun(tmp_path)
    space = {"optimizer.lr": {"values": [0.1, 0.2]}}
    assert "was begun with other values of space.optimizer.lr.values" in refused(tmp_path, space=space)
    assert "other values of seed" in refused(tmp_path, seed=1)
    assert "other values of optimizer.eps" in refused(tmp_path, overrides={"optimizer.eps": 1e-6})
    begun(tmp_path)


def test_what_is_frozen_stays(tmp_path: Path):
    found = begun(tmp_path)
    with pytest.raises(ConfigError, match="metric: cannot change while a sweep goes on; these may change: trials"):
        go_on(found.directory, ["metric=train/loss"])
    (tmp_path / "base.yaml").unlink()  # and what it was made from may go
    assert go_on(found.directory).target.resolve({}, "t", "runs/t", "t").runs[0].name == "t"


def test_a_directory_without_a_sweep(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no sweep: there is no sweep.yaml; begin one with"):
        go_on(tmp_path)
    (tmp_path / "file").touch()
    assert "output_dir: cannot be written to" in refused(tmp_path, output_dir=str(tmp_path / "file" / "sweep"))


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "is on a file system without locks" in refused(tmp_path)


def test_who_holds_a_trial(tmp_path: Path):
    assert not is_orphan(tmp_path)
    lock = take(tmp_path)
    assert lock is not None
    assert take(tmp_path) is None
    assert not is_orphan(tmp_path)
    path = tmp_path / ".trial.lock"
    owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"pid": 2**22 + 1}))  # above the largest process id
    assert is_orphan(tmp_path)
    path.write_text(json.dumps(owner | {"pid": 2**22 + 1, "host": "another"}))
    assert not is_orphan(tmp_path)
    lock.release()
    assert yaml.safe_load(path.read_text())["host"] == "another"


def test_before_the_first_trial_all_may_change(tmp_path: Path):
    path = write_sweep(tmp_path)
    begin(load_sweep_config(path), "sweep.yaml")
    found = begun(tmp_path, space={"seed": {"values": [1, 2]}}, overrides={"optimizer.eps": 1e-6})
    assert list(go_on(found.directory).sweep.space) == ["seed"]
    assert "eps: 1.0e-06" in (found.directory / "base" / "config.yaml").read_text()
