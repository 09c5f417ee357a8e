"""How long a step and a run take: every operation bound by arithmetic or memory, and communication that shows."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from theworld_train.accounting.collectives import Cluster, Collective
from theworld_train.accounting.flops import Operation, StepWork
from theworld_train.accounting.gpus import Efficiencies, GpuSpec, Range
from theworld_train.config.errors import ConfigError, Problem

#: Least uncertainty of a calibrated time, in both directions: two runs of the same step differ by as much.
_LEAST_SPREAD = 0.03

#: Place of the expected value in a range.
_EXPECTED = Range._fields.index("expected")


@dataclass(frozen=True)
class StepTime:
    """The time of an optimizer step; `worst` is the longest.

    Attributes:
        seconds: The step.
        computation: What the GPU computes, as expected, by kind of work.
        phases: The same by pass.
        communication: Exchange between ranks, as expected, on its own.
        exposed: What of it does not hide behind computation.
        launching: What the host needs to launch the step's kernels; the step takes that long at least.
        tokens_per_second: Positions of all ranks.
        mfu: Share of the GPUs' peak that useful work makes up.
    """

    seconds: Range
    computation: dict[str, float]
    phases: dict[str, float]
    communication: float
    exposed: float
    launching: float
    tokens_per_second: Range
    mfu: Range


@dataclass(frozen=True)
class RunTime:
    """The time of a whole run, in seconds and in hours of one GPU; `worst` is the longest."""

    steps: int
    seconds: Range
    gpu_hours: Range


def step_time(
    work: StepWork,
    gpu: GpuSpec,
    efficiencies: Efficiencies,
    *,
    ranks: int = 1,
    exchanges: Sequence[Collective] = (),
    gpus_per_node: int | None = None,
    network_gb_per_s: float | None = None,
    precision: str = "bf16",
) -> StepTime:
    """Returns the time of an optimizer step, all ranks with equal work.

    Args:
        work: What one rank computes.
        gpu: What it computes on.
        efficiencies: Shares of the GPU's peaks.
        ranks: GPUs in all.
        exchanges: What a step exchanges.
        gpus_per_node: GPUs of a node; the GPU's usual number if absent.
        network_gb_per_s: A node's network in 10^9 bytes/s; the usual one if absent.
        precision: Whose peak the share of useful work refers to.
    """
    totals, parts = [], []
    for case in range(len(Range._fields)):
        computation = sum(_seconds(operation, gpu, efficiencies, case) for operation in work.operations)
        cluster = Cluster(
            ranks,
            gpus_per_node or gpu.gpus_per_node,
            gpu.link_gb_per_s * 1e9 * efficiencies.links[case],
            (network_gb_per_s or gpu.network_gb_per_s) * 1e9 * efficiencies.links[case],
            efficiencies.latency_us[case] * 1e-6,
        )
        beside = sum(cluster.seconds(exchange) for exchange in exchanges if exchange.overlaps)
        after = sum(cluster.seconds(exchange) for exchange in exchanges if not exchange.overlaps)
        # What hides is bounded by what there is to hide behind.
        exposed = beside - min(beside * efficiencies.overlap[case], computation) + after
        launching = sum(operation.kernels for operation in work.operations) * efficiencies.launch_us[case] * 1e-6
        totals.append(max(computation, launching) + exposed)
        parts.append((beside + after, exposed, launching))
    seconds = Range(*totals)
    communication, exposed, launching = parts[_EXPECTED]
    peak = gpu.peak_flops(precision)
    return StepTime(
        seconds=seconds,
        computation=_sums(work.operations, gpu, efficiencies, "kind"),
        phases=_sums(work.operations, gpu, efficiencies, "phase"),
        communication=communication,
        exposed=exposed,
        launching=launching,
        tokens_per_second=Range(*(work.tokens * ranks / value for value in seconds)),
        mfu=Range(*(work.useful_flops / value / peak for value in seconds)),
    )


def run_time(step: StepTime, steps: int, ranks: int) -> RunTime:
    """Returns the time of a run of so many steps on so many GPUs; evaluation and saving are not in it."""
    seconds = step.seconds.times(steps)
    return RunTime(steps, seconds, seconds.times(ranks / 3600))


def calibrate(
    current: Efficiencies, predicted: StepTime, measured: Sequence[float], mfu_limit: float = 1.0
) -> Efficiencies:
    """Returns efficiencies under which the model predicts what was measured.

    One time of a step tells one factor, so all shares change by the same: the prediction becomes the median of the
    measured steps, and its range that of nine steps in ten.

    Args:
        current: What `predicted` was made with.
        predicted: The plan of the very run that was measured.
        measured: Seconds of its steps, warm-up left out.
        mfu_limit: Share of the peak above which the measurement cannot belong to this GPU and plan.

    Raises:
        ConfigError: If there is no measurement, or one that cannot be.
    """
    if not measured or not all(math.isfinite(value) and value > 0 for value in measured):
        raise ConfigError(Problem("calibration needs step times in seconds, all above zero", value=list(measured)))
    middle = statistics.median(measured)
    useful = predicted.mfu.expected * predicted.seconds.expected / middle
    if useful > mfu_limit:
        raise ConfigError(
            Problem(
                f"a step of this time would reach {useful:.0%} of the GPU's peak: it was measured on another GPU, "
                "or on another config than the plan's",
                value=middle,
                hint="plan the run that was measured, on the GPU that it ran on",
            )
        )
    # Of many steps a few have waited for something else.
    fast, *_, slow = statistics.quantiles([*measured, middle], n=20, method="inclusive")
    slowest, fastest = max(slow, middle * (1 + _LEAST_SPREAD)), min(fast, middle * (1 - _LEAST_SPREAD))
    factors = [value / predicted.seconds.expected for value in (slowest, middle, fastest)]
    slower = {"launch_us", "latency_us"}
    changed = {"overlap": Range(*(current.overlap.expected,) * 3)}
    for name, (_, expected, _) in current.to_json().items():
        if name != "overlap":
            changed[name] = Range(*(expected * factor if name in slower else expected / factor for factor in factors))
    return Efficiencies(**changed)


def _seconds(operation: Operation, gpu: GpuSpec, efficiencies: Efficiencies, case: int) -> float:
    """Returns an operation's time, by arithmetic or by memory, whichever takes longer."""
    moving = operation.bytes / (gpu.memory_gb_per_s * 1e9 * efficiencies.memory[case])
    if operation.kind == "elementwise":
        return moving
    share: Range = getattr(efficiencies, operation.kind)
    return max(moving, operation.flops / (gpu.peak_flops(operation.precision) * share[case]))


def _sums(operations: Sequence[Operation], gpu: GpuSpec, efficiencies: Efficiencies, field: str) -> dict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for operation in operations:
        sums[str(getattr(operation, field))] += _seconds(operation, gpu, efficiencies, _EXPECTED)
    return dict(sums)
