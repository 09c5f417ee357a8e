"""Wrong inputs end with an error that names the thing and how to mend it, before any weights are read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.cli.app import app

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart" / "projection.yaml"


@pytest.fixture
def weightless(tiny: TinyCheckpoint, tmp_path: Path) -> list[str]:
    """Overrides for a base whose weights are gone: whatever reads them fails in another way."""
    root = tmp_path / "weightless"
    shutil.copytree(tiny.gemma, root / "gemma", ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tiny.cosmos, root / "cosmos", ignore=shutil.ignore_patterns("*.safetensors"))
    return [
        f"model.base={root / 'gemma'}",
        f"model.world.encoder={root / 'cosmos'}",
        f"output_dir={tmp_path / 'run'}",
        "data.num_workers=0",
    ]


def error_of(arguments: list[str]) -> str:
    """Runs `train` with the quickstart's config, and returns the error as one line."""
    result = CliRunner().invoke(app, ["train", str(QUICKSTART), *arguments])
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


def jsonl(tmp_path: Path, *rows: dict[str, object]) -> str:
    """Writes rows to a file and returns the override that trains on it."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={{source: jsonl, path: {path}}}"


def test_unknown_key_is_answered_with_the_nearest_one(weightless: list[str]) -> None:
    error = error_of([*weightless, "optimizer.learning_rate=1e-3", "training.max_step=5"])
    assert "training.max_step" in error
    assert "max_steps" in error
    assert "optimizer.learning_rate" in error, "all problems are listed at once"


def test_misspelt_component_is_answered_with_the_nearest_one(weightless: list[str]) -> None:
    error = error_of([*weightless, "trainable.world_projektor={}"])
    assert "world_projektor" in error
    assert "did you mean 'world_projector'" in error


def test_tied_head_is_no_component(weightless: list[str]) -> None:
    error = error_of([*weightless, "trainable={lm_head: {}}", "expect_trainable=null"])
    assert "lm_head" in error
    assert "language_model" in error


def test_missing_data_file_is_named(weightless: list[str], tmp_path: Path) -> None:
    missing = tmp_path / "absent.jsonl"
    error = error_of([*weightless, f"data.train={{source: jsonl, path: {missing}}}"])
    assert "absent.jsonl" in error
    assert "no such file" in error


def test_missing_base_is_named(weightless: list[str]) -> None:
    error = error_of([*weightless, "model.base=runs/nowhere/gemma"])
    assert "model.base" in error
    assert "runs/nowhere/gemma" in error


def test_row_without_an_answer_names_file_and_line(weightless: list[str], tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]}
    bad = {"messages": [{"role": "user", "content": "hello"}]}
    error = error_of([*weightless, jsonl(tmp_path, good, bad)])
    assert "rows.jsonl:2" in error
    assert "assistant" in error


def test_budget_too_small_for_one_image_says_what_an_image_takes(weightless: list[str]) -> None:
    error = error_of([*weightless, "data.max_sequence_length=20"])
    assert "data.max_sequence_length" in error
    assert "tokens" in error


def test_empty_trainable_table_is_refused(weightless: list[str]) -> None:
    error = error_of([*weightless, "trainable={}", "expect_trainable=null"])
    assert "trainable" in error
    assert "at least one component" in error


def test_output_directory_that_is_a_file_is_refused(weightless: list[str], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    error = error_of([*weightless, f"output_dir={tmp_path / 'taken'}"])
    assert "output_dir" in error


def test_init_from_that_is_no_checkpoint_is_refused(weightless: list[str], tmp_path: Path) -> None:
    error = error_of([*weightless, f"init_from={tmp_path}"])
    assert "is no checkpoint" in error


def test_batch_that_does_not_divide_is_refused(weightless: list[str]) -> None:
    error = error_of([*weightless, "training.global_batch_size=30", "training.micro_batch_size=4"])
    assert "global_batch_size" in error
    assert "30" in error


def test_another_number_of_trainable_parameters_is_printed(weightless: list[str]) -> None:
    error = error_of([*weightless, "expect_trainable=1"])
    assert "expect_trainable" in error
    stated = error.split("state expect_trainable: ")[1].split()[0]
    assert f"makes {stated} parameters trainable (world_projector {int(stated):,}), not 1" in error
    then = error_of([*weightless, f"expect_trainable={stated}", f"init_from={QUICKSTART.parent}"])
    assert "expect_trainable" not in then
    assert "is no checkpoint" in then
