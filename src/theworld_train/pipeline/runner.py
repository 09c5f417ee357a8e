"""Runs a pipeline: each stage in its own process, each starting from the one before, going on where it was."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.pipeline import PipelineConfig
from theworld_train.pipeline.journal import Journal, State
from theworld_train.pipeline.process import SIGNAL_BASE, Processes
from theworld_train.pipeline.stages import (
    StagePlan,
    chosen,
    good_enough,
    plan_stages,
    refuse_changed,
    refuse_mixed,
)
from theworld_train.train.run_lock import run_lock
from theworld_train.train.stopping import SAVED_AND_STOPPED, STOP_SIGNALS

SUMMARY_FILE = "summary.json"
#: Exit code of a command whose input is wrong, which no retry makes right.
WRONG_INPUT = 2
#: Exit codes of a process that was told to stop.
_STOPPED = {SAVED_AND_STOPPED, *(SIGNAL_BASE + number for number in (*STOP_SIGNALS, signal.SIGINT))}
GOES_ON = "the same command goes on from there"


class PipelineHaltedError(Exception):
    """Raised when a pipeline ends before its last stage.

    Attributes:
        returncode: What its command ends with: the exit code of the process that it has ended with, or
            `SAVED_AND_STOPPED` if it was stopped and nothing is lost.
    """

    def __init__(self, message: str, returncode: int) -> None:
        """Args: message: what has happened. returncode: see above."""
        self.returncode = returncode
        super().__init__(message)


def run_pipeline(
    pipeline: PipelineConfig, console: Console, first: str | None = None, last: str | None = None
) -> dict[str, Any]:
    """Runs what is left of a pipeline and writes its summary.

    Args:
        pipeline: The pipeline.
        console: Where it says what it does.
        first: The stage to begin with; those before it are left as they are, and do not make later ones unnecessary.
        last: The stage to end with.

    Returns:
        The summary, which `summary.json` holds too.

    Raises:
        ConfigError: If a stage's config, or the checkpoint that it started from, has changed since its run directory
            was written; if another process runs the pipeline; or if there is no such stage to begin or to end with.
        PipelineHaltedError: If a stage fails or is told to stop; the pipeline goes on there when it is run again.
    """
    plans = plan_stages(pipeline)
    refuse_changed(plans)
    refuse_mixed(plans)
    selected = chosen(plans, first, last)
    directory = _directory(pipeline)
    with run_lock(directory, pipeline.name):
        run = _Run(plans, Journal(directory), Processes(), console)
        run.go(pipeline.name, selected)
        summary = summarise(pipeline, plans)
        partial = directory / f".{SUMMARY_FILE}.partial"
        partial.write_text(json.dumps(summary, indent=1))
        partial.replace(directory / SUMMARY_FILE)
    return summary


def _directory(pipeline: PipelineConfig) -> Path:
    """Returns a pipeline's directory, which is there from now on."""
    directory = Path(pipeline.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot be written to: {error.strerror}"
        raise ConfigError(Problem(message, key="output_dir", value=str(directory))) from error
    return directory


class _Run:
    """One command's run of a pipeline."""

    def __init__(self, plans: Sequence[StagePlan], journal: Journal, processes: Processes, console: Console) -> None:
        """Keeps what a run works with."""
        self._plans, self._journal, self._processes, self._console = plans, journal, processes, console

    def go(self, pipeline: str, selected: Sequence[StagePlan]) -> None:
        """Runs the selected stages in their order, or what is left of them."""
        self._journal.begin(pipeline, [plan.name for plan in self._plans])
        with self._processes.listening():
            for number, plan in enumerate(selected):
                title = f"stage {self._plans.index(plan) + 1}/{len(self._plans)} {plan.name}"
                enough = good_enough(selected[:number])
                if plan.is_complete:
                    self._say(f"{title}: complete already")
                    self._complete(plan, None)
                elif enough is not None:
                    self._say(f"{title}: skipped, as {enough}")
                    self._journal.note(plan.name, "skipped", enough)
                    continue
                else:
                    self._train(plan, title)
                    refuse_mixed(self._plans)
                if not plan.is_measured:
                    self._measure(plan, title)

    def _train(self, plan: StagePlan, title: str) -> None:
        """Runs a stage until it is complete, or has failed once more than it may."""
        for left in range(plan.retries, -1, -1):
            self._refuse_stopped(plan)
            self._say(f"{title}: {' '.join(plan.command)}")
            self._journal.launched(plan.name)
            code = self._launch(plan)
            # Its result alone decides: a process may end badly after it, while its trackers or its process group close.
            if plan.is_complete:
                self._complete(plan, code)
                return
            state, reason = self._outcome(code)
            self._journal.note(plan.name, state, reason, code)
            if state == "stopped":
                raise PipelineHaltedError(f"stage {plan.name!r} {reason}; {GOES_ON}", code or SAVED_AND_STOPPED)
            if code == WRONG_INPUT or not left:
                raise PipelineHaltedError(f"stage {plan.name!r} {reason}: {' '.join(plan.command)}", code or 1)
            self._say(f"{title}: {reason}; is started again from its newest checkpoint ({left} of {plan.retries} left)")

    def _launch(self, plan: StagePlan) -> int:
        try:
            return self._processes.call(plan.command)
        except BaseException as error:
            # Whatever has broken the wait off, the stage has ended; a disk that is full must not hide it.
            with suppress(OSError):
                self._journal.note(plan.name, "stopped", f"was broken off by {type(error).__name__}")
            raise

    def _outcome(self, code: int) -> tuple[State, str]:
        """Returns state and reason of a stage that is not complete."""
        if code == SAVED_AND_STOPPED:
            return "stopped", "was stopped by a signal, and is saved"
        if code in _STOPPED or self._processes.stopped_by is not None:
            return "stopped", f"was stopped by a signal before it could save, and ended with exit code {code}"
        if code == 0:
            return "failed", "ended with exit code 0 but wrote no result: a launcher has to wait for its processes"
        return "failed", f"ended with exit code {code}"

    def _refuse_stopped(self, plan: StagePlan) -> None:
        """Halts between two stages, where all is saved."""
        if (number := self._processes.stopped_by) is not None:
            message = f"stopped by {number.name} before stage {plan.name!r}; {GOES_ON}"
            raise PipelineHaltedError(message, SAVED_AND_STOPPED)

    def _complete(self, plan: StagePlan, code: int | None) -> None:
        """Writes down that a stage is complete, which its result alone decides."""
        self._journal.note(plan.name, "complete", (plan.result or {}).get("reason"), code)

    def _measure(self, plan: StagePlan, title: str) -> None:
        """Measures a stage until that has succeeded, or has failed once more than the stage may."""
        assert plan.evaluation is not None
        for left in range(plan.retries, -1, -1):
            self._refuse_stopped(plan)
            code = self._processes.call(plan.evaluation)
            if self._processes.stopped_by is not None:
                message = f"stopped by a signal while stage {plan.name!r} was measured; {GOES_ON}"
                raise PipelineHaltedError(message, SAVED_AND_STOPPED)
            if code == 0:
                return
            reason = f"ended with exit code {code}"
            if code in {WRONG_INPUT, *_STOPPED} or not left:
                message = f"measuring stage {plan.name!r} {reason}: {' '.join(plan.evaluation)}"
                raise PipelineHaltedError(message, code)
            self._say(f"{title}: measuring it {reason}; it is measured again ({left} of {plan.retries} left)")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def summarise(pipeline: PipelineConfig, plans: Sequence[StagePlan]) -> dict[str, Any]:
    """Collects the results that the stages have written; a stage without one is skipped or pending."""
    stages = []
    for number, plan in enumerate(plans):
        entry: dict[str, Any] = {"name": plan.name, "directory": str(plan.directory)}
        result = plan.result
        if result is None:
            state = "pending" if good_enough(plans[:number]) is None else "skipped"
            stages.append(entry | {"state": state})
            continue
        measured = plan.measured
        ablations = {} if measured is None else measured["ablations"]
        stages.append(entry | {"state": "complete"} | result | {"ablations": ablations})
    return {"pipeline": pipeline.name, "stages": stages}
