"""Fail when Accelerate moves a seam that the process group is built on, or passes ranks what we do not know of."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
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
        (Accelerator.__init__, "cpu mixed_precision gradient_accumulation_steps log_with project_dir kwargs_handlers"),
        (Accelerator.prepare_model, "model"),
        (closure(Accelerator.init_trackers), "project_name config init_kwargs"),
        (closure(Accelerator.log), "values step"),
        (Accelerator.end_training, ""),
        (InitProcessGroupKwargs.__init__, "backend timeout"),
        (DistributedDataParallelKwargs.__init__, "gradient_as_bucket_view"),
    ],
)
def test_what_we_call_takes_what_we_pass(function: Any, names: str):
    assert set(names.split()) <= inspect.signature(function).parameters.keys()


def test_ending_destroys_the_group_and_finishes_trackers():
    source = inspect.getsource(Accelerator.end_training)
    assert "tracker.finish()" in source
    assert "destroy_process_group" in source


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
