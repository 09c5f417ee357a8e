"""The study of a sweep in Optuna: which trials there are, where their points come from, and what they have come to."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, GridSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from theworld_train.config.credentials import looks_secret
from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.schema import RunConfig
from theworld_train.config.sweep import SweepConfig
from theworld_train.sweep.launching import State
from theworld_train.sweep.lock import TrialLock, is_held, is_orphan, sweep_lock, take
from theworld_train.sweep.metric import report_interval
from theworld_train.sweep.space import Axis
from theworld_train.sweep.target import STUDY_DB, STUDY_JOURNAL, TRIALS

SQLITE, JOURNAL, ENVIRONMENT = "sqlite", "journal", "env:"
#: Seconds that one process waits for another's write to SQLite.
SQLITE_PATIENCE_S = 60

#: Attributes of a trial in the study.
STATE, REASON, EXIT_CODE, LOG_TAIL, LAUNCHES = "state", "reason", "exit_code", "log_tail", "launches"
#: Attribute of a study: the directory of its sweep.
DIRECTORY = "directory"

#: What Optuna is told. It keeps away from points that are pruned without a value, and learns nothing from failures.
TOLD: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "does_not_fit": TrialState.PRUNED,
    "out_of_memory": TrialState.PRUNED,
    "timed_out": TrialState.FAIL,
    "invalid": TrialState.FAIL,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Claim:
    """A trial that this process has taken.

    Attributes:
        trial: The trial, its point drawn.
        lock: Held until the trial is given back or has ended.
        is_new: Whether nobody has looked after it before.
    """

    trial: Trial
    lock: TrialLock
    is_new: bool


@dataclass(frozen=True)
class Orphan:
    """A trial whose process has outlived its controller, and is about to end."""

    number: int


class Study:
    """The trials of one sweep."""

    def __init__(self, sweep: SweepConfig, directory: Path, axes: Sequence[Axis], wanted: int, run: RunConfig) -> None:
        """Opens the study, or begins it.

        Args:
            sweep: The sweep.
            directory: Its directory, which exists.
            axes: What is varied.
            wanted: Number of trials.
            run: The run config that the metric belongs to.

        Raises:
            ConfigError: If the storage cannot be reached, or holds another sweep of this name.
        """
        self.directory = directory
        self.axes = {axis.key: axis for axis in axes}
        self.wanted = wanted
        self._sweep = sweep
        #: The number of complete trials, and the importance that they give: it takes a second.
        self._importance: tuple[int, dict[str, float]] = (0, {})
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = open_storage(sweep.storage, directory)
        with sweep_lock(directory):
            self._study = optuna.create_study(
                storage=storage,
                study_name=sweep.name,
                direction=sweep.direction,
                pruner=_pruner(sweep, run),
                load_if_exists=True,
            )
            self._check_directory()

    # -- taking trials ------------------------------------------------------------------------------------------------

    def claim(self, left: Collection[int] = ()) -> Claim | Orphan | None:
        """Takes an unfinished trial that nobody looks after, or else a new one.

        Args:
            left: Trials that are left to others.

        Returns:
            The trial; or one whose process has yet to end; or None, if there is nothing left to take.
        """
        with sweep_lock(self.directory):
            trials = self.trials()
            orphan: Orphan | None = None
            running = [trial for trial in trials if trial.state == TrialState.RUNNING]
            for frozen in (trial for trial in running if trial.number not in left):
                path = self.path_of(frozen.number)
                lock = take(path)
                if lock is not None:
                    return Claim(self._go_on(frozen), lock, is_new=False)
                if is_orphan(path):
                    orphan = orphan or Orphan(frozen.number)
            if orphan is not None or len(trials) >= self.wanted:
                return orphan
            self._study.sampler = self._sampler(len(trials))
            trial = self._study.ask(self._distributions())
            lock = take(self.path_of(trial.number))
            assert lock is not None, f"trial {trial.number} is new, but somebody holds it"
            return Claim(trial, lock, is_new=True)

    def _go_on(self, frozen: FrozenTrial) -> Trial:
        """Returns a trial of a process that has gone; what it had not drawn yet is drawn now, as it would have been."""
        self._study.sampler = self._sampler(frozen.number)
        trial = Trial(self._study, frozen._trial_id)
        for axis in self.axes.values():
            _draw(trial, axis)
        return trial

    def _sampler(self, number: int) -> BaseSampler:
        """Returns the sampler of one trial: what it draws depends on its number, not on which process draws."""
        seed = int(np.random.SeedSequence([self._sweep.seed, number]).generate_state(1)[0])
        if self._sweep.search == "grid":
            return _Grid({axis.key: axis.labels for axis in self.axes.values()}, seed=self._sweep.seed)
        if self._sweep.search == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=self._sweep.startup_trials)

    def _distributions(self) -> dict[str, BaseDistribution]:
        return {key: _distribution(axis) for key, axis in self.axes.items()}

    # -- what trials are ----------------------------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Returns all trials by number."""
        return self._study.get_trials(deepcopy=False)

    def path_of(self, number: int) -> Path:
        """Returns a trial's directory."""
        return self.directory / TRIALS / f"{number:04d}"

    def values_of(self, parameters: Mapping[str, Any]) -> dict[str, object]:
        """Returns the values of what Optuna has drawn, by dotted key."""
        return {key: self.axes[key].value_of(drawn) for key, drawn in parameters.items()}

    def state_of(self, trial: FrozenTrial) -> State:
        """Returns how a trial stands."""
        if trial.state.is_finished():
            known: State = trial.user_attrs.get(STATE, "complete" if trial.state == TrialState.COMPLETE else "failed")
            return known
        return "running" if is_held(self.path_of(trial.number)) else "interrupted"

    def best(self) -> FrozenTrial | None:
        """Returns the complete trial with the best value."""
        complete = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        sign = 1 if self._sweep.direction == "minimize" else -1
        return min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)

    def importance(self) -> dict[str, float]:
        """Returns each key's share of what the values differ by; nothing while fewer than four trials are complete."""
        complete = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
            return {}
        if len(complete) != self._importance[0]:
            from optuna.importance import FanovaImportanceEvaluator, get_param_importances

            shares = get_param_importances(self._study, evaluator=FanovaImportanceEvaluator(seed=0))
            self._importance = len(complete), {key: float(share) for key, share in shares.items()}
        return self._importance[1]

    # -- what happens to them -----------------------------------------------------------------------------------------

    def reported(self, trial: Trial) -> list[int]:
        """Returns the steps whose values a trial has reported, on earlier launches too."""
        return sorted(self.trials()[trial.number].intermediate_values)

    def note(self, trial: Trial, attributes: Mapping[str, object]) -> None:
        """Keeps attributes of a trial."""
        for name, value in attributes.items():
            trial.set_user_attr(name, value)

    def finish(self, trial: Trial, state: State, attributes: Mapping[str, object], value: float | None = None) -> None:
        """Ends a trial. Its state is kept before Optuna is told, so that a kill in between loses nothing."""
        self.note(trial, {**attributes, STATE: state})
        self._study.tell(trial.number, value if state == "complete" else None, TOLD[state])

    def _check_directory(self) -> None:
        """Makes sure that the storage's study is the one of this directory."""
        if (found := self._study.direction.name.lower()) != self._sweep.direction:
            message, hint = f"the storage holds a sweep of this name already, which {found}s", "choose another name"
            raise ConfigError(Problem(message, key="name", value=self._sweep.name, hint=hint))
        if self._sweep.storage in (SQLITE, JOURNAL):
            return  # it lies in the directory, and moves with it
        mine = str(self.directory.resolve())
        theirs = self._study.user_attrs.get(DIRECTORY)
        if theirs is None:
            self._study.set_user_attr(DIRECTORY, mine)
        elif theirs != mine:
            message = f"the storage holds a sweep of this name already, of {theirs}"
            hint = "give this one another name, or go on in that directory"
            raise ConfigError(Problem(message, key="name", value=self._sweep.name, hint=hint))
        lost = [trial.number for trial in self.trials() if not self.path_of(trial.number).is_dir()]
        # The newest one may lack its directory, if its process was killed before it had made it.
        if len(lost) > 1:
            message = f"the storage holds {len(lost)} trials whose directories are not in {self.directory / TRIALS}"
            raise ConfigError(Problem(message, key="name", value=self._sweep.name, hint="give the sweep another name"))


class _Grid(GridSampler):
    """Optuna's grid, which would stop the study after its last point; here trials are counted."""

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Does nothing."""


def _draw(trial: Trial, axis: Axis) -> None:
    """Has a trial draw a value of a key; one that it has drawn already stays."""
    if axis.choices is not None:
        trial.suggest_categorical(axis.key, axis.labels)
    elif axis.whole:
        trial.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    else:
        trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log, step=axis.step)


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.choices is not None:
        return CategoricalDistribution(axis.labels)
    if axis.whole:
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    return FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def _pruner(sweep: SweepConfig, run: RunConfig) -> BasePruner:
    if sweep.pruner == "median":
        return MedianPruner(sweep.startup_trials, sweep.warmup_steps)
    if sweep.pruner == "none":
        return NopPruner()
    least = run.evaluation.every_steps if sweep.metric.startswith("eval/") else report_interval(sweep.metric, run)
    return HyperbandPruner(min_resource=least or 1, max_resource=run.training.max_steps or "auto")


# -- the storage ------------------------------------------------------------------------------------------------------


def open_storage(storage: str, directory: Path) -> BaseStorage:
    """Opens what a sweep's `storage` names.

    Raises:
        ConfigError: If it names nothing, or cannot be reached; a password in a URL is not shown.
    """
    if storage == JOURNAL:
        return JournalStorage(JournalFileBackend(str(directory / STUDY_JOURNAL)))
    if storage == SQLITE:
        url = f"sqlite:///{directory / STUDY_DB}"
    elif storage.startswith(ENVIRONMENT):
        name = storage.removeprefix(ENVIRONMENT)
        url = os.environ.get(name, "")
        if not url:
            raise ConfigError(Problem(f"the environment has no {name}", key="storage", value=storage))
    else:
        url = storage
    if "://" not in url:
        hint = did_you_mean(url, (SQLITE, JOURNAL)) if url == storage else None
        expected = "expected sqlite, journal, env:NAME or a URL such as postgresql://host/database"
        raise ConfigError(Problem(expected, key="storage", value=storage, hint=hint))
    return _database(url, storage)


def _database(url: str, storage: str) -> BaseStorage:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    shown = storage.partition("?")[0]
    options = {"connect_args": {"timeout": SQLITE_PATIENCE_S}} if url.startswith("sqlite") else {}
    try:
        parsed = make_url(url)
        if not storage.startswith(ENVIRONMENT):
            shown = parsed.set(query={}).render_as_string(hide_password=True)
        return RDBStorage(url, engine_kwargs=options)
    except ArgumentError:
        raise ConfigError(Problem("is no URL of a database", key="storage", value=shown)) from None
    except ImportError as error:
        cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error
        driver = cause.name or "of its driver"
        message = f"needs the package {driver}, which is not installed"
        raise ConfigError(Problem(message, key="storage", value=shown, hint=f"pip install {driver}")) from None
    except (SQLAlchemyError, RuntimeError, ValueError) as error:
        # The drivers' own words; SQLAlchemy's further lines quote the statement.
        said = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        hidden = said[0]
        stated = (
            value for key, values in parsed.normalized_query.items() if looks_secret(key, None) for value in values
        )
        for secret in filter(None, (parsed.password, *stated)):
            hidden = hidden.replace(str(secret), "***")
        raise ConfigError(Problem(f"cannot be reached: {hidden}", key="storage", value=shown)) from None
