"""A run that was measured, held against its plan; and the efficiencies that follow from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theworld_train.accounting.flops import StepWork
from theworld_train.accounting.gpus import Efficiencies, GpuSpec, efficiencies, gpu_of_device
from theworld_train.accounting.step_time import calibrate
from theworld_train.assemble.run import CONFIG_FILE, METRICS_FILE
from theworld_train.config import load_run_config
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.memory.timeline import Peak
from theworld_train.plan.advice import Planner
from theworld_train.plan.dry_run import DeviceKind
from theworld_train.plan.strategies import strategy_of
from theworld_train.plan.timing import plan_time, planned_work
from theworld_train.train.metrics import WARM_UP_STEPS, Forecast, Resources, read_metrics


def predict(config: RunConfig, taken: Resources) -> Forecast:
    """Plans a run as it has been: its ranks, its device and its longest samples.

    Args:
        config: The run config.
        taken: What the run has taken.
    """
    planner = Planner(config, taken.positions, taken.supervised, "cpu" if taken.device == "cpu" else "cuda")
    setting = planner.setting(strategy_of(config.runtime.strategy), taken.ranks, config.runtime.offload)
    peak = planner.need(setting).peak.total
    gpu = gpu_of_device(taken.device)
    if gpu is None or config.runtime.offload != "none":  # what moves to the host is not timed
        return Forecast(peak, None)
    return Forecast(peak, plan_time(config, planner.run(setting), setting, gpu).step.seconds)


def predict_step(config: RunConfig, positions: int, supervised: int, device: DeviceKind) -> tuple[Peak, StepWork]:
    """Plans a step of a single process: the moment of most memory, and what is computed.

    Args:
        config: The run config.
        positions: Tokens of a sample.
        supervised: Supervised tokens of a sample.
        device: Whose memory is planned.
    """
    planner = Planner(config, positions, supervised, device)
    setting = planner.setting("ddp", ranks=1)
    run = planner.run(setting)
    return planner.timeline(setting).peak(run.steps - 1), planned_work(config, run, setting)


@dataclass(frozen=True)
class MeasuredRun:
    """What a finished run has written of its resources.

    Attributes:
        config: Its config.
        steps: Seconds of its steps on these ranks and this device, warm-up and waiting for data left out.
        taken: What its last process has taken.
    """

    config: RunConfig
    steps: tuple[float, ...]
    taken: Resources


def read_run(directory: Path) -> MeasuredRun:
    """Reads a run directory.

    Raises:
        ConfigError: If it is none, or the run has not come to its end, or has no step after the warm-up.
    """
    metrics = directory / METRICS_FILE
    found = read_metrics(metrics, "resources") if metrics.is_file() else []
    if not found:
        raise ConfigError(Problem("holds no finished run", key="--calibrate", value=str(directory)))
    last = found[-1]
    taken = Resources(
        peak_bytes=last["memory/peak_bytes"],
        step_s=last.get("time/step_s"),
        **{name: last[name] for name in ("ranks", "device", "positions", "supervised")},
    )
    config = load_run_config(directory / CONFIG_FILE)
    if config.runtime.offload != "none":
        raise ConfigError(Problem("offloads, and what moves to the host is not timed", key="--calibrate"))
    steps = tuple(_settled(read_metrics(metrics, "start", "train"), taken))
    if not steps:
        message = f"has no step after the first {WARM_UP_STEPS}, which only warm up"
        raise ConfigError(Problem(message, key="--calibrate", value=str(directory)))
    return MeasuredRun(config, steps, taken)


def _settled(rows: Sequence[dict[str, Any]], taken: Resources) -> Iterator[float]:
    """Returns the seconds of steps on the same ranks and device, without those that every start warms up with."""
    done, counts = 0, False
    for row in rows:
        if row["event"] == "start":
            done, counts = 0, (row["ranks"], row["device"]) == (taken.ranks, taken.device)
            continue
        done += 1
        if counts and done > WARM_UP_STEPS:
            yield row["time/step_s"] - row["time/data_wait_s"]


@dataclass(frozen=True)
class Calibration:
    """A measured run beside its plan.

    Attributes:
        run: The run.
        planned_seconds: A step, as expected before.
        planned_peak: Most bytes of a rank, as planned.
        shares: Efficiencies under which the plan expects what was measured.
    """

    run: MeasuredRun
    planned_seconds: float
    planned_peak: int
    shares: Efficiencies


def calibrate_by(run: MeasuredRun, gpu: GpuSpec) -> Calibration:
    """Plans a run that was measured, and returns both.

    Args:
        run: The run.
        gpu: What it ran on.

    Raises:
        ConfigError: If it ran on something else, or what was measured cannot be on this GPU.
    """
    known = gpu_of_device(run.taken.device)
    if run.taken.device == "cpu" or (known is not None and known != gpu):
        message = f"was measured on {run.taken.device}, which says nothing of a plan for {gpu.title}"
        hint = None if known is None else f"plan for --gpu {known.name}"
        raise ConfigError(Problem(message, key="--calibrate", hint=hint))
    planner = Planner(run.config, run.taken.positions, run.taken.supervised)
    setting = planner.setting(strategy_of(run.config.runtime.strategy), run.taken.ranks, run.config.runtime.offload)
    shares = efficiencies(gpu)
    predicted = plan_time(run.config, planner.run(setting), setting, gpu, shares).step
    return Calibration(
        run=run,
        planned_seconds=predicted.seconds.expected,
        planned_peak=planner.need(setting).peak.total,
        shares=calibrate(shares, predicted, run.steps),
    )
