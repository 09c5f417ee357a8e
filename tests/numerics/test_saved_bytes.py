"""What a checkpoint takes is known from shapes alone, also for the full model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from theworld_train.assemble.model import ledger_of
from theworld_train.config import load_run_config
from theworld_train.config.schema import RunConfig

CONFIGS = Path(__file__).parents[2] / "configs" / "stages"
#: Largest tokenizer and processor files of Gemma 3 together, in bytes, and what JSON a checkpoint holds besides.
TOKENIZER, RECORDS = 39_000_000, 1_000_000


@pytest.mark.parametrize(
    ("stage", "precision"), [("projection", "bf16"), ("vision", "fp32"), ("language", "fp32"), ("full", "bf16")]
)
def test_checkpoint_holds_as_many_bytes_as_the_ledger_says(
    stage: str, precision: str, shipped: Callable[..., RunConfig], finish: Callable[..., Any], tmp_path: Path
):
    config = shipped(stage, tmp_path / "run", precision=precision, training__max_steps=1)
    checkpoint = finish(config).checkpoint
    held = [tensor.nbytes for path in checkpoint.glob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(held) == ledger_of(config).saved_bytes


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_projection_checkpoint_of_the_full_model_is_small(projection: str):
    overrides = [f"model.world.projection={projection}", "expect_trainable=null"]
    ledger = ledger_of(load_run_config(CONFIGS / "projection.yaml", overrides))
    assert ledger.total > 4e9
    assert ledger.saved_bytes + TOKENIZER + RECORDS < 200e6
