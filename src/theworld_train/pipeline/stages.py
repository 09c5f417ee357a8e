"""The stages of a pipeline: what each is to run, what it has come to, and whether they come from one another."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theworld_train.accounting.frames import unfit_ablations
from theworld_train.checkpoint_files import COMPONENTS_FILE, newest_checkpoint, origin_of, read_record, recorded_origin
from theworld_train.config import format_overrides, load_run_config
from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.launchers import ranks_of
from theworld_train.config.pipeline import PipelineConfig, PipelineEvaluation, PipelineStage
from theworld_train.config.schema import Ablation, RunConfig
from theworld_train.train.gates import STOP
from theworld_train.train.resume_rules import Change, changed_keys

RESULT_FILE = "result.json"
EVALUATION_FILE = "evaluation.json"
#: How the command is called, by which a launcher that is ours is known.
_PROGRAMS = ("theworld-train", "theworld_train")


@dataclass(frozen=True)
class StagePlan:
    """One stage, ready to run.

    Attributes:
        config: Its resolved run config.
        command: Its training command.
        ranks: Processes that the command starts; None if its words do not say.
        evaluation: The command that measures its checkpoint, or None.
        ablations: The variants that it names; none if the command chooses all that fit.
        retries: Times that it is started again if it fails.
    """

    config: RunConfig
    command: tuple[str, ...]
    ranks: int | None
    evaluation: tuple[str, ...] | None
    ablations: tuple[Ablation, ...]
    retries: int

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.config.name

    @property
    def directory(self) -> Path:
        """The stage's run directory."""
        return Path(self.config.output_dir)

    @property
    def result(self) -> dict[str, Any] | None:
        """What the stage has come to, or None if it is not complete."""
        path = self.directory / RESULT_FILE
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_bytes())
        return result

    @property
    def is_complete(self) -> bool:
        """Whether it has trained to its end."""
        return self.result is not None

    @property
    def measured(self) -> dict[str, Any] | None:
        """What was measured on its newest checkpoint; None if nothing was, or on another one."""
        path, newest = self.directory / EVALUATION_FILE, newest_checkpoint(self.directory)
        if newest is None or not path.is_file():
            return None
        found: dict[str, Any] = json.loads(path.read_bytes())
        known = found.get("checkpoint", {}).get("manifest_sha256")
        return found if known == origin_of(newest).manifest_sha256 else None

    @property
    def is_measured(self) -> bool:
        """Whether nothing is left to be measured after it."""
        if self.evaluation is None:
            return True
        found = self.measured
        return found is not None and set(self.ablations) <= set(found["ablations"])


def plan_stages(pipeline: PipelineConfig) -> list[StagePlan]:
    """Resolves every stage before the first one runs.

    Raises:
        ConfigError: With the problems of all stages, or if two stages have one name, or if something is to be measured
            that a stage does not have.
    """
    plans: list[StagePlan] = []
    problems: list[Problem] = []
    for stage in pipeline.stages:
        name = load_run_config(stage.config, format_overrides(stage.run_overrides)).name
        if any(plan.name == name for plan in plans):
            problems.append(Problem(f"two stages are called {name!r}", key="stages", hint="give one another `name`"))
        plans.append(_plan(pipeline, stage, name, plans[-1].directory if plans else None))
    if pipeline.evaluation is not None:
        problems += _unmeasurable(pipeline.evaluation, plans)
    if problems:
        raise ConfigError(problems)
    return plans


def _unmeasurable(wanted: PipelineEvaluation, plans: Sequence[StagePlan]) -> list[Problem]:
    """Returns what is to be measured that the stages do not have."""
    configs = {plan.name: plan.config for plan in plans}
    problems = []
    for name in wanted.stages or ():
        if name not in configs:
            hint = did_you_mean(name, list(configs))
            problems.append(Problem(f"no stage is called {name!r}", key="evaluation.stages", hint=hint))
        elif configs[name].data.eval is None:
            message, hint = f"stage {name!r} has no held-out split to be measured on", "set data.eval in its run config"
            problems.append(Problem(message, key="evaluation.stages", hint=hint))
    hint = "name the stages that have it in evaluation.stages, or leave evaluation.ablations out"
    return problems + [
        Problem(f"stage {plan.name!r}: {unfit.message}", key="evaluation.ablations", value=unfit.value, hint=hint)
        for plan in plans
        if plan.evaluation is not None
        for unfit in unfit_ablations(plan.config, plan.ablations)
    ]


def _plan(pipeline: PipelineConfig, stage: PipelineStage, name: str, previous: Path | None) -> StagePlan:
    directory = Path(pipeline.output_dir) / name
    # Its rates and data are the stage's own; where it writes and what it starts from are the pipeline's.
    values: dict[str, Any] = {**stage.run_overrides, "output_dir": str(directory), "resume": "latest"}
    if previous is not None:
        values["init_from"] = str(previous)
    overrides = format_overrides(values)
    config = load_run_config(stage.config, overrides)
    launcher = pipeline.launcher if stage.launcher is None else stage.launcher
    evaluation: tuple[str, ...] | None = None
    ablations: tuple[Ablation, ...] = ()
    if pipeline.evaluation is not None and is_measured(pipeline, config):
        ablations = pipeline.evaluation.ablations or ()
        flags = [word for ablation in ablations for word in ("--ablation", ablation)]
        out = str(directory / EVALUATION_FILE)
        evaluation = (sys.executable, "-m", "theworld_train", "evaluate", str(directory), *flags, "--json", out)
    on_failure = pipeline.on_failure if stage.on_failure is None else stage.on_failure
    command = (*_training(launcher), stage.config, *overrides)
    return StagePlan(config, command, ranks_of(launcher), evaluation, ablations, on_failure.retry)


def _training(launcher: Sequence[str]) -> tuple[str, ...]:
    """Returns a training command up to its config."""
    if any(Path(word).name in _PROGRAMS for word in launcher):
        return tuple(launcher)
    return (*(launcher or (sys.executable,)), "-m", "theworld_train", "train")


def is_measured(pipeline: PipelineConfig, stage: RunConfig) -> bool:
    """Whether a stage's checkpoint is measured after it."""
    wanted = pipeline.evaluation
    return wanted is not None and stage.data.eval is not None and (wanted.stages is None or stage.name in wanted.stages)


# -- which of them are run --------------------------------------------------------------------------------------------


def chosen(plans: Sequence[StagePlan], first: str | None, last: str | None) -> Sequence[StagePlan]:
    """Returns the stages from one to another, both included.

    Args:
        plans: All stages.
        first: Name of the first one; the pipeline's if None. It starts from what the stage before it holds by now.
        last: Name of the last one; the pipeline's if None.

    Raises:
        ConfigError: If there is no such stage, they are in the wrong order, or the first one has nothing to start from.
    """
    names = [plan.name for plan in plans]
    unknown = [
        Problem("no stage is called so", key=key, value=name, hint=did_you_mean(name, names) or ", ".join(names))
        for key, name in (("--from", first), ("--until", last))
        if name is not None and name not in names
    ]
    if unknown:
        raise ConfigError(unknown)
    begin, end = 0 if first is None else names.index(first), len(names) if last is None else names.index(last) + 1
    if begin >= end:
        raise ConfigError(Problem(f"comes before --from {first}", key="--until", value=last))
    before = plans[begin - 1].directory if begin else None
    if before is not None and newest_checkpoint(before) is None:
        message, hint = (
            f"has nothing to start from: {before} holds no checkpoint",
            f"begin earlier: --from {names[begin - 1]}",
        )
        raise ConfigError(Problem(message, key="--from", value=first, hint=hint))
    return plans[begin:end]


def good_enough(plans: Sequence[StagePlan]) -> str | None:
    """Returns why stages after these are not needed, or None if they are."""
    for plan in plans:
        result = plan.result
        if result is not None and result.get("ended_by") == STOP:
            return f"{plan.name} is good enough: {result['reason']}"
    return None


# -- what is there already --------------------------------------------------------------------------------------------


def refuse_changed(plans: Sequence[StagePlan]) -> None:
    """Refuses run directories that other configs have written: their checkpoints would be taken for these ones'.

    What may differ when a run is resumed may differ here too, but for the model.

    Raises:
        ConfigError: Naming the directories, and the keys in which they differ.
    """
    problems = []
    for plan in plans:
        path = plan.directory / "config.yaml"
        if path.is_file() and (changes := _changes(plan, load_run_config(str(path)))):
            shown = ", ".join(f"{change.key}: {change.then!r} there, {change.now!r} now" for change in changes[:5])
            message = f"was written by another config ({shown})"
            hint = "remove it to run the stage again, or choose another output_dir for the pipeline"
            problems.append(Problem(message, source=str(plan.directory), hint=hint))
    if problems:
        raise ConfigError(problems)


def _changes(plan: StagePlan, written: RunConfig) -> list[Change]:
    """Returns what makes another run of a stage; a complete one is what it was, whatever it would be allowed now."""
    allowed = () if plan.is_complete else plan.config.allow_changed
    return [
        change
        for change in changed_keys(plan.config, written)
        if (change.rule != "safe" or change.key.startswith("model."))
        and not (change.rule == "allowed" and change.key in allowed)
        # What a lock file has pinned is no change of the config.
        and not (change.key.endswith("revision") and change.now is None)
    ]


def refuse_mixed(plans: Sequence[StagePlan]) -> None:
    """Refuses stages that have begun from another checkpoint than the stage before them holds now.

    Their weights would stay as they are, whether they are complete or would be resumed, and the summary would show them
    as if they came from what stands above them. Which of the two to keep is the user's to say.

    Raises:
        ConfigError: Naming each directory to remove.
    """
    made_here = {plan.config.output_dir for plan in plans}
    problems = []
    for plan in plans:
        own, source = newest_checkpoint(plan.directory), plan.config.init_from
        if own is None or source is None:
            continue
        origin = recorded_origin(read_record(own / COMPONENTS_FILE))
        newest = newest_checkpoint(Path(source))
        now = None if newest is None else origin_of(newest)
        if now is None and source not in made_here:
            continue  # nothing will take the place of a checkpoint that is not the pipeline's
        if origin is None or now is None or origin.manifest_sha256 != now.manifest_sha256:
            held = "holds no checkpoint" if newest is None else f"holds another {newest.name}"
            problems.append(
                Problem(
                    f"was trained from {origin.path if origin else 'the bases'}, but {source} {held} now",
                    source=str(plan.directory),
                    hint="remove this directory to train the stage again, or put back what it was trained from",
                )
            )
    if problems:
        raise ConfigError(problems)
