"""Takes the first steps of a run, some plain, some under the profiler, and one with every storage followed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler

from theworld_train.accounting.ledger import ParameterLedger
from theworld_train.assemble.inputs import max_steps, open_inputs
from theworld_train.assemble.model import ledger_of
from theworld_train.assemble.steps import ReadySteps, prepare
from theworld_train.batch import Batch
from theworld_train.checkpoint_files import resolve_checkpoint
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.data import Window
from theworld_train.memory.following import PhasedEngine, following
from theworld_train.memory.timeline import CUDA_BLOCK, Timeline, spans
from theworld_train.memory.tracker import MemoryTracker, Phase
from theworld_train.profiling.attribution import StepBreakdown, break_down
from theworld_train.profiling.ranges import DATA, STEP, Ranges
from theworld_train.train.groups import optimizer_class
from theworld_train.train.ledger import check_expectation
from theworld_train.train.quarantine import Quarantine
from theworld_train.train.runtime import Runtime, take
from theworld_train.train.trainer import Trainer

#: How a step is taken: to warm up, against the clock alone, under the profiler, or with its storages followed.
How = Literal["warm-up", "timed", "traced", "followed"]


@dataclass(frozen=True)
class Schedule:
    """How many steps are taken in which way; the one whose storages are followed comes last.

    Attributes:
        warmup: Steps that warm up.
        steps: Steps against the clock alone, and as many under the profiler.
    """

    warmup: int
    steps: int

    @property
    def ways(self) -> tuple[How, ...]:
        """How each step is taken."""
        parts: dict[How, int] = {"warm-up": self.warmup, "timed": self.steps, "traced": self.steps, "followed": 1}
        return tuple(how for how, number in parts.items() for _ in range(number))


@dataclass(frozen=True)
class TakenStep:
    """One optimizer step.

    Attributes:
        how: How it was taken.
        loss: Mean cross entropy per supervised token, before the step.
        seconds: From the samples at hand to the update, on the device too.
        data_wait: Seconds before that in which samples were waited for.
        tokens: Tokens of its samples, padding not counted.
        padding: Positions that are padding.
        longest: Positions of its longest sample.
        supervised: Supervised tokens of a sample, in the micro-batch that has most.
        samples: Samples.
    """

    how: How
    loss: float
    seconds: float
    data_wait: float
    tokens: int
    padding: int
    longest: int
    supervised: int
    samples: int


@dataclass(frozen=True)
class Profile:
    """What the steps have shown.

    Attributes:
        config: The run config.
        schedule: How they were taken.
        ledger: The parameters of the model.
        device: What they ran on, such as `NVIDIA H100 80GB HBM3` or `cpu`.
        steps: The steps in their order.
        breakdown: Where the time of the traced ones went.
        memory: What the followed one held; its optimizer step counts as the trace's step 0.
        peak_bytes: Most bytes until the traced steps: tensors on a GPU; on a CPU, what the process has grown by.
    """

    config: RunConfig
    schedule: Schedule
    ledger: ParameterLedger
    device: str
    steps: tuple[TakenStep, ...]
    breakdown: StepBreakdown
    memory: Timeline
    peak_bytes: int

    def taken(self, how: How) -> tuple[TakenStep, ...]:
        """Returns the steps that were taken in one way."""
        return tuple(step for step in self.steps if step.how == how)

    @property
    def seconds(self) -> float:
        """Median seconds of a timed step."""
        return statistics.median(step.seconds for step in self.taken("timed"))


def take_profile(config: RunConfig, schedule: Schedule, traces: Path) -> Profile:
    """Takes the first steps of a run, on one process; the run's own directory is neither read nor written.

    They are the steps that `train` takes: same samples, same rates, same random numbers.

    Args:
        config: The run config.
        schedule: How many steps are taken in which way.
        traces: Directory for the trace, in TensorBoard's layout.

    Raises:
        ConfigError: If an input is wrong, or the run has fewer steps; before any model loads.
    """
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"trackers": ()})})
    if config.runtime.offload != "none":
        problem = Problem("needs several ranks, and a profile has one process", key="runtime.offload")
        raise ConfigError(problem)
    with Runtime(config) as runtime:
        inputs = open_inputs(config)
        check_expectation(ledger_of(config), config)
        optimizer_class(config.optimizer.name)
        needed, there = len(schedule.ways), max_steps(config, len(inputs.train))
        if there < needed:
            message = f"the run has {there} steps, and the profile takes {needed} of them"
            raise ConfigError(Problem(message, key="training.max_steps", hint="take fewer with --steps and --warmup"))
        checkpoint = resolve_checkpoint(Path(config.init_from)) if config.init_from else None
        ready = prepare(config, inputs, checkpoint, runtime)
        return _Steps(config, schedule, ready, runtime).take(traces)


class _Steps:
    """The steps as they are taken."""

    def __init__(self, config: RunConfig, schedule: Schedule, ready: ReadySteps, runtime: Runtime) -> None:
        """Args: config: of the run. schedule: of the steps. ready: what takes them. runtime: this process."""
        self._config, self._schedule, self._ready, self._runtime = config, schedule, ready, runtime
        self._enter: Callable[[Phase], None] | None = None
        self._taken: list[TakenStep] = []
        self._trainer = Trainer(
            config=config,
            ledger=ready.ledger,
            runtime=runtime,
            stage=ready.stage,
            engine=PhasedEngine(ready.engine, self._tell),
            max_steps=ready.max_steps,
            first_step=0,
            windows=ready.windows,
            quarantine=Quarantine(),
        )

    def take(self, traces: Path) -> Profile:
        """Takes them all; the trace goes to a directory."""
        ready, runtime, schedule = self._ready, self._runtime, self._schedule
        ready.stage.set_training_modes()
        with closing(ready.windows(0, len(schedule.ways))) as windows:
            for _ in range(schedule.warmup):
                self._step(windows, "warm-up")
            runtime.reset_memory_peak()
            for _ in range(schedule.steps):
                self._step(windows, "timed")
            peak = runtime.memory_peak()
            breakdown = self._trace(windows, traces)
            memory = self._follow(windows)
        return Profile(
            config=self._config,
            schedule=schedule,
            ledger=ready.ledger,
            device=runtime.device_name,
            steps=tuple(self._taken),
            breakdown=breakdown,
            memory=memory,
            peak_bytes=peak,
        )

    def _tell(self, phase: Phase) -> None:
        if self._enter is not None:
            self._enter(phase)

    def _step(self, windows: Iterator[Window], how: How, ranges: Ranges | None = None) -> None:
        """Takes one step, as a range with its waiting for data if there are ranges."""
        started = time.perf_counter()
        with nullcontext() if ranges is None else ranges.part(STEP):
            with nullcontext() if ranges is None else ranges.part(DATA):
                window, error = take(windows)
            waited = time.perf_counter()
            result = self._trainer.step(error or window or AssertionError("the data have ended before the profile"))
        ended = time.perf_counter()
        assert window is not None
        batches = window.micro_batches
        positions = sum(batch.input_ids.numel() for batch in batches)
        self._taken.append(
            TakenStep(
                how=how,
                loss=result.loss,
                seconds=ended - waited,
                data_wait=waited - started,
                tokens=result.tokens,
                padding=positions - result.tokens,
                longest=max(batch.input_ids.shape[1] for batch in batches),
                supervised=max(math.ceil(batch.num_supervised / batch.input_ids.shape[0]) for batch in batches),
                samples=sum(len(batch.sample_ids) for batch in batches),
            )
        )

    def _trace(self, windows: Iterator[Window], traces: Path) -> StepBreakdown:
        """Takes steps under the profiler and writes their trace."""
        on_gpu = self._runtime.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        ranges = Ranges(self._ready.stage)
        self._enter = ranges.enter
        handler = tensorboard_trace_handler(str(traces), self._config.name, use_gzip=True)
        with ranges.watching(), profile(activities=activities, on_trace_ready=handler) as profiler:
            for _ in range(self._schedule.steps):
                self._step(windows, "traced", ranges)
        self._enter = None
        return break_down(profiler.events(), on_gpu=on_gpu)

    def _follow(self, windows: Iterator[Window]) -> Timeline:
        """Takes a step with every storage followed."""
        device, stage = self._runtime.device, self._ready.stage
        window, error = take(windows)
        if error is not None:
            raise error
        assert window is not None
        tracker = MemoryTracker(device.type)
        self._enter = tracker.enter_phase
        batches: Sequence[Batch] = window.micro_batches if device.type == "cpu" else ()
        with following(tracker, stage.model, self._ready.engine.optimizer, batches):
            tracker.begin_step(0)
            self._step(iter([window]), "followed")
            trace = tracker.finish()
        self._enter = None
        return Timeline(trace.events, spans(trace), CUDA_BLOCK if device.type == "cuda" else 1)
