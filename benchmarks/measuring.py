"""What the benchmarks share: time, the process's own memory, and the record of a run with its hardware and versions."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
#: glibc keeps freed blocks of up to 32 MiB in a heap that fragments; with this it returns them.
RETURNING_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072"}
_LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "deepspeed")


def device() -> torch.device:
    """Returns what is measured: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fastest(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the fastest of some runs of each function in seconds; they take turns, so that noise falls on all."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            _synchronise()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - started)
    return {name: min(values) for name, values in times.items()}


def memory_peak(function: Callable[[], object]) -> int:
    """Returns the bytes by which a call raises memory at most: tensors on a GPU, the process's own on a CPU."""
    gc.collect()
    if torch.cuda.is_available():
        _synchronise()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        _synchronise()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def hardware() -> dict[str, Any]:
    """Returns what the numbers are measured on."""
    names = [row.split(":")[1].strip() for row in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in row]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def write_record(name: str, command: str, **measured: Any) -> Path:
    """Writes what was measured to `results/NAME-DEVICE.json`, with hardware and versions."""
    found = hardware()
    record = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": found,
        "versions": {library: version(library) for library in _LIBRARIES} | {"python": platform.python_version()},
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{found['device'].lower().replace(' ', '-')}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Renders rows as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
