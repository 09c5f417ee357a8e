"""A run that was measured, held against its plan; and the efficiencies that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from theworld_train.accounting.gpus import Efficiencies, GpuSpec, efficiencies
from theworld_train.accounting.step_time import calibrate
from theworld_train.assemble.run import CONFIG_FILE, METRICS_FILE
from theworld_train.config import load_run_config
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.plan.advice import Planner
from theworld_train.plan.timing import plan_time
from theworld_train.train.metrics import read_metrics


@dataclass(frozen=True)
class MeasuredRun:
    """What a finished run has written of its resources.

    Attributes:
        config: Its config.
        steps: Seconds of its steps, the first one left out.
        peak: Most bytes that a rank has held.
        ranks: Number of ranks.
        device: What they computed on.
    """

    config: RunConfig
    steps: tuple[float, ...]
    peak: int
    ranks: int
    device: str


def read_run(directory: Path) -> MeasuredRun:
    """Reads a run directory.

    Raises:
        ConfigError: If it is none, or the run has not come to its end.
    """
    metrics = directory / METRICS_FILE
    found = read_metrics(metrics, "resources") if metrics.is_file() else []
    if not found:
        raise ConfigError(
            Problem("holds no finished run of two steps or more", key="--calibrate", value=str(directory))
        )
    steps = tuple(row["time/step_s"] for row in read_metrics(metrics, "train")[1:])
    last = found[-1]
    config = load_run_config(directory / CONFIG_FILE)
    if config.runtime.offload != "none":
        raise ConfigError(Problem("offloads, and what moves to the host is not timed", key="--calibrate"))
    return MeasuredRun(config, steps, last["memory/peak_bytes"], last["ranks"], last["device"])


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


def calibrate_by(
    run: MeasuredRun, gpu: GpuSpec, positions: int | None = None, supervised: int | None = None
) -> Calibration:
    """Plans a run that was measured, and returns both.

    Args:
        run: The run.
        gpu: What it ran on.
        positions: Tokens of its samples, where the config does not say.
        supervised: Supervised tokens of its samples.

    Raises:
        ConfigError: If what was measured cannot be on this GPU.
    """
    planner = Planner(run.config, positions, supervised)
    setting = planner.setting(run.config.runtime.strategy, run.ranks, run.config.runtime.offload)
    shares = efficiencies(gpu)
    predicted = plan_time(run.config, planner.run(setting), setting, gpu, shares).step
    return Calibration(
        run=run,
        planned_seconds=predicted.seconds.expected,
        planned_peak=planner.need(setting).peak.total,
        shares=calibrate(shares, predicted, run.steps),
    )
