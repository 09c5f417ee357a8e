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


def write_bad_rows(path: Path) -> None:
    """Writes twelve rows: no JSON, an id that another row has, a missing image, an empty one and a cut one are bad."""
    write_rows(path, 12)
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:-5]
    lines[5] = lines[5].replace('"bad-5"', '"bad-4"')
    path.with_name("bad-7.png").unlink()
    path.with_name("bad-9.png").write_bytes(b"")
    cut = path.with_name("bad-11.png")
    Image.effect_noise((64, 64), 50).save(cut)
    cut.write_bytes(cut.read_bytes()[:900])
    path.write_text("".join(line + "\n" for line in lines))


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
    write_bad_rows(root / "bad.jsonl")
    bad = {"train": {"source": "jsonl", "path": str(root / "bad.jsonl")}}
    cases: dict[str, dict[str, Any]] = {
        "first": {},
        "data_missing": {"data": {"train": {"source": "jsonl", "path": str(root / "only-{rank}.jsonl")}}},
        "loader": {"data": {"train": {"source": "jsonl", "path": str(root / "damaged-{rank}.jsonl")}}},
        "evaluation": {"data": {"eval": {"source": "jsonl", "path": str(root / "damaged-{rank}.jsonl")}}},
        "bad_rows": {"data": bad | {"max_bad_samples": 5}, "training": {"max_steps": 3}},
        "too_many_bad": {"data": bad | {"max_bad_samples": 4}, "training": {"max_steps": 3}},
        "too_many_wrong": {"data": bad | {"max_bad_samples": 2}},
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


def test_bad_rows_are_quarantined_in_step(told: list[dict[str, list[str]]], root: Path):
    assert [report["bad_rows"] for report in told] == [["", ""], ["", ""]]
    rows = [json.loads(line) for line in (root / "bad_rows" / "quarantine.jsonl").read_text().splitlines()]
    reasons = {row["id"]: row["reason"] for row in rows}
    assert len(rows) == len(reasons) == 5
    assert f"{root}/bad.jsonl:3: not valid JSON" in reasons["bad.jsonl:3"]
    assert f"{root}/bad.jsonl:6: id: the id is already that of {root}/bad.jsonl:5" in reasons["bad.jsonl:6"]
    assert f"{root}/bad.jsonl:8: messages[0].content[0].path: no such file (got 'bad-7.png')" in reasons["bad-7"]
    assert "bad-9.png: not an image" in reasons["bad-9"]
    assert "bad-11.png: the image is damaged" in reasons["bad-11"]
    dropped = {
        item["sample_id"]
        for row in read_metrics(root / "bad_rows" / "metrics.jsonl", "train")
        for item in row["dropped"]
    }
    assert dropped == reasons.keys(), "in one pass, each is met"


def test_one_bad_sample_more_than_may_be_ends_all_ranks_after_the_same_step(
    told: list[dict[str, list[str]]], root: Path
):
    (main, main_text), (other, other_text) = (report["too_many_bad"] for report in told)
    assert main == other == "ConfigError"
    assert main_text == other_text
    assert "5 different samples could not be used, more than may" in main_text
    step = read_metrics(root / "too_many_bad" / "metrics.jsonl", "train")[-1]["step"]
    assert [path.name for path in (root / "too_many_bad").glob("step-*")] == [f"step-{step}"], (
        "and what is done is saved"
    )


def test_more_wrong_rows_than_may_be_end_all_ranks_before_the_first_step(told: list[dict[str, list[str]]], root: Path):
    for kind, text in (report["too_many_wrong"] for report in told):
        assert kind == "ConfigError"
        assert "bad.jsonl:3: not valid JSON" in text
        assert "data.max_bad_samples: 3 rows are wrong, more than may (got 2)" in text
    assert not (root / "too_many_wrong" / "metrics.jsonl").exists()


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
