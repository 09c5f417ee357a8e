"""How a global batch is split, over accumulated micro-batches or over ranks, changes neither losses nor gradients.

Gradient norms are compared besides losses: AdamW hides a gradient of the wrong scale almost wholly from the loss.
"""

from __future__ import annotations

import io
import json
import math
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
from tests.numerics.worker_ddp import FOUND, LABELLED, MEASURE, NODES, UNLABELLED, supervising
from theworld_train.assemble import run
from theworld_train.assemble.model import load_model
from theworld_train.config import dump_config, parse_run_config
from theworld_train.config.schema import ABLATIONS, RunConfig
from theworld_train.data import Batching, TrainingOrder, open_source
from theworld_train.evaluate.ablations import run_ablations
from theworld_train.model.components import COMPONENT_PATHS
from theworld_train.train.ledger import trainable_components
from theworld_train.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STAGES: dict[str, tuple[str, ...]] = {
    "projection": ("world_projector",),
    "vision": ("world_projector", "vision_tower", "multi_modal_projector"),
    "language": ("world_projector", "language_model"),
    "full": ("world_projector", "vision_tower", "multi_modal_projector", "language_model", "world_encoder"),
}
#: How each stage is checkpointed on two ranks; on one, nothing is.
CHECKPOINTING = {"projection": "selective", "vision": "full", "language": "full", "full": "none"}
#: How the samples of a step share micro-batches on two ranks; on one, they are all in one.
BATCHING = {"projection": "padded", "vision": "grouped", "language": "packed", "full": "padded"}
#: What each strategy can keep in host memory.
OFFLOADING = {
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer",),
    "zero3": ("optimizer", "all"),
    "fsdp2": ("all",),
}
STEPS, GLOBAL_BATCH, SEED = 20, 8, 4
#: Tokens that a row may have, more than any sample has.
LONGEST = 160
IN_ORDER = Batching("padded", LONGEST)
TOLERANCE = 1e-6

TRAINING: dict[str, Any] = {
    "max_steps": STEPS,
    "global_batch_size": GLOBAL_BATCH,
    "gradient_checkpointing": "none",
    "loss_chunk_size": 64,
}

#: Seven samples in batches of two: the last batch of one of the ranks is padding in part.
EVALUATION: dict[str, Any] = {"every_steps": 10, "max_samples": 7, "micro_batch_size": 2, "max_new_tokens": 2}

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
                "data": {"train": source, "eval": source, "num_workers": 0, "max_sequence_length": LONGEST},
                "optimizer": {"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-6},
                "schedule": {"warmup_steps": 10},
                "training": TRAINING,
                "evaluation": EVALUATION,
            }
            | sections
            | {"training": {**sections.get("training", TRAINING), "micro_batch_size": micro_batch_size}}
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
    run.train(config, Console(file=io.StringIO()))


def rows(directory: Path, event: str = "train") -> Rows:
    return read_metrics(directory / "metrics.jsonl", event)


def difference(first: Rows, second: Rows, key: str) -> float:
    """Returns the largest relative difference over all steps."""
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(first, second, strict=True))


def assert_same_training(first: Path, second: Path, norm_tolerance: float = TOLERANCE) -> None:
    expected, actual = rows(first), rows(second)
    assert len(expected) == STEPS
    for key in ("train/supervised_tokens", "train/tokens"):
        assert [row[key] for row in actual] == [row[key] for row in expected]
    # The first step's gradient is that of equal weights, whatever the optimizer makes of it later.
    assert actual[0]["train/grad_norm"] == pytest.approx(expected[0]["train/grad_norm"], rel=TOLERANCE)
    assert expected[-1]["train/loss"] < 0.9 * expected[0]["train/loss"], "a run that learns nothing compares nothing"
    differences = {key: difference(expected, actual, key) for key in ("train/loss", "train/grad_norm")}
    print(f"largest relative differences over {STEPS} steps: {differences}")
    assert differences["train/loss"] <= TOLERANCE, differences
    assert differences["train/grad_norm"] <= norm_tolerance, differences
    assert_same_norms(expected, actual)


def assert_same_norms(expected: Rows, actual: Rows) -> None:
    """Compares the norms of components; those of gradients have to make up that of the whole one."""
    for name in ("grad_norm", "weight_norm"):
        keys = [key for key in expected[0] if key.startswith(f"train/{name}/")]
        assert keys
        assert keys == [key for key in actual[0] if key.startswith(f"train/{name}/")]
        for key in keys:
            assert difference(expected, actual, key) <= 1e-4, key
            assert actual[0][key] == pytest.approx(expected[0][key], rel=2 * TOLERANCE), key
    for row in (*expected, *actual):
        parts = [value for key, value in row.items() if key.startswith("train/grad_norm/")]
        assert math.hypot(*parts) == pytest.approx(row["train/grad_norm"], rel=1e-5)


def assert_same_measurements(first: Path, second: Path) -> None:
    expected, actual = rows(first, "eval"), rows(second, "eval")
    assert [row["step"] for row in expected] == [10, 20]
    for one, other in zip(expected, actual, strict=True):
        assert one["samples"] == other["samples"]
        assert sum(one["samples"].values()) == 7
        losses = [key for key in one if key.startswith("eval/loss")]
        shares = [key for key in one if key.startswith("eval/") and key not in losses]
        assert {"eval/predicted", "eval/exact", "eval/normalized/clip", "eval/correct/text"} <= set(shares)
        assert {key: one[key] for key in shares} == {key: other[key] for key in shares}
        for key in losses:
            assert one[key] == pytest.approx(other[key], rel=1e-5)


# -- the data have what they are made for -----------------------------------------------------------------------------


def test_micro_batches_differ_in_kind_and_in_supervised_tokens(
    conversations: Path, configure: Configure, tmp_path: Path
):
    config = configure("full", tmp_path, 1)
    source = open_source(config.data.train)
    order = TrainingOrder(len(source), SEED, GLOBAL_BATCH)
    shares, alone = [], 0
    for step in range(STEPS):
        ranks = [IN_ORDER.micro_batches(order.indices(step), rank, 2, 2) for rank in range(2)]
        for pair in zip(*ranks, strict=True):
            micro_batches = [[source[place.index] for (place,) in batch] for batch in pair]
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


@pytest.mark.parametrize("batching", ["grouped", "packed"])
def test_neither_does_the_way_in_which_samples_share_micro_batches(
    batching: str, whole: Callable[[str], Path], configure: Configure, tmp_path: Path
):
    train(configure("full", tmp_path, 2, training={**TRAINING, "batching": batching}))
    assert_same_training(whole("full"), tmp_path)
    shares = [sum(row["train/padding_share"] for row in rows(run)) / STEPS for run in (whole("full"), tmp_path)]
    print(f"padding: {shares[0]:.1%} in one micro-batch, {shares[1]:.1%} {batching}")
    assert shares[1] < 0.6 * shares[0]


def test_chunks_of_the_loss_and_checkpointing_change_nothing_either(
    whole: Callable[[str], Path], configure: Configure, tmp_path: Path
):
    train(
        configure("full", tmp_path, 4, training={**TRAINING, "loss_chunk_size": 16, "gradient_checkpointing": "full"})
    )
    assert_same_training(whole("full"), tmp_path)


# -- ranks ------------------------------------------------------------------------------------------------------------


def launch(
    directory: Path,
    configs: dict[str, RunConfig],
    *,
    ranks: int = 2,
    nodes: int = 1,
    measure: Path | None = None,
) -> None:
    """Runs all configs on the ranks of one process group, which take themselves for those of several nodes.

    A checkpoint to `measure` is measured by them too, into `found.json`.
    """
    for name, config in configs.items():
        (directory / f"{name}.yaml").write_text(dump_config(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    worker = str(Path(__file__).with_name("worker_ddp.py"))
    paths = [str(directory / f"{name}.yaml") for name in configs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), NODES: str(nodes)}
    if measure is not None:
        environment |= {MEASURE: str(measure), FOUND: str(directory / "found.json")}
    result = subprocess.run(
        [*command, worker, *paths], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    for noise in ("Setting accelerator to CPU", "is deprecated. Please use `torch.distributed"):
        assert noise not in result.stdout + result.stderr, "DeepSpeed's words of every start reach the user"


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.slow),  # four minutes on 2 cores, as `ddp`, which stays in the fast set
        pytest.param("zero3", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_equal_one_in_every_stage_and_resume_bit_for_bit(
    strategy: str,
    configure: Configure,
    whole: Callable[[str], Path],
    rounded: Path,
    unlabelled: Path,
    tmp_path: Path,
):
    """One test, since most of its time goes into starting the ranks."""
    runtime = {"runtime": {"strategy": strategy}}
    # Between them: with and without accumulation and recomputation, in their order, by length and packed.
    configs = {
        stage: configure(
            stage,
            tmp_path / stage,
            4 if stage == "vision" else 2,
            training={
                **TRAINING,
                "gradient_checkpointing": checkpointing_of(stage, strategy),
                "batching": BATCHING[stage],
            },
            **runtime,
        )
        for stage in STAGES
    }

    def short(directory: str, steps: int, **sections: Any) -> RunConfig:
        shared = {"training": {**TRAINING, "max_steps": steps}, "schedule": {"kind": "constant"}}
        shared |= {"resume": "latest", "allow_changed": ["training.max_steps"], "evaluation": {"max_samples": 2}}
        return configure("full", tmp_path / directory, 2, **shared | runtime | sections)

    configs["straight"] = short("straight", 6)
    configs["first half"], configs["halves"] = short("halves", 3), short("halves", 6)
    configs["begun by another"] = short("crossed", 3, runtime={"strategy": "fsdp2" if strategy == "ddp" else "ddp"})
    configs["crossed"] = short("crossed", 6)
    configs["rounded"] = short("rounded", 6, precision="bf16")
    adapter = {"world_projector": {}, "language_model": {"adapter": "lora", "dropout": 0.3}}
    if strategy == "ddp":  # dropout is drawn alike under every strategy
        configs["dropped straight"] = short("dropped-straight", 4, trainable=adapter)
        configs["first half dropped"] = short("dropped", 2, trainable=adapter)
        configs["dropped"] = short("dropped", 4, trainable=adapter)
    for offload in OFFLOADING[strategy]:
        configs[f"{offload} offloaded"] = short(
            f"offloaded-{offload}", 6, runtime={"strategy": strategy, "offload": offload}
        )
    one = {"training": {**TRAINING, "max_steps": 6}}
    configs[UNLABELLED] = configure("full", tmp_path / UNLABELLED, 1, name=UNLABELLED, **one | runtime)
    still = {"lr": 1e-30, "weight_decay": 0.0}
    configs["still"] = short("still", 1, precision="bf16", optimizer=still, init_from=str(tmp_path / "straight"))
    launch(tmp_path, configs, measure=whole("full"))
    assert_measured_alike(whole("full"), tmp_path / "found.json")
    for stage in STAGES:
        print(stage, end=": ")
        # Sharded, a norm is put together from parts, and rounds once more.
        assert_same_training(whole(stage), tmp_path / stage, TOLERANCE if strategy == "ddp" else 2 * TOLERANCE)
        assert_same_measurements(whole(stage), tmp_path / stage)
        assert_same_weights(configs[stage], whole(stage), tmp_path / stage)
    assert_resumed(tmp_path / "straight", tmp_path / "halves")
    if strategy == "ddp":
        assert_dropped(tmp_path / "dropped-straight", tmp_path / "dropped")
    same = {"crossed": "straight", UNLABELLED: UNLABELLED}
    same |= {f"offloaded-{offload}": "straight" for offload in OFFLOADING[strategy]}
    for name, other in same.items():
        expected = rows(unlabelled if other == UNLABELLED else tmp_path / other)
        for key in ("train/loss", "train/grad_norm"):
            off = difference(expected, rows(tmp_path / name), key)
            assert off <= 2 * TOLERANCE, f"{key} of the run {name!r} is off by {off}"
    bf16 = {
        key: difference(rows(rounded), rows(tmp_path / "rounded"), key) for key in ("train/loss", "train/grad_norm")
    }
    print(f"in bf16: {bf16}")
    assert bf16["train/loss"] <= 5e-3
    assert bf16["train/grad_norm"] <= 5e-2
    for component in STAGES["full"]:
        name = f"{component}.safetensors"
        masters = (tmp_path / "straight" / "step-6" / name).read_bytes()
        assert masters == (tmp_path / "still" / "step-1" / name).read_bytes(), f"masters of {component} were rounded"


@pytest.mark.distributed
@pytest.mark.slow
def test_sharding_within_two_nodes_of_two_equals_one_process(
    configure: Configure, whole: Callable[[str], Path], tmp_path: Path
):
    """Weights are sharded over two ranks and replicated over two pairs of them."""
    runtime = {"strategy": "fsdp2", "hybrid": True}
    launch(tmp_path, {"hybrid": configure("full", tmp_path / "hybrid", 1, runtime=runtime)}, ranks=4, nodes=2)
    assert_same_training(whole("full"), tmp_path / "hybrid", 2 * TOLERANCE)


@pytest.fixture(scope="module")
def unlabelled(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on one process that learns from clips alone, so that ranks have steps without labels."""
    directory = tmp_path_factory.mktemp(UNLABELLED)
    config = configure("full", directory, 8, training={**TRAINING, "max_steps": 6}, name=UNLABELLED)
    order, source = TrainingOrder(48, SEED, GLOBAL_BATCH), open_source(config.data.train)
    labelled = [
        any(
            source[place.index].kind in LABELLED
            for ((place,),) in IN_ORDER.micro_batches(order.indices(step), rank, 2, 1)
        )
        for step in range(6)
        for rank in range(2)
    ]
    assert not all(labelled), "no rank is ever without labels"
    with supervising(LABELLED):
        train(config)
    return directory


@pytest.fixture(scope="module")
def rounded(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run on one process in bf16."""
    directory = tmp_path_factory.mktemp("rounded")
    training = {**TRAINING, "max_steps": 6}
    train(configure("full", directory, 8, precision="bf16", training=training, schedule={"kind": "constant"}))
    return directory


def assert_measured_alike(checkpoint: Path, found: Path) -> None:
    """Makes sure that one process finds the same as several: to the last bit, and the same answers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks
    try:
        expected = run_ablations(checkpoint, ABLATIONS).to_dict()
    finally:
        torch.set_num_threads(threads)
    assert json.loads(found.read_text()) == json.loads(json.dumps(expected))
    for variant in expected["ablations"].values():
        assert variant["total"]["samples"] == len(variant["answers"]) == 7
        assert all(answer["answer"] is not None for answer in variant["answers"])
    losses = {variant["total"]["loss"]["value"] for variant in expected["ablations"].values()}
    assert len(losses) == len(ABLATIONS), "each ablation changes something"


def assert_same_weights(config: RunConfig, first: Path, second: Path) -> None:
    """Compares how far each tensor has come: what separates two runs is small beside what either has moved."""
    trainable = trainable_components(config)
    start = dict(load_model(config, trainable).model.named_parameters())
    for component in trainable:
        expected, actual = (load_file(run / f"step-{STEPS}" / f"{component}.safetensors") for run in (first, second))
        for name, value in expected.items():
            # A gradient that is zero by mathematics is noise, of which AdamW makes steps; nothing depends on these.
            if not name.endswith(("k_proj.bias", "to_qkv.bias")):
                update = (value - start[f"{COMPONENT_PATHS[component]}.{name}"].detach()).norm()
                assert (actual[name] - value).norm() <= 1e-2 * update, f"{component}.{name}"


def checkpointing_of(stage: str, strategy: str) -> str:
    """Returns how a stage is checkpointed on two ranks."""
    mode = CHECKPOINTING[stage]
    return "full" if (mode, strategy) == ("selective", "zero3") else mode


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


def assert_dropped(straight: Path, resumed: Path) -> None:
    """Makes sure that each rank draws dropout of its own, and draws on as if it had never stopped."""
    assert [row["loss_hex"] for row in rows(resumed)] == [row["loss_hex"] for row in rows(straight)]
    first, second = json.loads((straight / "step-4" / "state.json").read_text())["rng"]
    # A state of torch's generator begins with the seed.
    assert first["torch"][:16] != second["torch"][:16]
