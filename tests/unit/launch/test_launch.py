"""Protects the torchrun command of a run: its topology, its refusals and the time that a save may take."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from theworld_train.config import ConfigError, RunConfig, load_run_config
from theworld_train.launch import LEAST_GRACE_S, Topology, launch_command, shutdown_grace_s

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "configs/stages/full.yaml")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_run_config(CONFIG)


def parsed(arguments: tuple[str, ...]) -> Any:
    """Returns what torchrun itself makes of its arguments."""
    from torch.distributed.run import parse_args

    return parse_args(list(arguments))


def test_one_machine(config: RunConfig):
    command = launch_command(config, CONFIG, ["seed=1"], Topology(nproc=8))
    torchrun = parsed(command.arguments)
    assert torchrun.standalone
    assert (torchrun.nnodes, torchrun.nproc_per_node) == ("1:1", "8")
    assert (torchrun.module, torchrun.training_script) == (True, "theworld_train")
    assert torchrun.training_script_args == ["train", CONFIG, "seed=1"]
    handled = torchrun.signals_to_handle.split(",")
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(handled)
    assert "SIGHUP" not in handled, "a run under nohup would end with its terminal"
    assert command.environment == {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(shutdown_grace_s(config))}


@pytest.mark.parametrize(("endpoint", "port"), [("n0", 29500), ("n0:1234", 1234)])
def test_machines_with_numbers_meet_at_the_first_one(config: RunConfig, endpoint: str, port: int):
    torchrun = parsed(launch_command(config, CONFIG, [], Topology(4, 2, 1, endpoint)).arguments)
    assert (torchrun.nnodes, torchrun.node_rank, torchrun.rdzv_backend) == ("2", 1, "static")
    assert (torchrun.master_addr, torchrun.master_port) == ("n0", port)


def test_machines_without_numbers_agree_on_them(config: RunConfig):
    torchrun = parsed(launch_command(config, CONFIG, [], Topology(4, 2, None, "n0")).arguments)
    assert (torchrun.nnodes, torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("2", "c10d", "n0:29500")
    assert torchrun.rdzv_id == config.name, "the same on all machines, another one for another run"


@pytest.mark.parametrize(
    ("topology", "keys"),
    [
        (Topology(nproc=0), ["--nproc"]),
        (Topology(nproc=0, nnodes=-1), ["--nproc", "--nnodes"]),
        (Topology(2, 2, 2, "n0"), ["--node-rank"]),
        (Topology(2, 2, -1, "n0"), ["--node-rank"]),
        (Topology(2, 1, 1), ["--node-rank"]),
        (Topology(2, 2), ["--rdzv-endpoint"]),
        (Topology(2, 2, 0, "n0:"), ["--rdzv-endpoint"]),
        (Topology(2, 2, 0, "n0:http"), ["--rdzv-endpoint"]),
        (Topology(2, 2, 0, "n0:70000"), ["--rdzv-endpoint"]),
        (Topology(2, 2, 0, ":29500"), ["--rdzv-endpoint"]),
        (Topology(nproc=7), ["training.global_batch_size"]),
        (Topology(64, 2, 0, "n0"), ["training.global_batch_size"]),
    ],
)
def test_impossible_topology(config: RunConfig, topology: Topology, keys: list[str]):
    with pytest.raises(ConfigError) as error:
        launch_command(config, CONFIG, [], topology)
    assert [problem.key for problem in error.value.problems] == keys


def test_grace_grows_with_what_a_checkpoint_holds(config: RunConfig):
    assert config.expect_trainable == 4_360_304_240
    assert 200 < shutdown_grace_s(config) < 300
    small = load_run_config(ROOT / "configs/stages/projection.yaml")
    assert shutdown_grace_s(small) == LEAST_GRACE_S
    unknown = config.model_copy(update={"expect_trainable": None})
    assert shutdown_grace_s(unknown) >= shutdown_grace_s(config), "the largest that it could be"


def test_given_grace_is_passed_on(config: RunConfig):
    command = launch_command(config, CONFIG, [], Topology(), grace_s=7)
    assert command.environment == {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "7"}


# -- the command line -------------------------------------------------------------------------------------------------


def test_print_writes_a_line_for_a_shell(call):
    code, out, _ = call("launch", CONFIG, "name=a run", "--nproc", "2", "--print")
    assert code == 2, "the name holds a space"
    code, out, _ = call("launch", CONFIG, "output_dir=/tmp/a run", "--nproc", "2", "--print")
    assert code == 0
    words = shlex.split(out)
    assert words[0] == "env"
    assert words[words.index("torchrun") + 1 :] == list(
        launch_command(
            load_run_config(CONFIG), CONFIG, ["output_dir=/tmp/a run", "runtime.strategy=ddp"], Topology(2)
        ).arguments
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CONFIG, "--nproc", "0"), "--nproc: must be at least 1 (got 0)"),
        (
            (CONFIG, "--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "n0"),
            "--node-rank: must be below --nnodes 2",
        ),
        ((CONFIG, "--grace-s", "-1"), "--grace-s: must not be negative"),
        (("nowhere.yaml",), "nowhere.yaml"),
        ((CONFIG, CONFIG), "launch takes one config, got 2"),
        (("seed=1",), "launch takes one config, got 0"),
        ((str(ROOT / "configs/pipelines/quickstart.yaml"),), "theworld-train run"),
        ((CONFIG, "runtime.strategy=zero4"), "runtime.strategy"),
    ],
)
def test_wrong_inputs_start_nothing(call, arguments: tuple[str, ...], message: str):
    code, _, err = call("launch", *arguments)
    assert code == 2
    assert message in err
