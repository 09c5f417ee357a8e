"""`theworld-train sweep`: trials of a stage or pipeline at many points."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from theworld_train.cli.arguments import split_overrides
from theworld_train.cli.sweep_views import print_best, print_trials, say
from theworld_train.config import ConfigError, Problem, config_kind, load_sweep_config

if TYPE_CHECKING:
    from theworld_train.config.schema import RunConfig
    from theworld_train.config.sweep import SweepConfig
    from theworld_train.sweep.controller import Fits
    from theworld_train.sweep.opening import Checked
    from theworld_train.sweep.study import Study

Action = Literal["run", "resume", "status", "best", "export", "trial"]


def sweep(
    action: Annotated[Action, typer.Argument(help="What to do.")],
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="SWEEP|DIR [KEY=VALUE ...]",
            help="A sweep's file, or for resume, status and best its directory; and keys to override.",
        ),
    ],
    worker: Annotated[
        bool, typer.Option("--worker", help="For run and resume: one trial at a time, on all GPUs that this job sees.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For status and best: print JSON.")] = False,
    values: Annotated[
        str | None, typer.Option("--values", metavar="JSON", help="For trial: the values, by dotted key.")
    ] = None,
) -> None:
    """Run, follow and export sweeps: trials of one stage or pipeline that differ in some keys.

    `run` begins a sweep, or goes on with it; `resume` goes on as its directory has frozen it. Both take another number
    of trials. `status` lists the trials, `best` shows the one that won. `export` prints a definition for `wandb sweep`,
    whose agents call `trial`: one launch with the values that they give. docs/sweeps.md says more.

    Exit codes: 0 all trials have ended, 1 and none is complete, 75 or 130 stopped by a signal (run it again to go on).

    Example:
        theworld-train sweep run configs/sweeps/quickstart.yaml workers.count=2
        theworld-train sweep status runs/sweeps/quickstart
        theworld-train sweep resume runs/sweeps/quickstart trials=20
    """
    paths, overrides = split_overrides(arguments)
    if len(paths) != 1:
        raise ConfigError(f"sweep {action} takes one sweep, got {len(paths)}")
    _check_options(action, {"--worker": worker, "--json": as_json, "--values": values is not None})
    path = Path(paths[0])
    if action not in ("export", "trial"):
        _check_optuna()
    if action in ("run", "resume"):
        _run(path, overrides, resume=action == "resume", worker=worker)
    elif action == "trial":
        _trial(path, overrides, values)
    elif action == "export":
        _export(path, overrides)
    else:
        _show(path, overrides, best=action == "best", as_json=as_json)


#: Which actions an option goes with.
_GOES_WITH: dict[str, tuple[Action, ...]] = {
    "--worker": ("run", "resume"),
    "--json": ("status", "best"),
    "--values": ("trial",),
}


def _check_options(action: Action, given: dict[str, bool]) -> None:
    wrong = [
        Problem(f"goes with {' and '.join(_GOES_WITH[option])}, not with {action}", key=option)
        for option, is_given in given.items()
        if is_given and action not in _GOES_WITH[option]
    ]
    if action == "trial" and not given["--values"]:
        wrong.append(Problem("is needed for trial", key="--values"))
    if wrong:
        raise ConfigError(wrong)


def _check_optuna() -> None:
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        hint = "pip install 'theworld-train[sweep]'"
        raise ConfigError(Problem("sweeps need the package 'optuna', which is not installed", hint=hint))


# -- running ----------------------------------------------------------------------------------------------------------


def _run(path: Path, overrides: Sequence[str], *, resume: bool, worker: bool) -> None:
    """Begins a sweep or goes on with it, and shows what it has come to."""
    from theworld_train.sweep.controller import Controller, only_worker, workers_of
    from theworld_train.sweep.summary import counts

    found = _frozen(path, overrides, launches=True) if resume else _begun(path, overrides)
    if worker:
        _check_shared(found.sweep)
    if resume:
        _check_at_hand(found.target.resolve({}, found.sweep.name, str(path), str(path)).runs, str(path))
        _check_metric_kind(found, str(path))
    settings = found.sweep.workers
    workers = [only_worker(settings)] if worker else workers_of(settings)
    study = _study(found)
    controller = Controller(found.sweep, study, found.target, workers, say, _fits(found.sweep, path))
    stopped = controller.run()
    summary = controller.summary()
    say(f"{found.sweep.name}: {counts(summary['trials'])} of {found.wanted} trials in {found.directory}")
    if stopped is not None:
        say("stopped by a signal; the same command goes on from there")
        raise typer.Exit(128 + stopped if stopped == signal.SIGINT else _saved_and_stopped())
    states = {trial["state"] for trial in summary["trials"]}
    if "interrupted" in states:
        say("some trials were stopped by a signal; the same command goes on with them")
        raise typer.Exit(_saved_and_stopped())
    if summary["best"] is None:
        if "running" in states:  # other workers have them
            return
        typer.echo("error: no trial is complete", err=True)
        raise typer.Exit(1)
    print_best(found, summary)


def _saved_and_stopped() -> int:
    from theworld_train.train.stopping import SAVED_AND_STOPPED

    return SAVED_AND_STOPPED


def _begun(path: Path, overrides: Sequence[str]) -> Checked:
    """Loads a sweep's file, makes sure that what it needs is on this machine, and freezes it."""
    from theworld_train.sweep.opening import begin, checked

    sweep = _loaded(path, overrides)
    with checked(sweep, str(path)) as (found, base):
        _check_at_hand(base.runs, str(path))
        _check_metric_kind(found, str(path))
    return begin(sweep, str(path))


def _frozen(path: Path, overrides: Sequence[str], *, launches: bool) -> Checked:
    """Opens the sweep of a directory, or of the file that says which directory it is."""
    from theworld_train.sweep.opening import go_on

    if path.is_file():
        path = Path(_loaded(path, ()).output_dir)
    return go_on(path, overrides, launches=launches)


def _loaded(path: Path, overrides: Sequence[str]) -> SweepConfig:
    if path.is_dir():
        hint = f"theworld-train sweep resume {path}"
        raise ConfigError(Problem("is a directory, expected a sweep's file", source=str(path), hint=hint))
    kind = config_kind(path)
    if kind != "sweep":
        hint = f"theworld-train {'run' if kind == 'pipeline' else 'train'} {path}"
        raise ConfigError(Problem("has no space, so it is no sweep", source=str(path), hint=hint))
    return load_sweep_config(path, overrides)


def _check_at_hand(runs: Sequence[RunConfig], source: str) -> None:
    from theworld_train import hub

    lock = hub.read_lock(hub.LOCK_FILE)
    absent = [problem for run in runs for problem in hub.ensure_local(run, lock, source)]
    if absent:
        raise ConfigError(list(dict.fromkeys(absent)))


def _check_metric_kind(found: Checked, source: str) -> None:
    """Refuses a metric of a kind of question that no held-out sample is of, unless what is measured is varied."""
    from theworld_train.config.gates import kind_of

    varies = any(key.split(".")[0] in ("data", "evaluation") for key in found.varied)
    if kind_of(found.sweep.metric) is None or varies:
        return
    from theworld_train.cli.ranks import offline

    offline()
    from theworld_train.assemble.inputs import check_kinds
    from theworld_train.data import open_source

    assert found.run.data.eval is not None
    held_out = open_source(found.run.data.eval, found.run.data.world)
    check_kinds(found.run, held_out, (found.sweep.metric,), key="metric", source=source)


def _check_shared(sweep: SweepConfig) -> None:
    """Refuses a file of SQLite for the tasks of a job array: it may be damaged where several machines write to it."""
    import os

    if sweep.storage == "sqlite" and "SLURM_ARRAY_TASK_ID" in os.environ:
        message = "is not safe where the tasks of a job array run on several machines"
        raise ConfigError(Problem(message, key="storage", value="sqlite", hint="storage=journal, or a database's URL"))


def _study(found: Checked) -> Study:
    from theworld_train.sweep.study import Study

    return Study(found.sweep, found.directory, found.axes, found.wanted, found.run)


def _fits(sweep: SweepConfig, path: Path) -> Fits | None:
    """Returns what asks the plan whether a run can fit, if the sweep says what it has to fit."""
    from theworld_train.accounting.gpus import gpu_spec

    spec = gpu_spec(sweep.gpu, source=str(path), key="gpu") if sweep.gpu is not None else None
    memory = sweep.memory_gib
    if spec is None and memory is None:
        return None

    def fits(run: RunConfig, processes: int) -> str | None:
        from theworld_train.cli.ranks import offline
        from theworld_train.cli.strategy import strategies_of

        offline()
        from theworld_train.plan.choice import gpu_of_memory, why_not

        gpu = spec if spec is not None else gpu_of_memory(round((memory or 0) * 2**30))
        strategy = run.runtime.strategy
        able = strategies_of(run) if strategy == "auto" else (strategy,)
        # A single process holds everything, whatever the strategy.
        return why_not(run, able[:1] if processes == 1 else able, processes, gpu)

    return fits


# -- looking ----------------------------------------------------------------------------------------------------------


def _show(path: Path, overrides: Sequence[str], *, best: bool, as_json: bool) -> None:
    """Prints the trials of a sweep, or the best of them."""
    from theworld_train.sweep.summary import summary_of

    if overrides:
        raise ConfigError(Problem("takes no overrides", key="status" if not best else "best", value=overrides[0]))
    found = _frozen(path, (), launches=False)
    summary = summary_of(found.sweep, _study(found))
    if best and summary["best"] is None:
        raise ConfigError(Problem("no trial is complete yet", source=str(found.directory)))
    if as_json:
        typer.echo(json.dumps(summary["trials"][summary["best"]] if best else summary, indent=1))
    elif best:
        print_best(found, summary)
    else:
        print_trials(found, summary)


# -- wandb ------------------------------------------------------------------------------------------------------------


def _export(path: Path, overrides: Sequence[str]) -> None:
    """Prints the definition of a sweep for `wandb sweep`."""
    from theworld_train.sweep.opening import checked
    from theworld_train.sweep.wandb_trials import definition

    if overrides:
        # The agents read the file, and would know nothing of them.
        raise ConfigError(Problem("takes no overrides: state them in the file", key="export", value=overrides[0]))
    with checked(_loaded(path, ()), str(path)) as (found, _):
        typer.echo(definition(found, str(path)), nl=False)


def _trial(path: Path, overrides: Sequence[str], values: str | None) -> None:
    """Runs one launch with given values, in this process's place."""
    import os

    from theworld_train.sweep.controller import only_worker, training_command
    from theworld_train.sweep.opening import checked
    from theworld_train.sweep.wandb_trials import prepare_trial

    assert values is not None
    with checked(_loaded(path, overrides), str(path)) as (found, base):
        _check_at_hand(base.runs, str(path))
        config = prepare_trial(found, values)
    command = training_command(found.sweep, config, only_worker(found.sweep.workers).processes)
    say(" ".join(command))
    os.execvp(command[0], command)
