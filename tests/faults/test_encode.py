"""A killed `encode` or `rollout` leaves what can be used, and several processes keep what one would."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint, write_run
from theworld_train.config import load_run_config
from theworld_train.encode import encode
from theworld_train.encoded_files import EncodedFiles
from theworld_train.rollout import rollout

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker_encode.py")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the workers have: another number of threads may round otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["encode", "rollout"])
def command(request: pytest.FixtureRequest) -> str:
    """What is run."""
    return str(request.param)


def write_config(tiny: TinyCheckpoint, directory: Path, command: str) -> Path:
    directory.mkdir(exist_ok=True)
    train = {"source": "moving_digits", "split": "train", "samples": 24, "frames": 5, "canvas": 32}
    data = {"train": train, "num_workers": 0, "encoded": str(directory / "encoded")}
    model = {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION}}
    if command == "rollout":
        size = {"height": RESOLUTION, "width": 2 * RESOLUTION, "num_frames": 5}
        rules = {"pipeline": tiny.cosmos, "num_inference_steps": 1, "negative_prompt": "bad", "dtype": "float32"}
        data["world"] = {"frames": "rollout", "steps": 1, "rollout": rules | size}
        model["world"]["max_world_steps"] = 1
        train["samples"] = 6
    return write_run(tiny, directory, steps=12, batch=2, data=data, model=model)


def launch(config: Path, command: str, *, processes: int, dies_after: int = 0) -> subprocess.CompletedProcess[str]:
    arguments = [
        sys.executable,
        *(["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    arguments += [str(WORKER), str(config), str(dies_after), command]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)


def entries(config: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for folder in (config.parent / "encoded").glob("*-*"):
        files = EncodedFiles(folder)
        for digest in files.digests:
            tensor = files.get(digest)
            assert tensor is not None
            found[f"{folder.name}/{digest}"] = tensor
    return found


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert len(ours) > 0
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def work_here(config: Path, command: str) -> int:
    """Encodes, or generates, in this process and returns the number of entries that were new."""
    loaded, console = load_run_config(config), Console(file=io.StringIO())
    if command == "encode":
        return sum(kept.new for kept in encode(loaded, console))
    made = rollout(loaded, console)
    assert made is not None
    return made.new


@pytest.fixture
def expected(tiny: TinyCheckpoint, tmp_path: Path, command: str) -> dict[str, Tensor]:
    """What one process keeps that nothing happens to."""
    config = write_config(tiny, tmp_path / "expected", command)
    assert work_here(config, command) == len(entries(config))
    return entries(config)


def test_what_is_killed_goes_on(tiny: TinyCheckpoint, tmp_path: Path, command: str, expected: dict[str, Tensor]):
    config = write_config(tiny, tmp_path / "killed", command)
    killed = launch(config, command, processes=1, dies_after=2)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert len(list((config.parent / "encoded").glob("*/.*.partial"))) == 1, "it died while it wrote"
    kept = entries(config)
    assert 0 < len(kept) < len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in kept.items())
    assert work_here(config, command) == len(expected) - len(kept)
    assert_same(entries(config), expected)
    assert not list((config.parent / "encoded").glob("*/.*.partial"))


@pytest.mark.distributed
def test_two_processes_keep_what_one_does(
    tiny: TinyCheckpoint, tmp_path: Path, command: str, expected: dict[str, Tensor]
):
    config = write_config(tiny, tmp_path / "two", command)
    result = launch(config, command, processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same(entries(config), expected)
    assert result.stdout.count("are free") == 1, "one rank speaks"
