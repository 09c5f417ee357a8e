"""Begins a sweep or goes on with one: everything is checked first, then frozen in its directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from theworld_train.accounting.gpus import gpu_spec
from theworld_train.config import dump_config, load_sweep_config
from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.layers import Overrides
from theworld_train.config.reading import read_file
from theworld_train.config.schema import RunConfig
from theworld_train.config.sweep import SweepConfig
from theworld_train.sweep.lock import sweep_lock
from theworld_train.sweep.metric import metric_problem
from theworld_train.sweep.space import Axis, axes_of, check_points, grid_size
from theworld_train.sweep.target import (
    BASE,
    STAGES,
    STUDY_DB,
    STUDY_JOURNAL,
    SWEEP_FILE,
    TRIALS,
    Resolved,
    Target,
    resolve_base,
    target_in,
)

#: Keys that may change while a sweep goes on; what is varied counts by what it resolves to.
MAY_CHANGE = ("trials", "workers", "timeout_s", "launcher", "gpu", "memory_gib")
#: What there is once a sweep has trials, or a study in its directory; until then all of it may change.
BEGUN = (TRIALS, STUDY_DB, STUDY_JOURNAL)
_RESOLVED_ELSEWHERE = ("config", "pipeline", "overrides")


@dataclass(frozen=True)
class Checked:
    """A sweep in which nothing has been found wrong.

    Attributes:
        sweep: The sweep.
        target: What is varied, resolved.
        axes: The keys that are varied.
        wanted: Number of trials.
        run: The run config that the metric belongs to.
        varied: Dotted keys of that run that are varied.
    """

    sweep: SweepConfig
    target: Target
    axes: tuple[Axis, ...]
    wanted: int
    run: RunConfig
    varied: tuple[str, ...]

    @property
    def directory(self) -> Path:
        """The sweep's directory."""
        return Path(self.sweep.output_dir)


@contextmanager
def checked(sweep: SweepConfig, source: str) -> Generator[tuple[Checked, Resolved]]:
    """Checks a sweep and all that it names, without writing anything that stays.

    Args:
        sweep: The sweep.
        source: Its file, for problems.

    Returns:
        The sweep, whose target is resolved as long as the block runs, and what all trials have in common.

    Raises:
        ConfigError: With what is wrong.
    """
    base = resolve_base(sweep, source)
    with tempfile.TemporaryDirectory(prefix="theworld-sweep-") as directory:
        base.write(Path(directory))
        found = _check(sweep, target_in(Path(directory), sweep.kind), base.runs, source)
        _check_trials(found, source)
        yield found, base


def _check(sweep: SweepConfig, target: Target, runs: Sequence[RunConfig], source: str) -> Checked:
    """Checks the space and the metric of a sweep against what it varies."""
    if sweep.gpu is not None:
        gpu_spec(sweep.gpu, source=source, key="gpu")
    axes = axes_of(sweep, target, source)
    run, problem = runs[-1], None
    if sweep.stage is not None:
        names = [config.name for config in runs]
        if sweep.stage not in names:
            hint = did_you_mean(sweep.stage, names)
            raise ConfigError(Problem("no such stage", source=source, key="stage", value=sweep.stage, hint=hint))
        run = runs[names.index(sweep.stage)]
    stage = None if target.stages is None else run.name
    located = [target.locate(axis.key) for axis in axes]
    varied = tuple(key for of, key in located if of == stage)
    problem = metric_problem(sweep.metric, run, varied)
    wanted = sweep.trials
    if sweep.search == "grid":
        points = grid_size(axes)
        wanted = points if wanted is None else wanted
        if wanted > points:
            problem = problem or Problem(f"the grid has {points} points", key="trials", value=wanted)
    if problem is not None:
        raise ConfigError(replace(problem, source=source))
    assert wanted is not None
    return Checked(sweep, target, axes, wanted, run, varied)


def _check_trials(found: Checked, source: str) -> None:
    """Checks that the trials of a sweep can be launched here, and that its points make configs."""
    launcher = found.sweep.launcher
    if launcher and shutil.which(launcher[0]) is None:
        raise ConfigError(Problem("no such program", source=source, key="launcher", value=launcher[0]))
    check_points(found.axes, found.target, source)


def begin(sweep: SweepConfig, source: str) -> Checked:
    """Freezes a sweep in its directory, or goes on with it if that has been done.

    Args:
        sweep: The sweep.
        source: Its file, for problems.

    Raises:
        ConfigError: If anything in it is wrong, or the directory holds another sweep.
    """
    directory = Path(sweep.output_dir)
    with checked(sweep, source) as (found, base):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK):
                raise PermissionError(0, "no permission")
        except OSError as error:
            message = f"cannot be written to: {error.strerror}"
            raise ConfigError(Problem(message, source=source, key="output_dir", value=str(directory))) from error
        with sweep_lock(directory):
            if any((directory / name).exists() for name in BEGUN):
                _refuse_changed(sweep, base, directory)
            else:
                base.write(directory / BASE)
            _freeze(sweep, directory)
    return replace(found, target=target_in(directory / BASE, sweep.kind))


def go_on(directory: Path, overrides: Overrides = (), *, launches: bool = True) -> Checked:
    """Returns a sweep as its directory has frozen it.

    Args:
        directory: The sweep's directory.
        overrides: What changes, of the keys that may.
        launches: Whether trials are to be launched, so that there has to be what launches them.

    Raises:
        ConfigError: If the directory holds no sweep, or an override is wrong or may not be.
    """
    path = directory / SWEEP_FILE
    if not path.is_file():
        hint = "begin one with: theworld-train sweep run SWEEP.yaml"
        raise ConfigError(Problem(f"holds no sweep: there is no {SWEEP_FILE}", source=str(directory), hint=hint))
    sweep = load_sweep_config(path, overrides).model_copy(update={"output_dir": str(directory)})
    frozen = load_sweep_config(path).model_copy(update={"output_dir": str(directory)})
    if different := _different(frozen.model_dump(mode="json"), sweep.model_dump(mode="json"), MAY_CHANGE):
        hint = f"these may change: {', '.join(MAY_CHANGE)}"
        problems = [Problem("cannot change while a sweep goes on", key=key, hint=hint) for key in different]
        raise ConfigError(problems)
    target = target_in(directory / BASE, sweep.kind)
    runs = target.resolve({}, sweep.name, str(directory), str(path)).runs
    found = _check(sweep, target, runs, str(path))
    if launches:
        _check_trials(found, str(path))
    if sweep != frozen:
        with sweep_lock(directory):
            _freeze(sweep, directory)
    return found


def _freeze(sweep: SweepConfig, directory: Path) -> None:
    partial = directory / f".{SWEEP_FILE}.partial"
    partial.write_text(dump_config(sweep))
    partial.replace(directory / SWEEP_FILE)


def _refuse_changed(sweep: SweepConfig, base: Resolved, directory: Path) -> None:
    """Refuses to mix the trials of two sweeps in one directory."""
    frozen = load_sweep_config(directory / SWEEP_FILE)
    ours, theirs = sweep.model_dump(mode="json"), frozen.model_dump(mode="json")
    different = _different(theirs, ours, (*MAY_CHANGE, *_RESOLVED_ELSEWHERE, "output_dir"))
    with tempfile.TemporaryDirectory(prefix="theworld-sweep-") as temporary:
        base.write(Path(temporary))
        for name in sorted(base.files):
            there, now = directory / BASE / name, Path(temporary) / name
            if not there.is_file():
                different.append(f"{STAGES}: {name}")
            else:
                different += _different(_plain(there), _plain(now), ())
    if different:
        message = f"was begun with other values of {', '.join(different[:8])}"
        hint = "go on as it was begun with `sweep resume`, or choose another output_dir and name"
        raise ConfigError(Problem(message, source=str(directory), hint=hint))


def _different(there: Mapping[str, Any], now: Mapping[str, Any], but: Sequence[str]) -> list[str]:
    """Returns the dotted keys whose values differ."""
    found: list[str] = []
    for key in dict.fromkeys([*there, *now]):
        old, new = there.get(key), now.get(key)
        if key in but or old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{key}.{inner}" for inner in _different(old, new, ())]
        else:
            found.append(key)
    return found


def _plain(path: Path) -> dict[str, Any]:
    data = read_file(str(path)).data
    assert isinstance(data, dict)
    return data
