"""Gates: what ends a run before its last step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from theworld_train.config.errors import did_you_mean
from theworld_train.config.section import NonNegativeFloat, PositiveInt, Section

#: Metrics of a step that gates read; those of time differ from run to run and would end no two of them alike.
TRAIN_METRICS = ("train/loss", "train/grad_norm")
#: What an evaluation measures, over all samples or by kind of question (`<metric>/<kind>`).
EVAL_METRICS = tuple(f"eval/{quantity}" for quantity in ("loss", "predicted", "exact", "normalized", "correct"))
#: Those of them that are of generated answers.
ANSWER_METRICS = ("eval/exact", "eval/normalized", "eval/correct")


def reads_evaluation(metric: str) -> bool:
    """Whether a metric is measured on held-out samples."""
    return metric.startswith("eval/")


def reads_answers(metric: str) -> bool:
    """Whether a metric is of generated answers, over all samples or by kind of question."""
    return "/".join(metric.split("/")[:2]) in ANSWER_METRICS


def kind_of(metric: str) -> str | None:
    """Returns the kind of question that a metric is about; None for all samples."""
    quantity, _, kind = metric.rpartition("/")
    return kind if quantity in EVAL_METRICS else None


def _known(metric: str) -> str:
    known = (*TRAIN_METRICS, *EVAL_METRICS)
    if metric in known or kind_of(metric):
        return metric
    hint = did_you_mean(metric, [*known, *(f"{name}/<kind>" for name in EVAL_METRICS)])
    raise ValueError(f"no gate can read a metric {metric!r}; {hint}")


Metric = Annotated[str, AfterValidator(_known), Field(min_length=1)]


class Plateau(Section):
    """A metric that has stopped improving."""

    metric: Metric
    """Name as in `metrics.jsonl`, such as `eval/loss`, `eval/predicted/digit` or `train/loss`."""
    mode: Literal["min", "max"]
    """Whether lower (`min`) or higher (`max`) is better."""
    patience: PositiveInt
    """Measurements in a row without improvement: evaluations, or steps for a metric of training."""
    min_delta: NonNegativeFloat = 0.0
    """What a measurement has to be better by than the best one before it to count as an improvement."""


class Threshold(Section):
    """A metric that has reached a value."""

    metric: Metric
    """Name as in `metrics.jsonl`."""
    at_least: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Lowest value that is good enough, for what should be high."""
    at_most: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Highest value that is good enough, for what should be low."""

    @model_validator(mode="after")
    def _check_side(self) -> Threshold:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("exactly one of at_least and at_most must be set")
        return self


class AdvanceWhen(Section):
    """What ends a run before its last step: the first of these that holds."""

    plateau: Plateau | None = None
    """A metric has stopped improving."""
    threshold: Threshold | None = None
    """A metric has reached a value."""
    steps: PositiveInt | None = None
    """So many optimizer steps are done. The schedule of the rates still runs to `max_steps`."""
    tokens: PositiveInt | None = None
    """So many tokens have been trained on, image and world tokens included and padding not."""
    supervised_tokens: PositiveInt | None = None
    """So many supervised tokens have been trained on: those of answers, which the loss is of."""


class StopWhen(Section):
    """What makes a run, and all stages after it, unnecessary."""

    threshold: Threshold | None = None
    """A metric has reached a value, in an evaluation on the way or in the last one."""
