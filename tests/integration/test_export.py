"""An exported checkpoint loads in a fresh process, without its run or its bases, and computes the same logits."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from typer.testing import CliRunner

from tests.helpers.tiny import TinyCheckpoint, clip, image, user
from theworld_train.assemble.run import train
from theworld_train.cli.app import app
from theworld_train.config import parse_run_config
from theworld_train.export import directory as export_module
from theworld_train.model import TheWorld, TheWorldProcessor

LOAD = """
import sys, torch
from theworld_train.model import TheWorld
model = TheWorld.from_pretrained(sys.argv[1]).eval()
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    torch.save(model(**inputs).logits, sys.argv[3])
"""
TRAINABLE: dict[str, dict[str, Any]] = {
    "full": {"world_projector": {}, "vision_tower": {}, "language_model": {}, "world_encoder": {}},
    "adapter": {"world_projector": {}, "language_model": {"adapter": "lora", "lr": 0.01}},
}


@pytest.fixture(scope="module", params=TRAINABLE)
def checkpoint(request: pytest.FixtureRequest, tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint on bases of its own, which the tests may take away."""
    root = tmp_path_factory.mktemp("export")
    shutil.copytree(tiny.directory, root / "bases")
    bases = TinyCheckpoint(root / "bases")
    digits = {"source": "moving_digits", "samples": 8}
    values = {
        "name": "exported",
        "output_dir": str(root / "run"),
        "model": {"base": bases.gemma, "world": {"encoder": bases.cosmos, "resolution": 32}},
        "trainable": TRAINABLE[request.param],
        "data": {"train": digits | {"split": "train"}, "eval": digits | {"split": "eval"}, "num_workers": 0},
        "optimizer": {"lr": 1e-3},
        "training": {"max_steps": 2, "global_batch_size": 2},
    }
    train(parse_run_config(values), Console(file=io.StringIO()))
    return root / "run" / "step-2"


def exported(checkpoint: Path, target: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(target), *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_logits_are_those_of_the_checkpoint(dtype: str, checkpoint: Path, tmp_path: Path):
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    processor = TheWorldProcessor.from_pretrained(str(checkpoint))
    turns = [user("Which digit is it?", image(1), clip(2))]
    inputs = processor.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    model = TheWorld.from_pretrained(str(checkpoint), dtype=kind).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
    exported(checkpoint, tmp_path / "out", "--dtype", dtype)
    again = TheWorldProcessor.from_pretrained(str(tmp_path / "out")).apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    assert again.keys() == inputs.keys()
    torch.save(dict(again), tmp_path / "inputs.pt")
    root = checkpoint.parents[1]
    root.rename(root.with_name(f"{root.name}-away"))
    try:
        command = [sys.executable, "-c", LOAD, tmp_path / "out", tmp_path / "inputs.pt", tmp_path / "logits.pt"]
        subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=120)
    finally:
        root.with_name(f"{root.name}-away").rename(root)
    assert expected.dtype == kind
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)


def test_directory_is_complete_and_refers_to_nothing_outside(checkpoint: Path, tmp_path: Path):
    exported(checkpoint, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "processor_config.json", "tokenizer.json", "model.safetensors"} <= names
    for path in (tmp_path / "out").iterdir():
        assert str(checkpoint.parents[1]).encode() not in path.read_bytes(), path.name
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        kinds = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    assert {kind for key, kind in kinds.items() if "world_encoder" in key} == {"F32"}
    assert {kind for key, kind in kinds.items() if "world_encoder" not in key} == {"BF16"}


def test_card_says_what_the_run_was(checkpoint: Path, tmp_path: Path):
    exported(checkpoint, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    ledger = json.loads((checkpoint / "ledger.json").read_text())
    rows = map(json.loads, (checkpoint.parent / "metrics.jsonl").read_text().splitlines())
    *_, measured = (row for row in rows if row["event"] == "eval")
    for expected in (
        "after 2 optimizer steps of the run `exported`",
        f"{ledger['total']:,}, of which {ledger['trainable']:,} were trained",
        "| world_projector | exported |",
        "| train data | moving_digits |",
        f"{measured['eval/loss']:.4f}",
    ):
        assert expected in card


def test_directory_that_exists_is_not_touched(checkpoint: Path, tmp_path: Path):
    result = CliRunner().invoke(app, ["export", str(checkpoint), str(tmp_path)])
    assert result.exit_code == 2
    assert "exists already" in result.output
    assert not list(tmp_path.iterdir())


def test_upload_is_of_the_exported_directory(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []

    class Api:
        def create_repo(self, name: str, **options: Any) -> None:
            calls.append((name, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> str:
            calls.append((repo_id, folder_path))
            return "https://hub/commit"

    monkeypatch.setattr(export_module, "HfApi", Api)
    text = exported(checkpoint, tmp_path / "out", "--push-to-hub", "me/model")
    assert calls == [("me/model", {"private": True, "exist_ok": True}), ("me/model", tmp_path / "out")]
    assert "uploaded: https://hub/commit" in text
