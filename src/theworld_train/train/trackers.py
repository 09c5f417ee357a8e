"""Trackers that a run's metrics go to besides its own file, through Accelerate's classes for them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from theworld_train.config.errors import ConfigError, Problem
from theworld_train.config.schema import RunConfig
from theworld_train.train.stopping import StoppedError

#: What MLflow does not take in the names of metrics and parameters.
_NOT_IN_MLFLOW = re.compile(r"[^\w\-. :/]")


class Trackers:
    """The trackers of a run; on ranks other than the main one there are none.

    As a context it ends them, and marks the run as failed where an error has ended it.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None], *, main: bool) -> None:
        """Starts nothing yet.

        Args:
            config: The run config.
            say: Tells the user of a tracker that has failed.
            main: Whether this is the main rank.
        """
        self._config = config
        self._say = say
        self._names = config.tracking.trackers if main else ()
        self._running: dict[str, Any] = {}
        self._lost: set[str] = set()

    def start(self, run_id: str, known: Mapping[str, str], settings: Mapping[str, Any], step: int) -> dict[str, str]:
        """Starts all of them.

        Args:
            run_id: The run's own id.
            known: Ids that trackers have given the run when it was started first; empty for a new run.
            settings: What is recorded of the run, by dotted key.
            step: Optimizer steps done.

        Returns:
            The ids by which the trackers know the run.

        Raises:
            ConfigError: If one of them cannot be started.
        """
        ids: dict[str, str] = {}
        for name in self._names:
            try:
                tracker, ids[name] = _OPENERS[name](self._config, known.get(name), run_id, settings, step)
                tracker.start()
                self._running[name] = tracker
                if name == "mlflow":
                    ids[name] = tracker.tracker.info.run_id
                if name == "tensorboard" or (name == "mlflow" and name not in known):  # mlflow refuses other values
                    tracker.store_init_configuration({_mlflow_name(key): value for key, value in settings.items()})
            except Exception as error:
                message = f"cannot be started: {type(error).__name__}: {error}"
                raise ConfigError(Problem(message, key="tracking.trackers", value=name)) from error
        return ids

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Sends metrics of a step; a tracker that fails is told of and left out from then on."""
        for name, tracker in self._running.items():
            if name in self._lost:
                continue
            try:
                named = values if name != "mlflow" else {_mlflow_name(key): value for key, value in values.items()}
                tracker.log(dict(named), step=step)
            except Exception as error:  # the run is worth more than its curve, which metrics.jsonl holds too
                self._lost.add(name)
                self._say(f"{name} gets no metrics from step {step} on: {type(error).__name__}: {error}")

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Ends all of them; whatever they say to it, the run is over."""
        failed = error is not None and not isinstance(error, StoppedError)
        for name, tracker in self._running.items():
            with suppress(Exception):
                if failed and name == "wandb":
                    tracker.tracker.finish(exit_code=1)
                elif failed and name == "mlflow":
                    import mlflow

                    mlflow.end_run("FAILED")
                else:
                    tracker.finish()
        self._running.clear()


def _mlflow_name(name: str) -> str:
    """Returns a name as MLflow takes it: in its files `train/loss` cannot be a metric and a folder of others."""
    group, slash, rest = _NOT_IN_MLFLOW.sub("_", name).partition("/")
    return group + slash + rest.replace("/", ".")


def _open_wandb(
    config: RunConfig, known: str | None, run_id: str, settings: Mapping[str, Any], step: int
) -> tuple[Any, str]:
    """Leaves out what wandb finds out by itself, such as command line, output and git remote."""
    import wandb

    own = known or os.environ.get("WANDB_RUN_ID") or run_id  # an agent of wandb names the run itself
    online = config.tracking.wandb_mode == "online"
    quiet = wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        host="",
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    tracker = LOGGER_TYPE_TO_CLASS["wandb"](
        config.tracking.project,
        id=own,
        name=config.name,
        dir=config.output_dir,
        mode=config.tracking.wandb_mode,
        resume="allow" if online else None,  # offline, launches of one id become one run when they are synced
        config=dict(settings),
        settings=quiet,
    )
    return tracker, own


def _open_tensorboard(
    config: RunConfig, known: str | None, run_id: str, settings: Mapping[str, Any], step: int
) -> tuple[Any, str]:
    """Steps that a resumed run takes again replace the earlier ones."""
    again = {} if known is None else {"purge_step": step + 1}
    return LOGGER_TYPE_TO_CLASS["tensorboard"]("tensorboard", config.output_dir, **again), run_id


def _open_mlflow(
    config: RunConfig, known: str | None, run_id: str, settings: Mapping[str, Any], step: int
) -> tuple[Any, str]:
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri((Path(config.output_dir).resolve() / "mlflow").as_uri())
    tracker = LOGGER_TYPE_TO_CLASS["mlflow"](config.tracking.project, run_id=known, run_name=config.name)
    return tracker, known or ""


def _open_trackio(
    config: RunConfig, known: str | None, run_id: str, settings: Mapping[str, Any], step: int
) -> tuple[Any, str]:
    if not any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
        os.environ.setdefault("TRACKIO_DIR", str(Path(config.output_dir).resolve() / "trackio"))
    own = known or f"{config.name}-{run_id}"  # it knows runs by their names alone
    tracker = LOGGER_TYPE_TO_CLASS["trackio"](
        config.tracking.project, name=own, resume="allow", config=dict(settings), embed=False
    )
    return tracker, own


_Opener = Callable[[RunConfig, str | None, str, Mapping[str, Any], int], tuple[Any, str]]
_OPENERS: dict[str, _Opener] = {
    "mlflow": _open_mlflow,
    "tensorboard": _open_tensorboard,
    "trackio": _open_trackio,
    "wandb": _open_wandb,
}
