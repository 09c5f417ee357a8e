"""Fail when Accelerate moves a seam that the process group is built on, or passes ranks what we do not know of."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DistributedDataParallelKwargs
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from theworld_train.train.accelerate_settings import PREFIXES

FILES = sorted((Path(__file__).parents[2] / "launch/accelerate").glob("*.yaml"))
#: What `accelerate launch` sets besides engines' settings: names of processes, and what is no engine's matter.
OTHERS = {
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_USE_CPU",
    "FORK_LAUNCHED",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
}


def closure(function: Any) -> Any:
    """Returns the function that Accelerate has wrapped, so that the main rank alone runs it."""
    return inspect.getclosurevars(function).nonlocals["function"]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (Accelerator.__init__, "cpu mixed_precision gradient_accumulation_steps kwargs_handlers"),
        (Accelerator.prepare_model, "model"),
        (LOGGER_TYPE_TO_CLASS["tensorboard"].__init__, "run_name logging_dir kwargs"),
        (LOGGER_TYPE_TO_CLASS["wandb"].__init__, "run_name kwargs"),
        (LOGGER_TYPE_TO_CLASS["trackio"].__init__, "run_name kwargs"),
        (LOGGER_TYPE_TO_CLASS["mlflow"].__init__, "experiment_name run_id run_name"),
        (Accelerator.end_training, ""),
        (InitProcessGroupKwargs.__init__, "backend timeout"),
        (DistributedDataParallelKwargs.__init__, "gradient_as_bucket_view"),
    ],
)
def test_what_we_call_takes_what_we_pass(function: Any, names: str):
    assert set(names.split()) <= inspect.signature(function).parameters.keys()


def test_ending_destroys_the_group():
    assert "destroy_process_group" in inspect.getsource(Accelerator.end_training)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_trackers_are_started_told_and_ended_in_the_same_way(name: str):
    tracker = LOGGER_TYPE_TO_CLASS[name]
    assert {"values", "step"} <= inspect.signature(closure(tracker.log)).parameters.keys()
    assert {"values"} <= inspect.signature(closure(tracker.store_init_configuration)).parameters.keys()
    for method in (tracker.start, tracker.finish):
        assert set(inspect.signature(closure(method)).parameters) == {"self"}


def test_no_engine_is_made_where_none_is_asked_for():
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    assert accelerator.trackers == []
    assert (accelerator.num_processes, accelerator.process_index, accelerator.is_main_process) == (1, 0, True)
    assert accelerator.device.type == "cpu"
    assert accelerator.distributed_type == "NO"


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_variable_of_a_launch_is_known(file: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith(PREFIXES)]:
        monkeypatch.delenv(name)
    words = ["--config_file", str(file), "--main_process_port", "0", "-m", "theworld_train", "train", "c"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(args)[1]
    else:
        environment = prepare_multi_gpu_env(args)
    added = {name for name, value in environment.items() if os.environ.get(name) != value}
    unknown = {name for name in added - OTHERS if not name.startswith(PREFIXES)}
    assert not unknown, "an engine may be asked for by these, which the trainer neither compares nor takes out"
    assert [name for name in added if name.startswith(PREFIXES)], "or the prefixes have changed"
