"""A training run, from its config to its result, and its checkpoints opened again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from theworld_train.accounting.ledger import ParameterLedger, lines
from theworld_train.assemble.encoded import check_encoded
from theworld_train.assemble.inputs import EvaluationInputs, Inputs, open_inputs
from theworld_train.assemble.model import ledger_of
from theworld_train.assemble.record import RunDescription, new_launch
from theworld_train.assemble.saver import RunSaver
from theworld_train.assemble.steps import prepare
from theworld_train.checkpoint_files import checkpoints, resolve_checkpoint
from theworld_train.config import dump_config, load_run_config
from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.data import (
    Check,
    EvaluationBatch,
    accumulation_steps,
    evaluation_batches,
)
from theworld_train.encoded_files import EncodedFiles
from theworld_train.train.checkpoint import (
    clear_remains,
    set_damaged_aside,
)
from theworld_train.train.groups import optimizer_class
from theworld_train.train.handoff import Inheritance
from theworld_train.train.ledger import check_expectation
from theworld_train.train.metrics import (
    Forecast,
    MetricsFile,
    ProgressDisplay,
    Resources,
    read_metrics,
    resources_line,
    resources_row,
)
from theworld_train.train.quarantine import QUARANTINE_FILE, Quarantine
from theworld_train.train.resume_rules import check_changes
from theworld_train.train.run_lock import run_lock
from theworld_train.train.runtime import Runtime
from theworld_train.train.stopping import breaking_off
from theworld_train.train.trackers import Trackers
from theworld_train.train.trainer import Trainer, TrainingResult
from theworld_train.train.watchdog import clear_heartbeats

METRICS_FILE = "metrics.jsonl"
RESULT_FILE = "result.json"
CONFIG_FILE = "config.yaml"

#: Plans a run of a config that has taken something; `assemble` stands below the plan and is handed it.
Predict = Callable[[RunConfig, Resources], Forecast]


def starting_checkpoint(config: RunConfig) -> tuple[Path | None, bool]:
    """Returns the checkpoint that a run starts from and whether it continues itself.

    Raises:
        ConfigError: If the run directory holds a run that the config does not continue, or a path is no checkpoint.
    """
    own = checkpoints(Path(config.output_dir))
    if config.resume == "latest" and own:
        return own[-1], True
    if config.resume not in (None, "latest"):
        assert config.resume is not None
        return _own_checkpoint(Path(config.resume), own, config), True
    if own:
        raise ConfigError(
            Problem(
                f"holds a run already, up to {own[-1].name}",
                key="output_dir",
                value=config.output_dir,
                hint="continue it with resume=latest, or choose another output_dir",
            )
        )
    return (resolve_checkpoint(Path(config.init_from)), False) if config.init_from else (None, False)


def _own_checkpoint(path: Path, own: list[Path], config: RunConfig) -> Path:
    """Returns the checkpoint that a run is continued from, which has to be its own newest one.

    Raises:
        ConfigError: If it is another run's, or a later one would be mixed with what follows it.
    """
    checkpoint = resolve_checkpoint(path)
    if not own or checkpoint.resolve() != own[-1].resolve():
        hint = (
            "move the later step-N directories away first"
            if any(checkpoint.resolve() == other.resolve() for other in own)
            else "use init_from for the weights of another run"
        )
        newest = own[-1].name if own else "none"
        raise ConfigError(
            Problem(
                f"a run goes on from its own newest checkpoint, in {config.output_dir}: {newest}",
                key="resume",
                value=config.resume,
                hint=hint,
            )
        )
    return checkpoint


def train(config: RunConfig, console: Console, predict: Predict | None = None) -> TrainingResult:
    """Runs a training run from config to result; every rank of the process group calls it.

    Args:
        config: The run config.
        console: Where the main rank shows its progress.
        predict: Plans a run, to be held against what it has taken.

    Raises:
        ConfigError: If an input is wrong, before any model loads, or if the first step breaks the contract of freezing.
    """
    with ExitStack() as held:
        with Runtime(config) as runtime:
            is_main = runtime.is_main
            runtime.same_everywhere("runtime.strategy", config.runtime.strategy)
            with runtime.agreement():
                inputs = open_inputs(config)
                check_encoded(config, inputs.processor)
                ledger = ledger_of(config)
                check_expectation(ledger, config)
                optimizer_class(config.optimizer.name)  # answers now if its library is missing
                _check_output_dir(config)
            with runtime.agreement():
                if is_main:
                    _take_directory(config, held, console)
                    _check_space(Path(config.output_dir), ledger)
            with runtime.watched(Path(config.output_dir), config.runtime.timeout_s):
                with runtime.agreement():
                    checkpoint, resume = starting_checkpoint(config)
                runtime.same_everywhere("where the run starts", str(checkpoint or "the bases"))
                if checkpoint is not None and resume:
                    with runtime.agreement():
                        check_changes(config, checkpoint)
                trackers = held.enter_context(Trackers(config, partial(_say, console, config.name), main=is_main))
                result, record = _train(config, inputs, checkpoint, resume, runtime, console, trackers)
        if is_main:  # the others have gone: none of them waits for a plan
            _compare(record, result, predict, console, trackers)
        return result


def _compare(
    record: RunDescription, result: TrainingResult, predict: Predict | None, console: Console, trackers: Trackers
) -> None:
    """Writes what the run has taken into its metrics, beside what the plan says; without a plan it stands alone."""
    config, taken, forecast = record.config, result.resources, None
    if taken is None:
        return
    if predict is not None:
        try:
            with breaking_off(result.steps):
                forecast = predict(config, taken)
            said = resources_line(taken, forecast)
        except Exception as error:  # the run is complete, whatever a plan of it meets, a signal too
            said = f"no plan to hold this run against: {type(error).__name__}: {error}"
        _say(console, config.name, said)
    row = resources_row(taken, forecast)
    metrics = MetricsFile(Path(config.output_dir) / METRICS_FILE, result.steps)
    metrics.write("resources", result.steps, row)
    metrics.close()
    record.write(forecast)
    # `time/step_s` is there already, of each step.
    told = {name: float(value) for name, value in row.items() if "/" in name and name != "time/step_s"}
    trackers.log(told, result.steps)


def _say(console: Console, name: str, text: str) -> None:
    console.print(f"{name}: {text}", highlight=False, markup=False, soft_wrap=True)


def _take_directory(config: RunConfig, held: ExitStack, console: Console) -> None:
    """Locks the run directory and tidies what killed runs have left there; the main rank calls it.

    A damaged checkpoint is put aside, so that `resume: latest` goes on from the newest one that is whole.
    """
    directory = Path(config.output_dir)
    held.enter_context(run_lock(directory, config.name))
    clear_remains(directory)
    clear_heartbeats(directory)
    if config.resume == "latest":
        for damage in set_damaged_aside(directory):
            console.print(f"{config.name}: {damage}", highlight=False, markup=False, soft_wrap=True)


def _train(
    config: RunConfig,
    inputs: Inputs,
    checkpoint: Path | None,
    resume: bool,
    runtime: Runtime,
    console: Console,
    trackers: Trackers,
) -> tuple[TrainingResult, RunDescription]:
    accumulation = accumulation_steps(
        config.training.global_batch_size, config.training.micro_batch_size, runtime.world_size
    )
    ready = prepare(config, inputs, checkpoint, runtime, resume=resume)
    inheritance, ledger = ready.loaded.inheritance, ready.ledger
    directory = Path(config.output_dir)
    metrics = progress = None
    if runtime.is_main:
        directory.mkdir(parents=True, exist_ok=True)
        if inheritance.step < ready.max_steps:
            (directory / RESULT_FILE).unlink(missing_ok=True)  # of a shorter run, which is complete no more
        _write_whole(directory / CONFIG_FILE, dump_config(config))
        metrics = MetricsFile(directory / METRICS_FILE, inheritance.step)
        _announce(config, ledger, ready.max_steps, accumulation, runtime, inheritance, console)
        _announce_wrong_rows(config, inputs.check, console)
        _announce_encoded(config, ready.known, console)
        progress = ProgressDisplay(console, config.name, inheritance.step, ready.max_steps)
    record = new_launch(config, ledger, runtime, inheritance.step)
    with runtime.agreement():
        if runtime.is_main:
            ids = trackers.start(record.id, record.trackers, record.settings(), inheritance.step)
            record = replace(record, trackers={**record.trackers, **ids})
            record.write()
    saver = RunSaver(config, inputs, ready.loaded, ledger)
    trainer = Trainer(
        config=config,
        ledger=ledger,
        runtime=runtime,
        stage=ready.stage,
        engine=ready.engine,
        max_steps=ready.max_steps,
        first_step=inheritance.step,
        windows=ready.windows,
        held_out=None if inputs.held_out is None else lambda: held_out_batches(config, ready.inputs, runtime),
        decode=inputs.processor.decode_answer,
        save=saver,
        quarantine=Quarantine(directory / QUARANTINE_FILE if runtime.is_main else None, config.data.max_bad_samples),
        metrics=metrics,
        trackers=trackers,
        progress=progress,
        gates=inheritance.gates,
    )
    try:
        result = trainer.run()
    finally:
        saver.close()
        if progress is not None:
            progress.close()
        if metrics is not None:
            metrics.close()
    if runtime.is_main:
        write_result(directory, ledger, result)
    return result, record


def held_out_batches(
    config: RunConfig, inputs: EvaluationInputs, runtime: Runtime
) -> Generator[EvaluationBatch, None, None]:
    """Returns this rank's share of the held-out samples."""
    assert inputs.held_out is not None
    most = config.evaluation.max_samples
    return evaluation_batches(
        inputs.held_out,
        inputs.collator,
        num_samples=len(inputs.held_out) if most is None else min(most, len(inputs.held_out)),
        rank=runtime.rank,
        world_size=runtime.world_size,
        micro_batch_size=config.evaluation.micro_batch_size or config.training.micro_batch_size,
        num_workers=config.data.num_workers,
        pin_memory=runtime.device.type == "cuda",
    )


def _check_output_dir(config: RunConfig) -> None:
    """Makes sure that the run directory can be written to."""
    directory = Path(config.output_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            Problem(f"cannot be written to: {error.strerror}", key="output_dir", value=config.output_dir)
        ) from error


def _check_space(directory: Path, ledger: ParameterLedger) -> None:
    """Makes sure that a checkpoint fits, now that remains of earlier ones are gone."""
    free = shutil.disk_usage(directory).free
    if ledger.saved_bytes > free:
        message = f"a checkpoint takes {ledger.saved_bytes:,} bytes, but {free:,} are free there"
        hint = "free some, or choose another output_dir"
        raise ConfigError(Problem(message, key="output_dir", value=str(directory), hint=hint))


def _announce(
    config: RunConfig,
    ledger: ParameterLedger,
    steps: int,
    accumulation: int,
    runtime: Runtime,
    inheritance: Inheritance,
    console: Console,
) -> None:
    """Prints what is about to happen: the ledger, the batch equation and where the weights come from."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for line in lines(ledger):
        say(line)
    training = config.training
    say(
        f"{config.name}: {steps} steps of {training.global_batch_size} samples = "
        f"micro-batch {training.micro_batch_size} x {accumulation} accumulated x "
        f"{runtime.world_size} rank(s) on {runtime.device.type}, {config.precision}"
    )
    if inheritance.source is not None:
        verb = f"resumes at step {inheritance.step} from" if inheritance.step else "takes"
        what = "" if inheritance.step else f" {', '.join(inheritance.components)} from"
        say(f"{config.name}: {verb}{what} {inheritance.source}")


def _announce_wrong_rows(config: RunConfig, check: Check, console: Console) -> None:
    """Prints the rows that will be left out, the first of them by file, row and field."""
    if not check.number:
        return
    what = f"{check.number:,} row{'s are' if check.number > 1 else ' is'} wrong, and left out when training meets"
    lines = [f"{config.name}: {what} {'them' if check.number > 1 else 'it'} (data.max_bad_samples)"]
    for line in [*lines, *(f"  {problem}" for problem in check.problems)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _announce_encoded(config: RunConfig, known: Mapping[str, EncodedFiles] | None, console: Console) -> None:
    """Prints what is read of the frozen encoders' work, if any is to be."""
    if known is None:
        return
    held = [f"{len(files):,} entries of {kind}" for kind, files in known.items()]
    said = ", ".join(held) or "nothing, as every encoder trains"
    console.print(
        f"{config.name}: reads {said} from {config.data.encoded}", highlight=False, markup=False, soft_wrap=True
    )


def write_result(directory: Path, ledger: ParameterLedger, result: TrainingResult) -> None:
    """Writes `result.json`, whose presence says that the run is complete."""
    losses = [row["train/loss"] for row in read_metrics(directory / METRICS_FILE, "train")]
    last = checkpoints(directory)
    summary = {
        "steps": result.steps,
        "ended_by": result.ending.by,
        "reason": result.ending.reason,
        "tokens": result.tokens,
        "supervised_tokens": result.supervised_tokens,
        "parameters": ledger.total,
        "trainable": ledger.trainable,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "eval": None if result.evaluation is None else result.evaluation.to_dict(),
        "checkpoint": last[-1].name if last else None,
    }
    _write_whole(directory / RESULT_FILE, json.dumps(summary, indent=1))


def _write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def load_run(checkpoint: Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Path]:
    """Returns the config of the run that wrote a checkpoint, and the checkpoint itself.

    Args:
        checkpoint: A checkpoint, or a run directory, whose newest one is taken.
        overrides: `key=value` texts, as `train` takes them.

    Raises:
        ConfigError: If there is no checkpoint, or an override is wrong.
    """
    path = resolve_checkpoint(checkpoint)
    return load_run_config(path / CONFIG_FILE, overrides), path
