"""What a machine has, as plain values that checks are made on."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees.

    Attributes:
        name: Its name.
        memory: Its memory in bytes.
        free: How much of it is free now.
        bf16: Whether it computes in bf16.
    """

    name: str
    memory: int
    free: int
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """What checks look at.

    Attributes:
        gpus: The GPUs that torch sees.
        driver: Version of the NVIDIA driver, if one is loaded.
        torch_cuda: CUDA version that torch was built for; None for a build for CPU only.
        torch_error: Why torch cannot be imported, if it cannot.
        cores: CPU cores that this process may use.
        memory: Host memory in bytes.
        environment: The environment's variables.
    """

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    torch_cuda: str | None = None
    torch_error: str | None = None
    cores: int = 1
    memory: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Processes that a run on all of this machine has."""
        return max(len(self.gpus), 1)


def look() -> Machine:
    """Returns this machine."""
    torch_cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    error: str | None = None
    try:
        torch_cuda, gpus = _look_through_torch()
    except Exception as cause:  # a broken installation fails in its own way, and is what this command is for
        error = f"{type(cause).__name__}: {cause}"
    return Machine(
        gpus=gpus,
        driver=_driver(),
        torch_cuda=torch_cuda,
        torch_error=error,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        environment=dict(os.environ),
    )


def _look_through_torch() -> tuple[str | None, tuple[Gpu, ...]]:
    import torch

    found: list[Gpu] = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, memory = torch.cuda.mem_get_info(number)
        found.append(Gpu(properties.name, memory, free, properties.major >= 8))  # Ampere and later
    return torch.version.cuda, tuple(found)


def _driver() -> str | None:
    try:
        match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", _DRIVER.read_text())
    except OSError:
        return None
    return match[1] if match else None


def installed(package: str) -> str | None:
    """Returns the version of a package that is installed, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def free_space(path: Path) -> tuple[int, Path]:
    """Returns the free bytes where a path is, or will be, and the nearest directory above it that exists."""
    place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(place).free, place
