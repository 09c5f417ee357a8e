"""What fails on one rank stops all of them, in order, and each says what happened where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.config import dump_config, parse_run_config
from theworld_train.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def write_rows(path: Path, images: int, damaged: int = 0) -> None:
    """Writes conversations about an image each, of which the last ones are no images but look like some."""
    rows = []
    for index in range(images):
        file = path.with_name(f"{path.stem}-{index}.png")
        Image.new("RGB", (64, 64), (index * 30, 0, 0)).save(file)
        if index >= images - damaged:
            file.write_bytes(file.read_bytes()[:40])
        question = [{"type": "image", "path": file.name}, {"type": "text", "text": "Which digit is it?"}]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "5"}]
        rows.append({"id": f"{path.stem}-{index}", "messages": turns})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the runs."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def told(tiny: TinyCheckpoint, root: Path) -> list[dict[str, list[str]]]:
    """What each rank was told, by case; all cases run in one process group, so one that hangs fails them all."""
    for rank in (0, 1):
        write_rows(root / f"whole-{rank}.jsonl", 8)
        write_rows(root / f"damaged-{rank}.jsonl", 8, damaged=8 * rank)
    write_rows(root / "only-0.jsonl", 8)
    cases: dict[str, dict[str, Any]] = {
        "first": {},
        "data_missing": {"data": {"train": {"source": "jsonl", "path": str(root / "only-{rank}.jsonl")}}},
        "loader": {"data": {"train": {"source": "jsonl", "path": str(root / "damaged-{rank}.jsonl")}}},
        "evaluation": {"data": {"eval": {"source": "jsonl", "path": str(root / "damaged-{rank}.jsonl")}}},
        "save": {},
        "save_behind": {"checkpoint": {"every_steps": 8, "background": True}, "training": {"max_steps": 16}},
        "checkpoints": {"output_dir": str(root / "seen-{rank}"), "resume": "latest", "training": {"max_steps": 3}},
        "last": {},
    }
    for name, sections in cases.items():
        data = {"train": {"source": "jsonl", "path": str(root / "whole-{rank}.jsonl")}, "num_workers": 0}
        values: dict[str, Any] = {
            "name": name,
            "output_dir": str(root / name),
            "precision": "fp32",
            "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": 32}},
            "trainable": {"world_projector": {}},
            "data": data | sections.get("data", {}),
            "training": {"max_steps": 2, "global_batch_size": 4, "micro_batch_size": 2} | sections.get("training", {}),
        }
        values |= {key: value for key, value in sections.items() if key not in ("data", "training")}
        (root / f"{name}.yaml").write_text(dump_config(parse_run_config(values)))
    (root / "seen-1").symlink_to(root / "first")  # the other rank sees no run there
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = [str(root / f"{name}.yaml") for name in cases]
    worker = str(Path(__file__).with_name("worker_ranks.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(
        [*command, worker, str(root), *paths], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return [json.loads((root / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("case", ["first", "last"])
def test_sound_runs_before_and_after_the_failures_end_well(told: list[dict[str, list[str]]], case: str):
    assert [report[case] for report in told] == [["", ""], ["", ""]]


def test_file_that_one_rank_lacks(told: list[dict[str, list[str]]]):
    (main, main_text), (other, other_text) = (report["data_missing"] for report in told)
    assert main == other == "ConfigError"
    assert "only-1.jsonl: no such file" in other_text
    assert main_text.startswith("rank 1: "), "the rank that reports says whose trouble it is"
    assert other_text in main_text


@pytest.mark.parametrize("case", ["loader", "evaluation"])
def test_samples_that_one_rank_cannot_read(told: list[dict[str, list[str]]], case: str):
    (main, main_text), (other, other_text) = (report[case] for report in told)
    assert main == other == "ConfigError"
    assert "none of 8 samples in a row is usable" in other_text
    assert main_text == f"rank 1: {other_text}"


@pytest.mark.parametrize("case", ["save", "save_behind"])
def test_checkpoint_that_cannot_be_written(case: str, told: list[dict[str, list[str]]]):
    (main, main_text), (other, other_text) = (report[case] for report in told)
    assert main == "OSError"
    assert "No space left" in main_text
    assert (other, other_text) == ("ConfigError", f"rank 0: OSError: {main_text}")


def test_run_ends_at_once_with_a_checkpoint_that_is_written_behind(told: list[dict[str, list[str]]], root: Path):
    assert told
    steps = [row["step"] for row in read_metrics(root / "save_behind" / "metrics.jsonl", "train")]
    assert 8 <= steps[-1] < 16, "and not only when the next one is due"


def test_checkpoint_that_one_rank_does_not_see(told: list[dict[str, list[str]]]):
    for kind, text in (report["checkpoints"] for report in told):
        assert kind == "ConfigError"
        assert "ranks disagree on where the run starts: the bases on rank 0; " in text
        assert "step-2 on rank 1; do all nodes see the same file system?" in text
