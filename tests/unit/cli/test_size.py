"""Protects `theworld-train size` as users call it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from theworld_train.accounting.presets import preset, preset_names
from theworld_train.cli.size import size
from theworld_train.config.errors import ConfigError

app = typer.Typer()
app.command()(size)


def run(*arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments))


def run_json(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def error(*arguments: str) -> str:
    result = run(*arguments)
    assert isinstance(result.exception, ConfigError), result.output
    return str(result.exception)


def test_without_arguments_it_lists_the_built_in_architectures():
    assert [entry["name"] for entry in run_json()] == list(preset_names())
    assert "405,853,388,800" in run().output


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_sized(name: str):
    found = run_json(name)
    assert found["parameters"] == preset(name).architecture.num_parameters
    assert sum(part["parameters"] for part in found["parts"]) == found["parameters"]
    result = run(name)
    assert result.exit_code == 0
    assert f"{found['parameters']:,}" in result.output


def test_the_table_says_what_a_model_needs():
    output = " ".join(run("llama-3-70b", "--context", "32768").output.split())
    for text in (
        "70,553,706,496",
        "embedding",
        "attention",
        "mlp",
        "norms",
        "head",
        "12 x layers x width^2 = 64,424,509,440: -8.69%",
        "bf16 141.11 GB",
        "327,680 bytes a token, 10.74 GB for one sequence of 32,768 tokens; 8x smaller thanks to grouped queries.",
        "1,128.86 GB without activations",
        "1,411,074,129,920 tokens",
        "5.97e+23 FLOPs",
        "H200",
    ):
        assert text in output, text


def test_windows_and_the_tied_head_are_shown():
    output = " ".join(run("gemma-3-4b").output.split())
    assert "smaller thanks to sliding windows" in output
    assert "tied: the token embedding, counted there" in output


def test_a_description_says_what_was_assumed():
    found = run_json("d_model=2048", "n_layers=24", "vocab_size=32000")
    assert found["parameters"] == 1_364_297_728
    assert "intermediate_size=5632" in found["assumptions"]
    assert "intermediate_size=5632" in run("d_model=2048", "n_layers=24", "vocab_size=32000").output


def test_what_fits_on_24_gb():
    rows = {row["use"]: row for row in run_json("--gpu-memory", "24")}
    assert rows["int8"]["parameters_without_reserve"] == 24_000_000_000
    assert rows["int4"]["parameters_without_reserve"] == 48_000_000_000
    assert (rows["int8"]["largest_preset"], rows["int4"]["largest_preset"]) == ("llama-2-13b", "gemma-3-27b")
    assert "gemma-3-27b" in run("--gpu-memory", "24").output


def test_a_config_json_is_read_as_a_file_or_from_its_directory(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}), encoding="utf-8")
    assert run_json(str(path))["parameters"] == run_json(str(tmp_path))["parameters"]


def test_a_type_without_a_formula_is_built_and_counted(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 2}), encoding="utf-8")
    found = run_json(str(path))
    assert found["kv_cache"]["bytes_per_token"] > 0
    assert "no closed formula" in found["note"]
    assert "counted on the built model" in run(str(path)).output


def test_learned_positions_bound_the_context():
    assert run_json("gpt2")["kv_cache"]["context"] == 1024
    assert "must not exceed the 1,024 learned positions of gpt2 (got 2048)" in error("gpt2", "--context", "2048")
    assert run_json("llama-2-7b")["kv_cache"]["context"] == 8192


def test_wrong_input_is_a_users_error(tmp_path: Path):
    unknown = tmp_path / "config.json"
    unknown.write_text('{"model_type": "gemmma3"}', encoding="utf-8")
    broken = tmp_path / "broken.json"
    broken.write_text("{", encoding="utf-8")
    listed = tmp_path / "list.json"
    listed.write_text("[]", encoding="utf-8")
    assert "did you mean 'llama-3-70b'" in error("llama3-70b")
    assert "transformers knows no such model type" in error(str(unknown))
    assert "cannot be read as JSON" in error(str(broken))
    assert "cannot be read as JSON" in error(str(tmp_path / "absent.json"))
    assert "must hold a JSON object" in error(str(listed))
    assert "multiple of num_attention_heads" in error("d_model=2048", "n_layers=2", "vocab_size=9", "n_heads=24")
    assert "must be a positive whole number (got -2)" in error("d_model=2048", "n_layers=-2", "vocab_size=9")
    assert "expected one name" in error("gpt2", "gpt2-xl")
    assert "expected key=value (got 'gpt2')" in error("gpt2", "d_model=64")
    assert "cannot be combined" in error("gpt2", "--gpu-memory", "24")


def test_presets_and_formulas_load_no_framework(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gemma3"}', encoding="utf-8")
    code = (
        "import sys; from theworld_train.cli.size import size;"
        f"size(['gemma-3-4b']); size(['d_model=64', 'n_layers=2', 'vocab_size=9']); size([{str(path)!r}]); size();"
        "print('FRAMEWORKS', sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("FRAMEWORKS []")
