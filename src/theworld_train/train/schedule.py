"""The learning-rate schedule: a pure function of the optimizer step."""

from __future__ import annotations

import math

from theworld_train.config.schema import ScheduleSection


def rate_factor(schedule: ScheduleSection, step: int, max_steps: int) -> float:
    """Returns the share of the peak rate in one optimizer step.

    Warmup is linear and reaches the peak in its last step, so that the first step's factor is 1 / warmup_steps and no
    step is taken at a rate of zero.

    Args:
        schedule: Shape and warmup.
        step: Optimizer step, counted from 0.
        max_steps: Optimizer steps of the run.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_ratio
    if schedule.kind == "constant":
        return 1.0
    if schedule.kind == "wsd":
        decay = schedule.decay_steps or max(1, max_steps // 10)
        start = max(schedule.warmup_steps, max_steps - decay)
        return 1.0 if step < start else _linear(step - start, max_steps - start, floor)
    done, span = step - schedule.warmup_steps, max_steps - schedule.warmup_steps
    if schedule.kind == "linear":
        return _linear(done, span, floor)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done / max(1, span))))


def _linear(done: int, span: int, floor: float) -> float:
    return floor + (1.0 - floor) * (1.0 - min(1.0, done / max(1, span)))
