"""From paths to a report: finds out what they are, and reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.report.blocks import Report
from theworld_train.report.comparison import comparison_report
from theworld_train.report.evaluation import Pictures, answers, held_out
from theworld_train.report.pipeline import JOURNAL_FILE, SUMMARY_FILE, is_pipeline, pipeline_report, read_pipeline
from theworld_train.report.run import CONFIG_FILE, METRICS_FILE, RunRecord, is_run, read_run
from theworld_train.report.run_sections import curves, describe, environment, incidents, ledger, overview, speed, tokens
from theworld_train.report.sweep import SWEEP_FILE, is_sweep, read_sweep, sweep_report


def make_report(paths: Sequence[Path], pictures: Pictures | None) -> Report:
    """Returns the report on a run, a pipeline or a sweep, or the comparison of several runs.

    Args:
        paths: One directory, or those of several runs.
        pictures: Finds the media of sample answers; None to do without.

    Raises:
        ConfigError: If a path is none of the three, or several are not all runs.
    """
    problems = [problem for path in paths for problem in _problem(path, alone=len(paths) == 1)]
    if problems:
        raise ConfigError(problems)
    if len(paths) > 1:
        return comparison_report([read_run(path) for path in paths])
    (path,) = paths
    if is_sweep(path):
        return sweep_report(read_sweep(path))
    if is_pipeline(path):
        return pipeline_report(read_pipeline(path), pictures)
    return run_report(read_run(path), pictures)


def run_report(run: RunRecord, pictures: Pictures | None) -> Report:
    """Returns the report on one run."""
    sections = [
        overview(run),
        curves(run),
        held_out(run),
        answers(run, pictures),
        speed(run),
        tokens(run),
        ledger(run),
        incidents(run),
        environment(run),
    ]
    return Report("run", run.name, f"Run, {describe(run)}.", [section for section in sections if section is not None])


def _problem(path: Path, *, alone: bool) -> list[Problem]:
    """Says why a path cannot be reported on, if it cannot."""
    if not path.exists():
        return [Problem("there is no such directory", source=str(path))]
    if not path.is_dir():
        return [
            Problem("is a file; a report is made of the directory of a run, a pipeline or a sweep", source=str(path))
        ]
    if is_run(path.parent) and path.name.startswith("step-"):
        return [Problem("is a checkpoint; a report is made of its run", source=str(path), hint=f"try {path.parent}")]
    if is_sweep(path) or is_pipeline(path):
        kind = "sweep" if is_sweep(path) else "pipeline"
        return [] if alone else [Problem(f"is a {kind}; several runs can be compared, not {kind}s", source=str(path))]
    if is_run(path):
        return []
    hint = _found_below(path)
    looked = f"{METRICS_FILE} or {CONFIG_FILE} (run), {JOURNAL_FILE} or {SUMMARY_FILE} (pipeline), {SWEEP_FILE} (sweep)"
    return [
        Problem(f"is neither a run, a pipeline nor a sweep: it holds none of {looked}", source=str(path), hint=hint)
    ]


def _found_below(path: Path) -> str | None:
    """Names the directories below a path that a report could be made of."""
    try:
        below = [
            each
            for each in sorted(path.iterdir())
            if each.is_dir() and (is_run(each) or is_pipeline(each) or is_sweep(each))
        ]
    except OSError:
        return None
    shown = ", ".join(str(each) for each in below[:3])
    return f"it holds {shown}{' and others' if len(below) > 3 else ''}" if below else None
