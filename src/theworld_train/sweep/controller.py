"""Runs the trials of a sweep: takes them, launches them, follows their metric, and records how they end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, MappingProxyType

from theworld_train.config import load_pipeline_config, load_run_config
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.launchers import ranks_of
from theworld_train.config.schema import RunConfig
from theworld_train.config.sweep import SweepConfig, SweepWorkers
from theworld_train.sweep.launching import LOG_TAIL_LINES, Launch, State, ending, exit_code, start
from theworld_train.sweep.lock import sweep_lock
from theworld_train.sweep.metric import METRICS_FILE, MetricReader, final_value, report_interval
from theworld_train.sweep.study import EXIT_CODE, LAUNCHES, LOG_TAIL, REASON, STATE, Claim, Orphan, Study
from theworld_train.sweep.summary import Row, summarise, summary_of, words, write_summary
from theworld_train.sweep.target import CONFIG_FILE, Target, Values, run_directories

#: Seconds between two looks at the trials.
POLL_S = 0.2
VISIBLE = "CUDA_VISIBLE_DEVICES"
PROGRAM = "theworld-train"
LOG_FILE = "log.txt"
RUN = "run"
RESULT_FILE = "result.json"
#: What a pruned trial is told to be, until its process has ended.
PRUNED_AT = "pruned_at"
NOTHING: Mapping[str, object] = MappingProxyType({})
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

Say = Callable[[str], None]
#: Says why a run of so many processes cannot fit, or None; `sweep` stands beside the plan and is handed it.
Fits = Callable[[RunConfig, int], str | None]


@dataclass(frozen=True)
class Worker:
    """What runs one trial at a time.

    Attributes:
        gpus: What `CUDA_VISIBLE_DEVICES` is set to, if anything.
        processes: Processes of each of its trials.
    """

    gpus: str | None
    processes: int

    def environment(self) -> dict[str, str]:
        """Returns the variables of its trials."""
        return {**os.environ} if self.gpus is None else {**os.environ, VISIBLE: self.gpus}


def workers_of(settings: SweepWorkers) -> list[Worker]:
    """Returns the workers that a sweep has on one machine.

    Raises:
        ConfigError: If a worker is to have a GPU that `CUDA_VISIBLE_DEVICES` does not show.
    """
    if settings.gpus is None:
        return [Worker(None, settings.processes)] * settings.count
    visible = _visible_gpus()
    if visible and (most := max(number for group in settings.gpus for number in group)) >= len(visible):
        message = f"names GPU {most}, but {VISIBLE} shows {len(visible)}, numbered from 0"
        raise ConfigError(Problem(message, key="workers.gpus"))
    groups = [[visible[number] if visible else str(number) for number in group] for group in settings.gpus]
    return [Worker(",".join(group), len(group)) for group in groups]


def only_worker(settings: SweepWorkers) -> Worker:
    """Returns the one worker of a job: on all GPUs that the scheduler lets it see, a process on each."""
    return Worker(None, len(_visible_gpus()) or settings.processes)


def _visible_gpus() -> list[str]:
    """Returns the GPUs that this process has been given; none if nobody has said."""
    return [name for name in os.environ.get(VISIBLE, "").split(",") if name]


def training_command(sweep: SweepConfig, config: Path, processes: int) -> list[str]:
    """Returns the command of one launch; a launcher that names our program gets the config as its argument."""
    module = [sys.executable, "-m", "theworld_train"]
    if sweep.kind == "pipeline":
        return [*module, "run", str(config)]
    if any(Path(word).name == PROGRAM for word in sweep.launcher):
        return [*sweep.launcher, str(config)]
    if sweep.launcher:
        return [*sweep.launcher, "-m", "theworld_train", "train", str(config)]
    if processes > 1:
        return [*module, "launch", str(config), "--nproc", str(processes)]
    return [*module, "train", str(config)]


@dataclass
class Running:
    """A trial that is running.

    Attributes:
        claim: The trial and its lock.
        launch: Its process.
        reader: Its metric.
        interval: Least number of steps between two values that are reported.
        reported: The last step that was.
    """

    claim: Claim
    launch: Launch
    reader: MetricReader
    interval: int
    reported: int = field(default=0)


class Controller:
    """Looks after the trials of some workers, until there is nothing left to do or a signal comes."""

    def __init__(
        self, sweep: SweepConfig, study: Study, target: Target, workers: Sequence[Worker], say: Say, fits: Fits | None
    ) -> None:
        """Keeps what a sweep consists of.

        Args:
            sweep: The sweep.
            study: Its study.
            target: What is varied, resolved.
            workers: What this process runs trials on.
            say: Tells the user.
            fits: Says why a run cannot fit; None if that is not asked.
        """
        self._sweep = sweep
        self._study = study
        self._target = target
        self._workers = workers
        self._say = say
        self._fits = fits
        self._busy: dict[int, Running] = {}
        self._left: set[int] = set()
        self._signals: list[int] = []
        self._waits_for: int | None = None

    def run(self) -> int | None:
        """Runs what is left to run.

        Returns:
            The signal that has stopped it, if one has.
        """
        with self._listening():
            try:
                while True:
                    waiting = not self._signals and self._employ()
                    if not self._busy and not waiting:
                        break
                    time.sleep(POLL_S)
                    for worker in list(self._busy):
                        self._look_at(worker)
            except BaseException:
                # Such as a storage that is gone: what runs is saved, and goes on with the next command.
                self._abandon()
                raise
        self._write()
        return self._signals[0] if self._signals else None

    # -- beginning ----------------------------------------------------------------------------------------------------

    def _employ(self) -> bool:
        """Gives every idle worker a trial; says whether to wait for processes of controllers that have gone."""
        for worker in range(len(self._workers)):
            while worker not in self._busy and not self._signals:
                claim = self._study.claim(self._left)
                if isinstance(claim, Orphan):
                    if self._waits_for != claim.number:
                        self._say(f"trial {claim.number}: waiting for its process, whose controller is gone, to end")
                        self._waits_for = claim.number
                    return True
                if claim is None:
                    return False
                try:
                    self._begin(worker, claim)
                except BaseException:
                    claim.lock.release()
                    raise
        return False

    def _begin(self, worker: int, claim: Claim) -> None:
        """Launches a trial, or ends it if there is nothing to launch."""
        trial, path = claim.trial, self._study.path_of(claim.trial.number)
        values = self._study.values_of(trial.params)
        known: State | None = trial.user_attrs.get(STATE)
        if known is not None and known != "complete":  # its process was killed while it told Optuna
            return self._end(claim, known)
        if PRUNED_AT in trial.user_attrs:
            return self._end(claim, "pruned")
        if self._sweep.kind == "run" and (path / RUN / RESULT_FILE).is_file():
            return self._conclude(claim, 0, [])
        launches = int(trial.user_attrs.get(LAUNCHES, 0))
        try:
            runs = self._frozen(trial.number, values)
            reason = self._why_not(trial.number, runs, self._workers[worker]) if launches == 0 else None
        except ConfigError as error:
            return self._end(claim, "invalid", {REASON: "; ".join(str(problem) for problem in error.problems)})
        if reason is not None:
            return self._end(claim, "does_not_fit", {REASON: reason})
        command = training_command(self._sweep, path / CONFIG_FILE, self._workers[worker].processes)
        self._study.note(trial, {LAUNCHES: launches + 1})
        launch = start(command, self._workers[worker].environment(), path / LOG_FILE, claim.lock.file)
        reader = MetricReader(next(iter(self._places(path))) / METRICS_FILE, self._sweep.metric)
        reported = max(self._study.reported(trial), default=0)
        measured = next((run for run in runs if run.name == self._sweep.stage), runs[-1])
        interval = report_interval(self._sweep.metric, measured)
        self._busy[worker] = Running(claim, launch, reader, interval, reported)
        verb = "begins" if launches == 0 else "goes on"
        where = f" on GPUs {self._workers[worker].gpus}" if self._workers[worker].gpus else ""
        self._say(f"trial {trial.number} {verb}{where}: {shown(values)}")
        self._write()
        return None

    def _why_not(self, number: int, runs: Sequence[RunConfig], worker: Worker) -> str | None:
        """Says why a trial cannot fit, or None if it may; a plan that fails itself keeps nothing from being tried."""
        if self._fits is None:
            return None
        try:
            for run, processes in zip(runs, self._processes(number, worker), strict=True):
                reason = None if processes is None else self._fits(run, processes)
                if reason is not None:
                    return f"{run.name}: {reason}" if len(runs) > 1 else reason
            return None
        except ConfigError:
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            self._say(f"trial {number} cannot be planned ({said}), so that it is launched without")
            return None

    def _processes(self, number: int, worker: Worker) -> list[int | None]:
        """Returns how many processes each run of a trial has; None where the words of a launcher do not say."""
        if self._sweep.kind == "run":
            return [ranks_of(self._sweep.launcher) if self._sweep.launcher else worker.processes]
        pipeline = load_pipeline_config(self._study.path_of(number) / CONFIG_FILE)
        launchers = (pipeline.launcher if stage.launcher is None else stage.launcher for stage in pipeline.stages)
        return [ranks_of(launcher) for launcher in launchers]

    def _frozen(self, number: int, values: Values) -> list[RunConfig]:
        """Returns the run configs of a trial, frozen in its directory before it is launched for the first time."""
        path = self._study.path_of(number)
        if not (path / CONFIG_FILE).is_file():
            name = f"{self._sweep.name[:58]}-{number:04d}"
            # Absolute: the sweep may go on from another working directory.
            self._target.resolve(values, name, str((path / RUN).absolute()), f"trial {number}").write(path)
        return self._runs(path)

    def _runs(self, path: Path) -> list[RunConfig]:
        """Returns the run configs in a trial's directory."""
        if self._target.stages is None:
            return [load_run_config(path / CONFIG_FILE)]
        return [load_run_config(file) for file in sorted((path / "stages").glob("*.yaml"))]

    def _places(self, path: Path) -> Sequence[Path]:
        """Returns where a trial's metric may stand."""
        return list(run_directories(self._sweep.kind, path / RUN, self._target.stages or (), self._sweep.stage))

    # -- following ----------------------------------------------------------------------------------------------------

    def _look_at(self, worker: int) -> None:
        """Reports what a trial has measured, stops it if it is bad or late, and records its end."""
        running = self._busy[worker]
        launch, trial = running.launch, running.claim.trial
        code = launch.poll()
        pruned = self._report(running)
        if code is None:
            if self._signals:
                launch.stop("interrupted")
                if len(self._signals) > 1:
                    launch.kill()
            elif pruned and launch.asked is None:
                self._study.note(trial, {PRUNED_AT: running.reported})
                launch.stop("pruned")
            elif self._sweep.timeout_s is not None and launch.seconds > self._sweep.timeout_s:
                launch.stop("timed_out")
            return
        del self._busy[worker]
        self._conclude(running.claim, code, launch.tail(), launch.asked)

    def _report(self, running: Running) -> bool:
        """Tells Optuna what a trial has measured since the last look, and returns whether it should be pruned."""
        trial, before = running.claim.trial, running.reported
        for step, value in running.reader.new():
            if not running.reported or step >= running.reported + running.interval:
                running.reported = step
                trial.report(value, step)
        return running.reported > before and self._sweep.pruner != "none" and trial.should_prune()

    # -- ending -------------------------------------------------------------------------------------------------------

    def _conclude(self, claim: Claim, returncode: int, tail: Sequence[str], asked: str | None = None) -> None:
        """Records what the end of a trial's process means."""
        trial, path = claim.trial, self._study.path_of(claim.trial.number)
        kind, why = ending(returncode, tail)
        ended: dict[str, object] = {EXIT_CODE: exit_code(returncode), LOG_TAIL: list(tail[-LOG_TAIL_LINES:])}
        if kind == "exited":
            value, missing = self._value(path)
            if value is None:
                return self._end(claim, "failed", {REASON: missing, **ended})
            return self._end(claim, "complete", {EXIT_CODE: 0}, value)
        if asked == "pruned":
            return self._end(claim, "pruned", ended)
        if asked == "timed_out":
            return self._end(claim, "timed_out", {REASON: f"took longer than {self._sweep.timeout_s} s", **ended})
        if asked == "interrupted" or kind == "interrupted":
            self._left.add(trial.number)
            claim.lock.release()
            self._say(f"trial {trial.number} stopped: {why or f'exit code {exit_code(returncode)}'}; it goes on later")
            return self._write()
        return self._end(claim, kind, {REASON: why, **ended})

    def _value(self, path: Path) -> tuple[float | None, str | None]:
        """Returns the value that a trial has come to, or why it has none."""
        if self._sweep.kind == "run" and not (path / RUN / RESULT_FILE).is_file():
            return None, f"its process ended with exit code 0, but without {RESULT_FILE}"
        places = self._places(path)
        found = [place for place in places if (place / METRICS_FILE).is_file()] or places
        return final_value(MetricReader(found[0] / METRICS_FILE, self._sweep.metric))

    def _end(
        self, claim: Claim, state: State, attributes: Mapping[str, object] = NOTHING, value: float | None = None
    ) -> None:
        """Records how a trial has ended, and gives it back."""
        trial, reason = claim.trial, attributes.get(REASON)
        if state == "pruned":
            step = trial.user_attrs.get(PRUNED_AT)
            reason = f"worse than others at step {step}, says the {self._sweep.pruner} pruner"
        self._study.finish(trial, state, attributes if reason is None else {**attributes, REASON: reason}, value)
        claim.lock.release()
        said = f" ({reason})" if reason else ""
        if value is not None:
            best = self._study.best()
            is_best = best is not None and best.number == trial.number
            said = f": {self._sweep.metric} {value:.6g}{', the best so far' if is_best else ''}"
        self._say(f"trial {trial.number} {words(state)}{said}")
        self._write()

    def _write(self) -> None:
        self._study.importance()  # kept from here on: it takes a while, and others wait for the lock
        with sweep_lock(self._study.directory):  # or an older summary might replace another worker's newer one
            write_summary(summarise(self._sweep, self._study), self._study.directory)

    def summary(self) -> Row:
        """Returns what the sweep has come to."""
        return summary_of(self._sweep, self._study)

    # -- stopping -----------------------------------------------------------------------------------------------------

    def _abandon(self) -> None:
        """Has all trials save and end, and waits for them."""
        for running in self._busy.values():
            running.launch.stop("interrupted")
        for running in self._busy.values():
            while running.launch.poll() is None:
                time.sleep(POLL_S)
            running.claim.lock.release()

    @contextmanager
    def _listening(self) -> Generator[None]:
        """Notes signals while a block runs."""

        def note(number: int, _frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def shown(values: dict[str, object]) -> str:
    """Returns the values of a point as they stand on a command line."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in values.items()
    )
