"""Runs a pipeline: each stage in its own process, each starting from the one before, going on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from theworld_train.checkpoint_files import COMPONENTS_FILE, newest_checkpoint, origin_of, read_record, recorded_origin
from theworld_train.config import format_overrides, load_run_config
from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.schema import PipelineConfig, RunConfig
from theworld_train.train.stopping import SAVED_AND_STOPPED, STOP_SIGNALS, end_with_parent

#: Seconds that a stage has to end after Ctrl-C, and again after SIGTERM.
ENDING_S = 10
RESULT_FILE = "result.json"
EVALUATION_FILE = "evaluation.json"
SUMMARY_FILE = "summary.json"


class StageFailedError(Exception):
    """Raised when a stage's process ends with another exit code than 0."""

    def __init__(self, stage: str, command: Sequence[str], returncode: int) -> None:
        """Args: stage: its name. command: what was run. returncode: how it ended, negative if by a signal."""
        self.returncode = returncode if returncode >= 0 else 128 - returncode
        stopped = "; the same command goes on from there" if returncode == SAVED_AND_STOPPED else ""
        super().__init__(f"stage {stage!r} ended with exit code {self.returncode}: {' '.join(command)}{stopped}")


@dataclass(frozen=True)
class StagePlan:
    """One stage, ready to run.

    Attributes:
        config: Its resolved run config.
        command: Its training command.
        evaluation: The command that measures its checkpoint, or None.
    """

    config: RunConfig
    command: tuple[str, ...]
    evaluation: tuple[str, ...] | None

    @property
    def directory(self) -> Path:
        """The stage's run directory."""
        return Path(self.config.output_dir)


def plan_stages(pipeline: PipelineConfig) -> list[StagePlan]:
    """Resolves every stage before the first one runs.

    Raises:
        ConfigError: With the problems of all stages, or if two stages have one name.
    """
    plans: list[StagePlan] = []
    previous: Path | None = None
    problems: list[Problem] = []
    for stage in pipeline.stages:
        name = load_run_config(stage.config, format_overrides(stage.overrides)).name
        directory = Path(pipeline.output_dir) / name
        if any(plan.config.name == name for plan in plans):
            problems.append(Problem(f"two stages are called {name!r}", key="stages", hint="give one another `name`"))
        # Its rates and data are the stage's own; where it writes and what it starts from are the pipeline's.
        values: dict[str, Any] = {**stage.overrides, "output_dir": str(directory), "resume": "latest"}
        if previous is not None:
            values["init_from"] = str(previous)
        overrides = format_overrides(values)
        config = load_run_config(stage.config, overrides)
        module = ("-m", "theworld_train", "train", stage.config, *overrides)
        command = (*pipeline.launcher, *module) if pipeline.launcher else (sys.executable, *module)
        evaluation = None
        if pipeline.evaluation is not None and is_measured(pipeline, config):
            flags = [word for ablation in pipeline.evaluation.ablations for word in ("--ablation", ablation)]
            out = str(directory / EVALUATION_FILE)
            evaluation = (sys.executable, "-m", "theworld_train", "evaluate", str(directory), *flags, "--json", out)
        plans.append(StagePlan(config, tuple(command), evaluation))
        previous = directory
    measured = () if pipeline.evaluation is None else pipeline.evaluation.stages or ()
    names = [plan.config.name for plan in plans]
    problems += [
        Problem(f"no stage is called {name!r}", key="evaluation.stages", hint=did_you_mean(name, names))
        for name in measured
        if name not in names
    ]
    if problems:
        raise ConfigError(problems)
    return plans


def is_measured(pipeline: PipelineConfig, stage: RunConfig) -> bool:
    """Whether a stage's checkpoint is measured after it."""
    wanted = pipeline.evaluation
    return wanted is not None and stage.data.eval is not None and (wanted.stages is None or stage.name in wanted.stages)


def run_pipeline(pipeline: PipelineConfig, console: Console) -> dict[str, Any]:
    """Runs what is left of a pipeline and writes its summary.

    Returns:
        The summary, which `summary.json` holds too.

    Raises:
        ConfigError: If a stage's config, or the checkpoint that it started from, has changed since its run directory
            was written.
        StageFailedError: If a stage's process fails; the pipeline goes on there when it is run again.
    """
    plans = plan_stages(pipeline)
    for plan in plans:
        _refuse_changed(plan)
    _refuse_mixed(plans)
    for number, plan in enumerate(plans, start=1):
        title = f"stage {number}/{len(plans)} {plan.config.name}"
        complete = (plan.directory / RESULT_FILE).is_file()
        if complete:
            console.print(f"{title}: complete already", highlight=False)
        else:
            console.print(f"{title}: {' '.join(plan.command)}", highlight=False, markup=False, soft_wrap=True)
            _call(plan.config.name, plan.command)
            _refuse_mixed(plans)
        if plan.evaluation is not None and not (complete and (plan.directory / EVALUATION_FILE).is_file()):
            _call(plan.config.name, plan.evaluation)
    summary = summarise(pipeline, plans)
    path = Path(pipeline.output_dir) / SUMMARY_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=1))
    partial.replace(path)
    return summary


def _call(stage: str, command: Sequence[str]) -> None:
    """Runs a stage's process, and passes the signals on to it that a stage stops on.

    Raises:
        StageFailedError: If it ends with another exit code than 0.
    """
    # Blocked until there is a process to pass them on to; the process begins as if they were not.
    own, mask = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        process = subprocess.Popen(command, preexec_fn=lambda: _begin_stage(own))
        before = {
            number: signal.signal(number, lambda number, _: process.send_signal(number)) for number in STOP_SIGNALS
        }
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        returncode = process.wait()
    except BaseException:  # such as Ctrl-C, which the terminal sends to the stage too: it gets time to end its ranks
        for end in (process.terminate, process.kill):
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_S)
            end()  # nothing, if it has ended
        process.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if returncode:
        raise StageFailedError(stage, command, returncode)


def _begin_stage(pipeline: int) -> None:
    """Has a stage stop when the pipeline's process ends in whatever way, and take signals again."""
    end_with_parent(signal.SIGTERM)
    if os.getppid() != pipeline:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _refuse_changed(plan: StagePlan) -> None:
    """Refuses a run directory that another config has written: its checkpoint would be taken for this one's."""
    path = plan.directory / "config.yaml"
    if not path.is_file():
        return
    written = load_run_config(str(path))
    theirs, ours = written.model_dump(mode="json"), plan.config.model_dump(mode="json")
    # What a lock file has pinned is no change of the config.
    pins = {key for key in _flat(ours) if key.endswith("revision") and _flat(ours)[key] is None}
    different = sorted(
        key
        for key in (_flat(theirs).keys() | _flat(ours).keys()) - pins
        if _flat(theirs).get(key) != _flat(ours).get(key)
    )
    if different:
        shown = ", ".join(
            f"{key}: {_flat(theirs).get(key)!r} there, {_flat(ours).get(key)!r} now" for key in different[:5]
        )
        raise ConfigError(
            Problem(
                f"was written by another config ({shown})",
                source=str(plan.directory),
                hint="remove it to run the stage again, or choose another output_dir for the pipeline",
            )
        )


def _refuse_mixed(plans: Sequence[StagePlan]) -> None:
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


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def summarise(pipeline: PipelineConfig, plans: Sequence[StagePlan]) -> dict[str, Any]:
    """Collects the results that the stages have written."""
    stages = []
    for plan in plans:
        entry = {"name": plan.config.name, "directory": str(plan.directory)}
        entry |= json.loads((plan.directory / RESULT_FILE).read_text())
        evaluation = plan.directory / EVALUATION_FILE
        entry["ablations"] = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
        stages.append(entry)
    return {"pipeline": pipeline.name, "stages": stages}
