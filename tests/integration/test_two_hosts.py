"""Two machines train like one: two network namespaces with a cable between them and `accelerate launch` on each."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config import dump_config, parse_run_config
from theworld_train.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 6
FILE = str(ROOT / "launch/accelerate/ddp-multi-node.yaml")


def may_make_namespaces() -> bool:
    """Whether this process may make network namespaces, which takes root and a kernel that lets it."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"theworld-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


@pytest.fixture
def hosts() -> Generator[list[tuple[str, str, str]]]:
    """Two hosts that see each other and nothing else: namespace, network device and address of each."""
    if not may_make_namespaces():
        pytest.skip("needs root, `ip` and the right to make network namespaces")
    names = [f"theworld-{os.getpid()}-{index}" for index in (0, 1)]
    # A device's name has at most 15 characters.
    devices = [f"tw{os.getpid() % 10**7}-{index}" for index in (0, 1)]
    addresses = ["10.231.77.1", "10.231.77.2"]
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        cable = ["ip", "link", "add", devices[0], "netns", names[0], "type", "veth"]
        subprocess.run([*cable, "peer", "name", devices[1], "netns", names[1]], check=True)
        for name, device, address in zip(names, devices, addresses, strict=True):
            inside = ["ip", "-netns", name]
            subprocess.run([*inside, "address", "add", f"{address}/24", "dev", device], check=True)
            for link in (device, "lo"):
                subprocess.run([*inside, "link", "set", link, "up"], check=True)
        yield list(zip(names, devices, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def write_config(path: Path, tiny: TinyCheckpoint) -> None:
    values = {
        "name": path.stem,
        "output_dir": str(path.with_suffix("")),
        "precision": "fp32",
        "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": 32}},
        "trainable": {"world_projector": {}, "multi_modal_projector": {}},
        "data": {
            "train": {"source": "moving_digits", "split": "train", "samples": 32, "frames": 1, "canvas": 32},
            "num_workers": 0,
        },
        "optimizer": {"lr": 1e-3},
        "training": {"max_steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
    }
    path.write_text(dump_config(parse_run_config(values)))


@pytest.mark.distributed
@pytest.mark.slow
def test_two_hosts_train_like_one(hosts: list[tuple[str, str, str]], tiny: TinyCheckpoint, tmp_path: Path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    for path in (one, two):
        write_config(path, tiny)
    commands = [[sys.executable, "-m", "theworld_train", "launch", str(one), "--nproc", "2"]]
    for rank, (name, device, _) in enumerate(hosts):
        # gloo takes the address of the host's name otherwise, which both hosts share here.
        inside = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={device}"]
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", FILE]
        topology = ["--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", hosts[0][2]]
        commands.append([*inside, *launch, *topology, "--module", "theworld_train", "train", str(two)])
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for command in commands
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors.decode()[-4000:]
    finally:
        for process in started:
            process.kill()
    expected, actual = (read_metrics(path.with_suffix("") / "metrics.jsonl", "train") for path in (one, two))
    assert len(expected) == STEPS
    # The same ranks do the same sums over another wire.
    for key in ("loss_hex", "train/grad_norm", "train/supervised_tokens"):
        assert [row[key] for row in actual] == [row[key] for row in expected]
