"""How a global batch is split, over accumulated micro-batches or over ranks, changes neither losses nor gradients.

Gradient norms are compared besides losses: AdamW hides a gradient of the wrong scale almost wholly from the loss.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint
from theworld_train import assemble
from theworld_train.config import dump_config, parse_run_config
from theworld_train.config.schema import RunConfig
from theworld_train.data import TrainingOrder, open_source
from theworld_train.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STAGES: dict[str, tuple[str, ...]] = {
    "projection": ("world_projector",),
    "vision": ("world_projector", "vision_tower", "multi_modal_projector"),
    "language": ("world_projector", "language_model"),
    "full": ("world_projector", "vision_tower", "multi_modal_projector", "language_model", "world_encoder"),
}
STEPS, GLOBAL_BATCH, SEED = 20, 8, 4
TOLERANCE = 1e-6

Configure = Callable[..., RunConfig]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def configure(small_model: TinyCheckpoint, conversations: Path) -> Configure:
    """Makes the config of a stage in fp32 at a peak rate of 1e-3.

    Nothing is taken from the shipped configs: rounding grows with the rates, and this one keeps it below the tolerance.
    """

    def make(stage: str, directory: Path, micro_batch_size: int, **sections: Any) -> RunConfig:
        source = {"source": "jsonl", "path": str(conversations)}
        return parse_run_config(
            {
                "name": stage,
                "output_dir": str(directory),
                "seed": SEED,
                "precision": "fp32",
                "model": {
                    "base": small_model.gemma,
                    "world": {"encoder": small_model.cosmos, "resolution": RESOLUTION},
                },
                "trainable": {component: {} for component in STAGES[stage]},
                "data": {"train": source, "eval": source, "num_workers": 0},
                "optimizer": {"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-6},
                "schedule": {"warmup_steps": 10},
                "training": {
                    "max_steps": STEPS,
                    "global_batch_size": GLOBAL_BATCH,
                    "micro_batch_size": micro_batch_size,
                    "gradient_checkpointing": False,
                    "loss_chunk_size": 64,
                },
                # Seven samples in batches of two: the last batch of one of the ranks is padding in part.
                "evaluation": {"every_steps": 10, "max_samples": 7, "micro_batch_size": 2},
            }
            | sections
        )

    return make


@pytest.fixture(scope="module")
def whole(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory of a stage's run on one process with the global batch as its only micro-batch."""
    done: dict[str, Path] = {}

    def run(stage: str) -> Path:
        if stage not in done:
            done[stage] = tmp_path_factory.mktemp(stage)
            train(configure(stage, done[stage], GLOBAL_BATCH))
        return done[stage]

    return run


def train(config: RunConfig) -> None:
    assemble.train(config, Console(file=io.StringIO()))


def rows(directory: Path, event: str = "train") -> Rows:
    return read_metrics(directory / "metrics.jsonl", event)


def difference(first: Rows, second: Rows, key: str) -> float:
    """Returns the largest relative difference over all steps."""
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(first, second, strict=True))


def assert_same_training(first: Path, second: Path) -> None:
    expected, actual = rows(first), rows(second)
    assert len(expected) == STEPS
    for key in ("train/supervised_tokens", "train/tokens"):
        assert [row[key] for row in actual] == [row[key] for row in expected]
    # The first step's gradient is that of equal weights, whatever the optimizer makes of it later.
    assert actual[0]["train/grad_norm"] == pytest.approx(expected[0]["train/grad_norm"], rel=TOLERANCE)
    assert expected[-1]["train/loss"] < 0.9 * expected[0]["train/loss"], "a run that learns nothing compares nothing"
    differences = {key: difference(expected, actual, key) for key in ("train/loss", "train/grad_norm")}
    print(f"largest relative differences over {STEPS} steps: {differences}")
    assert max(differences.values()) <= TOLERANCE, differences


def assert_same_measurements(first: Path, second: Path) -> None:
    expected, actual = rows(first, "eval"), rows(second, "eval")
    assert [row["step"] for row in expected] == [10, 20]
    for one, other in zip(expected, actual, strict=True):
        assert one["samples"] == other["samples"]
        assert sum(one["samples"].values()) == 7
        assert {key: value for key, value in one.items() if "accuracy" in key} == {
            key: value for key, value in other.items() if "accuracy" in key
        }
        assert one["eval/loss"] == pytest.approx(other["eval/loss"], rel=1e-5)


# -- the data have what they are made for -----------------------------------------------------------------------------


def test_micro_batches_differ_in_kind_and_in_supervised_tokens(
    conversations: Path, configure: Configure, tmp_path: Path
):
    config = configure("full", tmp_path, 1)
    source = open_source(config.data.train)
    order = TrainingOrder(len(source), SEED, GLOBAL_BATCH)
    shares, alone = [], 0
    for step in range(STEPS):
        ranks = [order.micro_batches(step, rank, 2, 2) for rank in range(2)]
        for pair in zip(*ranks, strict=True):
            micro_batches = [[source[order.index(position)] for position in positions] for positions in pair]
            without_image = [all(sample.kind == "text" for sample in samples) for samples in micro_batches]
            alone += without_image[0] != without_image[1]
            words = [
                sum(len(sample.messages[1]["content"][0]["text"].split()) for sample in samples)
                for samples in micro_batches
            ]
            shares.append(min(words) / max(words))
    assert alone >= 5, "one rank has no image while the other has one"
    assert min(shares) < 0.05, "one rank has next to no answer to learn from"
    assert sum(share < 0.5 for share in shares) > len(shares) / 2


# -- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["vision", "full"])  # between them, every component trains and is frozen
def test_eight_micro_batches_of_one_equal_one_of_eight(
    stage: str, whole: Callable[[str], Path], configure: Configure, tmp_path: Path
):
    train(configure(stage, tmp_path, 1))
    assert_same_training(whole(stage), tmp_path)


def test_chunks_of_the_loss_and_checkpointing_change_nothing_either(
    whole: Callable[[str], Path], configure: Configure, tmp_path: Path
):
    config = configure("full", tmp_path, 4)
    training = config.training.model_copy(update={"loss_chunk_size": 16, "gradient_checkpointing": True})
    train(config.model_copy(update={"training": training}))
    assert_same_training(whole("full"), tmp_path)


# -- ranks ------------------------------------------------------------------------------------------------------------


def launch(directory: Path, configs: dict[str, RunConfig]) -> None:
    """Runs all configs on two ranks of one process group."""
    for name, config in configs.items():
        (directory / f"{name}.yaml").write_text(dump_config(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = str(Path(__file__).with_name("worker_ddp.py"))
    paths = [str(directory / f"{name}.yaml") for name in configs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [*command, worker, *paths], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.distributed
def test_two_ranks_equal_one_in_every_stage_and_resume_bit_for_bit(
    configure: Configure, whole: Callable[[str], Path], tmp_path: Path
):
    """One test, since most of its time goes into starting the ranks."""
    configs = {stage: configure(stage, tmp_path / stage, 2) for stage in STAGES}
    for name, directory, steps in (("straight", "straight", 6), ("first half", "halves", 3), ("halves", "halves", 6)):
        training = configs["full"].training.model_copy(update={"max_steps": steps}).model_dump()
        configs[name] = configure(
            "full", tmp_path / directory, 2, training=training, schedule={"kind": "constant"}, resume="latest"
        )
    launch(tmp_path, configs)
    for stage in STAGES:
        print(stage, end=": ")
        assert_same_training(whole(stage), tmp_path / stage)
        assert_same_measurements(whole(stage), tmp_path / stage)
        assert_same_weights(whole(stage), tmp_path / stage, STAGES[stage])
    assert_resumed(tmp_path / "straight", tmp_path / "halves")


def assert_same_weights(first: Path, second: Path, components: tuple[str, ...]) -> None:
    for component in components:
        expected, actual = (load_file(run / f"step-{STEPS}" / f"{component}.safetensors") for run in (first, second))
        for name, value in expected.items():
            # A gradient that is zero by mathematics is noise, of which AdamW makes steps; nothing depends on these.
            if not name.endswith(("k_proj.bias", "to_qkv.bias")):
                torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-4, msg=f"{component}.{name}")


def assert_resumed(straight: Path, resumed: Path) -> None:
    expected, actual = rows(straight), rows(resumed)
    assert [row["step"] for row in actual] == [1, 2, 3, 4, 5, 6]
    assert (resumed / "step-3").is_dir()
    for key in ("loss_hex", "train/grad_norm"):
        assert [row[key] for row in actual] == [row[key] for row in expected]
    files = list((straight / "step-6").glob("*.safetensors"))
    assert len(files) == 6, "five components and the optimizer"
    for path in files:
        assert path.read_bytes() == (resumed / "step-6" / path.name).read_bytes(), path.name
