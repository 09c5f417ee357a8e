"""The directory of a profile, which appears when it is complete, and what is written there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.memory.picture import draw
from theworld_train.profiling.rendering import compare, render, render_comparison
from theworld_train.profiling.report import Plan, Planned, describe, describe_memory
from theworld_train.profiling.steps import Schedule, take_profile

REPORT, MEMORY, PICTURE, TRACE, TENSORBOARD = "report", "memory.json", "memory.png", "trace.json.gz", "tensorboard"
COMPARISON = "comparison"


@contextmanager
def new_directory(target: Path, *, force: bool) -> Generator[Path]:
    """Gives a directory to write to, which takes its place under its name once all is written.

    Args:
        target: The directory.
        force: Whether an earlier profile there is replaced.

    Raises:
        ConfigError: If it is there already, or cannot be written to.
    """
    if target.exists():
        is_profile = any((target / f"{name}.json").is_file() for name in (REPORT, COMPARISON))
        if not is_profile:
            raise ConfigError(Problem("exists already and holds no profile", key="--output", value=str(target)))
        if not force:
            hint = "replace it with --force, or name another directory"
            raise ConfigError(Problem("holds a profile already", key="--output", value=str(target), hint=hint))
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            Problem(f"cannot be written to: {error.strerror}", key="--output", value=str(target))
        ) from error
    try:
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def profile_run(config: RunConfig, schedule: Schedule, directory: Path, plan: Plan) -> tuple[str, list[str]]:
    """Profiles a run and writes everything about it.

    Args:
        config: The run config.
        schedule: How many steps are taken in which way.
        directory: Empty.
        plan: Plans the step whose storages are followed.

    Returns:
        The report as Markdown, and what else there is to say.

    Raises:
        ConfigError: If an input is wrong; before any model loads.
    """
    profile = take_profile(config, schedule, directory / TENSORBOARD)
    (trace,) = (directory / TENSORBOARD).iterdir()
    shutil.copyfile(trace, directory / TRACE)
    said: list[str] = []
    planned: Planned | None = None
    try:
        planned = plan(profile)
    except Exception as error:  # what was measured stands, whatever a plan of it meets
        said.append(f"no plan to hold the step against: {type(error).__name__}: {error}")
    report = describe(profile, planned)
    text = render(report)
    _write_json(directory / f"{REPORT}.json", report)
    (directory / f"{REPORT}.md").write_text(text)
    (directory / MEMORY).write_text(json.dumps(describe_memory(profile.memory)) + "\n")
    try:
        where = "the process's tensors" if profile.device == "cpu" else "the GPU"
        (step,) = profile.taken("followed")
        title = f"{config.name}: one optimizer step, {step.samples} samples of up to {step.longest:,} positions"
        draw(directory / PICTURE, profile.memory, 0, title, where)
    except ImportError:
        said.append(f"no {PICTURE}: it needs matplotlib, pip install 'theworld-train[plot]'")
    return text, said


def write_comparison(directory: Path, names: tuple[str, str]) -> str:
    """Compares two profiles of a directory and writes the comparison beside them.

    Args:
        directory: Holds the directories of both.
        names: Their names.

    Returns:
        The table.
    """
    comparison = compare({name: json.loads((directory / name / f"{REPORT}.json").read_text()) for name in names})
    text = render_comparison(comparison)
    _write_json(directory / f"{COMPARISON}.json", comparison)
    (directory / f"{COMPARISON}.md").write_text(text)
    return text


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
