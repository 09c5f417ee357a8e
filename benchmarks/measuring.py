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

from theworld_train.model import TheWorldForConditionalGeneration
from theworld_train.model.build import build_on_meta
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.plan.dry_run import materialise

RESULTS = Path(__file__).with_name("results")
#: glibc keeps freed blocks of up to 32 MiB in a heap that fragments, which put a process of 100M parameters 30% above
#: what lived in it; with this it returns them.
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
    before = reset_high_water()
    function()
    return high_water() - before


def memory_held() -> int:
    """Returns the bytes that are held now: tensors on a GPU, the process's own on a CPU."""
    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def reset_high_water() -> int:
    """Begins the process's high-water mark anew, and returns the bytes that it holds now."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def high_water() -> int:
    """Returns the most bytes that the process has held since then."""
    return _status("VmHWM")


def random_model(architecture: TheWorldConfig, dtype: torch.dtype) -> TheWorldForConditionalGeneration:
    """Returns a model of random weights, the same ones every time."""
    torch.manual_seed(0)
    model = build_on_meta(architecture)
    with device():
        materialise(model, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


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
    record = {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "versions": _versions(),
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    path = _path_of(name)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def update_record(name: str, command: str, parts: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes parts of a record, and keeps others of the same hardware and versions; each has its command and date."""
    stamp = {"command": command, "date": time.strftime("%Y-%m-%d")}
    record = {"hardware": hardware(), "versions": _versions()}
    path = _path_of(name)
    earlier = json.loads(path.read_text()) if path.exists() else {}
    kept = earlier["parts"] if record.items() <= earlier.items() else {}
    record["parts"] = kept | {part: stamp | measured for part, measured in parts.items()}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _versions() -> dict[str, str]:
    return {library: version(library) for library in _LIBRARIES} | {"python": platform.python_version()}


def _path_of(name: str) -> Path:
    return RESULTS / f"{name}-{hardware()['device'].lower().replace(' ', '-')}.json"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Renders rows as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
