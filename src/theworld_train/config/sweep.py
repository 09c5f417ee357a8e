"""The settings of a sweep: which keys are varied, how points are chosen, and where trials run."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from theworld_train.config.section import (
    Name,
    NonNegativeInt,
    Path,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
)

Search = Literal["grid", "random", "tpe"]
Pruner = Literal["none", "median", "hyperband"]
Direction = Literal["minimize", "maximize"]
#: Most values that a range of a grid may have.
MOST_GRID_VALUES = 1000


class Dimension(Section):
    """What one key is varied over: a list of values, or a range."""

    values: Annotated[tuple[object, ...], Field(min_length=1)] | None = None
    """Values to choose from; of any kind that the key takes."""
    min: float | None = None
    """Lowest value of a range."""
    max: float | None = None
    """Highest value of a range."""
    log: bool = False
    """Draw from the range by its logarithm, as rates are."""
    step: PositiveFloat | None = None
    """Distance of the range's values, counted from `min`; a grid needs it."""

    @model_validator(mode="after")
    def _check_dimension(self) -> Dimension:
        if self.values is not None:
            if self.min is not None or self.max is not None or self.log or self.step is not None:
                raise ValueError("values are a list already: min, max, log and step describe a range")
            if any(value in self.values[:index] for index, value in enumerate(self.values)):
                raise ValueError("one of the values is stated twice")
            return self
        if self.min is None or self.max is None:
            raise ValueError("expected values: [...], or min and max")
        if not (math.isfinite(self.min) and math.isfinite(self.max)):
            raise ValueError("min and max must be finite")
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        if self.log and self.min <= 0:
            raise ValueError(f"log needs min > 0, got {self.min:g}")
        if self.log and self.step is not None:
            raise ValueError("a range has a step or is drawn by its logarithm, not both")
        return self


class SweepWorkers(Section):
    """How many trials run side by side on a machine, and on what."""

    count: PositiveInt = 1
    """Trials that run at the same time."""
    gpus: tuple[Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)], ...] | None = None
    """GPUs of each worker by number, of those that this process sees, such as [[0, 1], [2, 3]]: a trial sees no others,
    and has a process on each of them. Absent: all trials see all GPUs."""
    processes: PositiveInt = 1
    """Processes of each trial where `gpus` is absent."""

    @model_validator(mode="after")
    def _check_gpus(self) -> SweepWorkers:
        if self.gpus is None:
            return self
        if len(self.gpus) != self.count:
            raise ValueError(f"gpus names a set for each worker: {self.count} workers, but {len(self.gpus)} sets")
        if self.processes != 1:
            raise ValueError("gpus says how many processes a trial has: one for each GPU; leave processes out")
        numbers = [number for group in self.gpus for number in group]
        if len(set(numbers)) < len(numbers):
            raise ValueError("gpus gives one GPU to several workers")
        return self


class SweepConfig(Section):
    """Trials of one stage or pipeline that differ in some keys, and what is to be learnt from them."""

    name: Name
    """Name of the sweep, and of its study in the storage."""
    output_dir: Path
    """Directory of the sweep, where all its workers see it."""
    config: Path | None = None
    """Run config that is varied, relative to this file; exactly one of `config` and `pipeline` is set."""
    pipeline: Path | None = None
    """Pipeline that is varied, relative to this file."""
    overrides: dict[str, object] = {}  # noqa: RUF012 (pydantic copies defaults)
    """Dotted keys and values that hold for all trials; of a pipeline's stage as `stages.NAME.KEY`."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Dotted keys that are varied, and what over; of a pipeline's stage as `stages.NAME.KEY`."""
    search: Search
    """`grid`: all combinations; `random`: drawn independently; `tpe`: drawn where earlier trials were good."""
    seed: Seed = 0
    """Seed of the search; trials have the `seed` of their config."""
    trials: PositiveInt | None = None
    """Number of trials; a grid may leave it out and then has one for each point."""
    startup_trials: PositiveInt = 5
    """Trials that TPE draws at random before it begins, and that the median pruner waits for."""
    metric: Annotated[str, Field(min_length=1)]
    """Metric of `metrics.jsonl` whose last value counts, such as eval/loss."""
    stage: Name | None = None
    """Stage of the pipeline that the metric is read from; the last one if absent."""
    direction: Direction
    """What is better: a smaller value, or a larger one."""
    pruner: Pruner = "none"
    """What stops bad trials early, by values that the metric has on the way: `median`, if the best of them is worse
    than the median of the others' at that step; `hyperband`: rounds, each of which the better third survives."""
    warmup_steps: NonNegativeInt = 0
    """Steps of a trial before which the median pruner leaves it alone."""
    storage: Annotated[str, Field(min_length=1)] = "sqlite"
    """Where the study is kept: `sqlite` or `journal`, in a file of `output_dir`; a URL of a database; or `env:NAME`,
    for a URL that holds a password and stands in the environment. `journal` is for file systems shared by machines."""
    workers: SweepWorkers = SweepWorkers()
    """What runs side by side."""
    launcher: tuple[str, ...] = ()
    """Argument list put before each trial's training command instead of our own launcher, as of a pipeline, such as
    [torchrun, --nproc-per-node, "8"]; one that names `theworld-train` ends with the command that takes the config. A
    sweep of a pipeline has none: its stages are launched by the pipeline."""
    timeout_s: PositiveInt | None = None
    """Seconds after which a launch of a trial is ended, as a result of the trial; no limit if absent."""
    gpu: str | None = None
    """Kind of GPU, such as h100-80gb: trials that the plan says cannot fit it are recorded and never launched."""
    memory_gib: PositiveFloat | None = None
    """Memory of each GPU in GiB, instead of `gpu`."""

    @model_validator(mode="after")
    def _check_target(self) -> SweepConfig:
        if (self.config is None) == (self.pipeline is None):
            raise ValueError("exactly one of config and pipeline must be set")
        if self.pipeline is None and self.stage is not None:
            raise ValueError("stage names a stage of a pipeline; config has none")
        if self.pipeline is not None and self.launcher:
            raise ValueError("launcher is for a run config: a pipeline launches its stages itself")
        if self.gpu is not None and self.memory_gib is not None:
            raise ValueError("gpu says how much memory there is: set gpu or memory_gib")
        return self

    @model_validator(mode="after")
    def _check_search(self) -> SweepConfig:
        if self.search != "grid" and self.trials is None:
            raise ValueError(f"search: {self.search} needs trials, their number")
        if self.pruner != "median" and self.warmup_steps:
            raise ValueError("warmup_steps is for pruner: median")
        twice = [key for key in self.space if key in self.overrides]
        if twice:
            raise ValueError(f"{', '.join(twice)} is varied in space and held by overrides")
        if self.search != "grid":
            return self
        for key, dimension in self.space.items():
            if dimension.values is None and dimension.step is None and dimension.min != dimension.max:
                raise ValueError(f"a grid needs values, or a step: {key} has neither")
        return self

    @property
    def kind(self) -> Literal["run", "pipeline"]:
        """What is varied."""
        return "run" if self.config is not None else "pipeline"
