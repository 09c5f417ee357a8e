"""One writer for each run directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from theworld_train.config.errors import ConfigError
from theworld_train.train.run_lock import LOCK_FILE, run_lock

HOLD = """
import sys
from pathlib import Path
from theworld_train.train.run_lock import run_lock
with run_lock(Path(sys.argv[1]), "first"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_is_refused_until_the_first_is_dead(tmp_path: Path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        expected = rf"run first, process {holder.pid} on {os.uname().nodename}"
        with pytest.raises(ConfigError, match=expected), run_lock(tmp_path, "second"):
            pass
        assert json.loads((tmp_path / LOCK_FILE).read_text())["run"] == "first", "its note stays"
        holder.kill()
        holder.wait()
    with run_lock(tmp_path, "second"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["run"] == "second"


def test_note_of_another_time_locks_nothing(tmp_path: Path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "elsewhere", "pid": os.getpid(), "run": "old"}))
    with run_lock(tmp_path, "new"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["run"] == "new"
