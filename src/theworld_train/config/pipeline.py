"""Pipelines: stages that run one after the other."""

from __future__ import annotations

from pydantic import Field, model_validator

from theworld_train.config.gates import AdvanceWhen, StopWhen
from theworld_train.config.schema import Ablation
from theworld_train.config.section import Name, NonNegativeInt, Path, Section


class OnFailure(Section):
    """What happens when the process of a stage fails."""

    retry: NonNegativeInt = 0
    """Times that the stage is started again, from its newest checkpoint, before the pipeline halts. Wrong input and a
    signal to stop are never retried."""


class PipelineStage(Section):
    """One stage of a pipeline: a run config, and what differs from it here."""

    config: Path
    """Run config, relative to the pipeline file."""
    overrides: dict[str, object] = {}  # noqa: RUF012 (pydantic copies defaults)
    """Dotted keys of the run config and their values."""
    advance_when: AdvanceWhen | None = None
    """What ends the stage before its last step, as `training.advance_when` of its run config."""
    stop_when: StopWhen | None = None
    """When the model is good enough for later stages to be skipped, as `training.stop_when` of its run config."""
    on_failure: OnFailure | None = None
    """What happens when its process fails; the pipeline's if absent."""
    launcher: tuple[str, ...] | None = None
    """Its launcher; the pipeline's if absent."""

    @model_validator(mode="after")
    def _check_once(self) -> PipelineStage:
        for name in ("advance_when", "stop_when"):
            key = f"training.{name}"
            twice = [other for other in self.overrides if other == key or other.startswith(f"{key}.")]
            if getattr(self, name) is not None and twice:
                raise ValueError(f"{name} is stated twice, as {name} and in overrides as {', '.join(twice)}")
        return self

    @property
    def run_overrides(self) -> dict[str, object]:
        """Everything that differs from the stage's run config here: dotted keys and values, gates among them."""
        gates = {"training.advance_when": self.advance_when, "training.stop_when": self.stop_when}
        stated = {
            f"{key}.{name}": value
            for key, gate in gates.items()
            if gate is not None
            for name, value in gate.model_dump(mode="json", exclude_unset=True).items()
        }
        return {**self.overrides, **stated}


class PipelineEvaluation(Section):
    """What is measured on the checkpoint of each stage."""

    ablations: tuple[Ablation, ...] | None = Field(default=None, min_length=1)
    """Variants of the model that the held-out split is measured with; all that a stage and its data have if null."""
    stages: tuple[Name, ...] | None = None
    """Names of the stages that are measured; all of them if null."""


class PipelineConfig(Section):
    """Stages that run one after the other, each in its own process, each starting from the one before."""

    name: Name
    """Name of the pipeline."""
    output_dir: Path
    """Directory that holds a run directory for each stage, and the summary."""
    launcher: tuple[str, ...] = ()
    """How each stage is launched, such as [theworld-train, launch, --nproc, "8"] or [accelerate, launch, --multi_gpu];
    a single process if empty."""
    on_failure: OnFailure = OnFailure()
    """What happens when the process of a stage fails; a stage may state its own."""
    stages: tuple[PipelineStage, ...] = Field(min_length=1)
    """The stages in their order."""
    evaluation: PipelineEvaluation | None = None
    """What is measured after each stage; nothing if absent."""
