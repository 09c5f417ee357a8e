"""A disk that is full at any point of a save: the error says where and how full, and what was there stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.faults.conftest import Save
from theworld_train.checkpoint_files import checkpoints, verify_checkpoint
from theworld_train.config.errors import ConfigError

#: Free space at which a save is tried: so many points from nothing to just too little.
POINTS = 40


@pytest.fixture
def disk(tmp_path: Path) -> Generator[Path]:
    """A small file system of its own."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root and the right to mount")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_disk_that_fills_up_costs_only_the_checkpoint_that_did_not_fit(disk: Path, save: Save):
    before = shutil.disk_usage(disk).free
    first = save(disk / "run", 2, side=64)
    size = before - shutil.disk_usage(disk).free
    page = os.sysconf("SC_PAGE_SIZE")
    refused = 0
    for room in range(0, size - page, max(page, (size - page) // POINTS // page * page)):
        with (disk / "filler").open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, shutil.disk_usage(disk).free - room)
        with pytest.raises(ConfigError) as caught:
            save(disk / "run", 4, side=64)
        assert str(disk / "run") in str(caught.value)
        assert f"; {room:,} bytes are free" in str(caught.value)
        refused += "more than are free" in str(caught.value)
        assert checkpoints(disk / "run") == [first]
        assert [path.name for path in (disk / "run").iterdir()] == ["step-2"]
        verify_checkpoint(first)
        (disk / "filler").unlink()
    assert 0 < refused < POINTS / 2, "most of them have begun to write"
    verify_checkpoint(save(disk / "run", 4, side=64))
