"""What a run is and what it has been started with, written down once: `run.json`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from theworld_train.accounting.ledger import ParameterLedger
from theworld_train.config.schema import RunConfig
from theworld_train.train.metrics import Forecast
from theworld_train.train.runtime import Runtime

RECORD_FILE = "run.json"
FORMAT = 1
#: Packages whose versions a result may depend on, as far as they are installed.
PACKAGES = (
    "theworld-train",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "diffusers",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "numpy",
    "pillow",
)
GIT_TIMEOUT_S = 10


@dataclass(frozen=True)
class RunDescription:
    """A run and its launches; decision 15 has the file's format.

    Attributes:
        id: Names the run in trackers; a resumed run keeps it.
        config: The run config of the last launch.
        ledger: Its parameters.
        trackers: By which ids the trackers know the run.
        launches: Step, time, git state, versions and hardware of each launch, the last one of which is this.
    """

    id: str
    config: RunConfig
    ledger: ParameterLedger
    trackers: Mapping[str, str]
    launches: tuple[dict[str, Any], ...]

    def settings(self) -> dict[str, Any]:
        """Returns what trackers record: plain values by dotted key; lists as JSON, what is null left out."""
        ledger = {row.component: {"total": row.total, "trainable": row.trainable} for row in self.ledger.rows}
        launch = {key: value for key, value in self.launches[-1].items() if key not in ("step", "started")}
        counts = {"total": self.ledger.total, "trainable": self.ledger.trainable, **ledger}
        return _flat({"id": self.id, "config": self.config.model_dump(mode="json"), "ledger": counts, **launch})

    def write(self, forecast: Forecast | None = None) -> None:
        """Replaces the file as a whole.

        Args:
            forecast: What a plan says of the run, once it is known.
        """
        plan = None
        if forecast is not None:
            step = None if forecast.step_s is None else forecast.step_s._asdict()
            plan = {"peak_bytes": forecast.peak_bytes, "step_s": step}
        record = {
            "format": FORMAT,
            "id": self.id,
            "name": self.config.name,
            "config": self.config.model_dump(mode="json"),
            "ledger": self.ledger.to_dict(),
            "plan": plan,
            "trackers": dict(self.trackers),
            "launches": list(self.launches),
        }
        path = Path(self.config.output_dir) / RECORD_FILE
        partial = path.with_name(f".{RECORD_FILE}.partial")
        partial.write_text(json.dumps(record, indent=1))
        partial.replace(path)


def new_launch(config: RunConfig, ledger: ParameterLedger, runtime: Runtime, step: int) -> RunDescription:
    """Describes a launch, of a new run or of one that goes on.

    Args:
        config: The run config.
        ledger: Its parameters.
        runtime: The process group.
        step: Optimizer steps done.
    """
    before: dict[str, Any] = {}
    if step or config.resume is not None:  # a launch that died before its first checkpoint is of the same run
        with suppress(OSError, ValueError):
            before = json.loads((Path(config.output_dir) / RECORD_FILE).read_text())
    launch = {
        "step": step,
        "started": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        # The main rank alone writes it down.
        "git": git_state(Path.cwd()) if runtime.is_main else None,
        "versions": _versions(),
        "hardware": _hardware(runtime),
    }
    launches = (*before.get("launches", ()), launch)
    return RunDescription(before.get("id") or uuid4().hex[:8], config, ledger, before.get("trackers", {}), launches)


def git_state(directory: Path) -> dict[str, Any] | None:
    """Returns commit and branch of a directory's repository and whether tracked files differ; None if there is none."""

    def ask(*arguments: str) -> str:
        # Nothing is written into the repository, and nobody is asked for anything.
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
        command = ["git", "-C", str(directory), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_S, env=environment
        )
        return done.stdout.strip()

    try:
        commit = ask("rev-parse", "--verify", "HEAD")
        branch = ask("rev-parse", "--abbrev-ref", "HEAD")
        dirty = bool(ask("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "branch": None if branch == "HEAD" else branch, "dirty": dirty}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _hardware(runtime: Runtime) -> dict[str, Any]:
    device, local = runtime.device, int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or runtime.world_size
    on_gpu = device.type == "cuda"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": runtime.device_name,
        "ranks": runtime.world_size,
        "nodes": max(1, runtime.world_size // local),
        "cpus": os.cpu_count(),
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else memory,
        "cuda": torch.version.cuda if on_gpu else None,
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            found[name] = json.dumps(value)
        elif value is not None:
            found[name] = value
    return found
