"""Protects `theworld-train plan`: its table, its JSON, its picture, and what it answers to wrong input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint
from theworld_train.cli.plan import _without_bitsandbytes

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tiny_run(tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config on the tiny model, whose samples have no limit to their length."""
    monkeypatch.chdir(tmp_path)
    config = {
        "name": "tiny",
        "output_dir": "run",
        "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": RESOLUTION}},
        "trainable": {"world_projector": {}},
        "data": {"train": {"source": "moving_digits", "split": "train", "samples": 8}},
        "training": {"max_steps": 1, "global_batch_size": 4, "micro_batch_size": 2},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return "tiny.yaml"


def test_a_run_is_planned_as_a_table(call: Call, tiny_run: str):
    Path("kept/world_encoder-key").mkdir(parents=True)
    Path("kept/world_encoder-key/entries.safetensors").touch()
    code, out, _ = call("plan", tiny_run, "data.encoded=kept", "--gpu", "h100-80gb")
    assert code == 0
    assert "fits" in out
    assert "Frozen encoders: vision_tower runs in every step, world_encoder is read from kept." in out
    assert "The peak of ddp comes in" in out
    assert "language_model" in out


def test_json_says_what_the_table_says(call: Call, tiny_run: str):
    code, out, _ = call("plan", tiny_run, "--gpus", "1,2", "--gpu", "h100-80gb,l4", "--json")
    assert code == 0
    rows = json.loads(out)["plans"]
    assert [(row["gpus"], row["strategy"], row["gpu"]) for row in rows[:2]] == [
        (1, "ddp", "h100-80gb"),
        (1, "ddp", "l4"),
    ]
    assert {row["strategy"] for row in rows if row["gpus"] == 2} == {"ddp", "zero1", "zero2", "zero3", "fsdp2"}
    for row in rows:
        assert row["verdict"] == "fits"
        assert row["encoders_read"] == []
        assert row["largest_micro_batch"] == 4 // row["gpus"]
        assert (
            sum(row["peak"]["by_category"].values()) == row["peak_bytes"] == sum(row["peak"]["by_component"].values())
        )
    # The clips of the data: 9 frames are 3 latent ones of 16 tokens.
    assert rows[0]["positions"] > 3 * 16


def test_offload_is_the_configs_where_nothing_else_is_said(call: Call, tiny_run: str):
    overrides = ["runtime.strategy=zero2", "runtime.offload=optimizer"]
    code, out, _ = call("plan", tiny_run, *overrides, "--gpus", "1,2", "--json")
    assert code == 0
    found = [(row["gpus"], row["strategy"], row["offload"]) for row in json.loads(out)["plans"]]
    assert found == [(1, "ddp", "none"), *((2, name, "optimizer") for name in ("zero1", "zero2", "zero3"))]


def test_several_kinds_of_gpu_share_one_table(call: Call, tiny_run: str):
    code, out, _ = call("plan", tiny_run, "--gpus", "1,8", "--gpu", "rtx-4090,h200")
    assert code == 0
    assert out.count("fits: ddp") == 4


def test_a_picture_is_drawn(call: Call, tiny_run: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    code, _, _ = call("plan", tiny_run, "--plot", "memory.png")
    assert code == 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--gpu", "h100-90gb"], "did you mean"),
        (["--strategy", "zero4"], "did you mean"),
        (["--strategy", "ddp", "--offload", "all", "--gpus", "2"], "these can: fsdp2, zero3"),
        (["--strategy", "zero3", "--gpus", "2", "training.gradient_checkpointing=selective"], "these can: ddp, zero1"),
        (["--plot", "memory.png", "--gpus", "1,2"], "one number of GPUs"),
        (["--calibrate", "run", "--gpu", "l4,h100-80gb"], "one kind of them"),
        (["--offload", "optimiser"], "did you mean 'optimizer'"),
        (["--strategy", "zero2", "--offload", "optimizer"], "two GPUs or more"),
        (["--gpus", "none"], "numbers above zero"),
        (["--positions", "20"], "too few for one clip of 9 frames"),
        (["--positions", "200", "--supervised", "190"], "more supervised tokens than text"),
    ],
)
def test_wrong_input_is_answered_with_what_would_do(call: Call, tiny_run: str, arguments: list[str], answer: str):
    code, _, err = call("plan", tiny_run, *arguments)
    assert code == 2
    assert answer in " ".join(err.split())


def test_data_on_the_hub_needs_a_length(call: Call, tiny_run: str):
    code, _, err = call("plan", tiny_run, "data.train={source: hub, id: some/data}")
    assert code == 2
    assert "--positions" in err


def test_the_libraries_of_quantised_models_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    with _without_bitsandbytes():
        assert find_spec("bitsandbytes") is None
    assert find_spec("bitsandbytes") is not None
