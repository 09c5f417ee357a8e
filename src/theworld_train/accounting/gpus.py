"""GPUs as plans see them: memory, peaks, bandwidths, and the shares of the peaks that a step reaches, all from data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, NamedTuple

from theworld_train.accounting.resources import table
from theworld_train.config.errors import ConfigError, Problem, did_you_mean


class Range(NamedTuple):
    """A quantity with its uncertainty: of a share of a peak, or of a time."""

    worst: float
    expected: float
    best: float

    def times(self, factor: float) -> Range:
        """Returns the range, scaled."""
        return Range(*(value * factor for value in self))


@dataclass(frozen=True)
class GpuSpec:
    """A GPU.

    Attributes:
        name: Its name on the command line.
        title: Its name in tables.
        architecture: Its generation, which efficiencies depend on.
        memory_gb: Marketed memory in 10^9 bytes.
        usable_gib: What PyTorch reports as its capacity, in 2^30 bytes.
        tflops: Peak of dense matrix products by precision in 10^12 FLOP/s; without one that it lacks.
        memory_gb_per_s: Bandwidth of its memory in 10^9 bytes/s.
        link: What joins the GPUs of a node.
        link_gb_per_s: The link's bandwidth of one GPU in one direction, in 10^9 bytes/s.
        gpus_per_node: GPUs of a common node.
        network_gb_per_s: Such a node's network in one direction, in 10^9 bytes/s.
        source: Where the figures are published.
        devices: What CUDA calls it.
        aliases: Other names that are understood.
    """

    name: str
    title: str
    architecture: str
    memory_gb: float
    usable_gib: float
    tflops: Mapping[str, float]
    memory_gb_per_s: float
    link: str
    link_gb_per_s: float
    gpus_per_node: int
    network_gb_per_s: float
    source: str
    devices: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def peak_flops(self, precision: str) -> float:
        """Returns the peak of dense matrix products in FLOP/s."""
        return self.tflops[precision] * 1e12


@dataclass(frozen=True)
class Efficiencies:
    """Shares of a GPU's peaks that a step reaches, and the costs that no peak tells.

    Attributes:
        matmul: Of the arithmetic peak, in matrix products.
        convolution: In convolutions.
        sdpa: In fused attention over all pairs with a mask.
        structured: In attention over the blocks that a mask allows.
        eager: In attention through matrices of scores.
        memory: Of the memory's bandwidth.
        links: Of the bandwidth between GPUs.
        overlap: Share of the communication beside the computation that hides behind it.
        launch_us: Microseconds that the host takes to launch a kernel.
        latency_us: Microseconds of a collective for each doubling of the ranks.
    """

    matmul: Range
    convolution: Range
    sdpa: Range
    structured: Range
    eager: Range
    memory: Range
    links: Range
    overlap: Range
    launch_us: Range
    latency_us: Range

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Efficiencies:
        """Builds them from lists of worst, expected and best, as `to_json` writes them."""
        return cls(**{field.name: Range(*values[field.name]) for field in fields(cls)})

    def to_json(self) -> dict[str, list[float]]:
        """Returns them as lists of worst, expected and best."""
        return {name: list(value) for name, value in asdict(self).items()}


@cache
def gpu_specs() -> tuple[GpuSpec, ...]:
    """Returns the known GPUs, by memory."""
    return tuple(
        GpuSpec(**{**entry, **{key: tuple(entry.get(key, ())) for key in ("devices", "aliases")}})
        for entry in table("gpus")["gpus"]
    )


def gpu_spec(name: str, source: str | None = None, key: str | None = None) -> GpuSpec:
    """Returns the GPU of a name such as `h100-80gb`; case and spaces do not count.

    Args:
        name: The name or an alias of it.
        source: Where the name was given, for the error.
        key: The option or key that gave it.

    Raises:
        ConfigError: If no GPU has this name; names the nearest.
    """
    by_name = {alias: spec for spec in gpu_specs() for alias in (spec.name, *spec.aliases)}
    folded = name.strip().lower().replace(" ", "-").replace("_", "-")
    if folded in by_name:
        return by_name[folded]
    hint = did_you_mean(folded, tuple(by_name)) or "known: " + ", ".join(spec.name for spec in gpu_specs())
    raise ConfigError(Problem("no GPU of this name is known", source, key, name, hint))


def gpu_of_device(device: str) -> GpuSpec | None:
    """Returns the GPU that CUDA calls by a name such as `NVIDIA H100 80GB HBM3`; None if it is not known."""
    return next((spec for spec in gpu_specs() if device in spec.devices), None)


def efficiencies(gpu: GpuSpec) -> Efficiencies:
    """Returns the efficiencies that hold for a GPU until a run of one's own has been measured."""
    known = table("gpus")["efficiencies"]
    return Efficiencies.from_json({**known["default"], **known.get(gpu.architecture, {})})
