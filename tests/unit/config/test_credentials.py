"""Protects secrets: a config that holds one is refused, and no message repeats it."""

from __future__ import annotations

import pytest

from theworld_train.config import ConfigError, PipelineConfig, RunConfig, load_pipeline_config, load_run_config
from theworld_train.config.credentials import looks_secret
from theworld_train.config.outline import outline_of

SECRET = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    "key", ["api_key", "token", "password", "hf_token", "HF_TOKEN", "wandb-api-key", "secret", "access_key"]
)
def test_a_key_that_names_a_secret_is_refused(write, the_problem_of, key):
    problem = the_problem_of(write(f"model: {{{key}: correct-horse}}"))
    assert problem.key == f"model.{key}"
    assert "environment" in (problem.hint or "")
    assert "correct-horse" not in str(problem)


@pytest.mark.parametrize(
    "value",
    [
        SECRET,
        f"https://hub/{SECRET}",
        "https://user:correct-horse@hub.example/x",
        "postgresql://host/db?user=u&password=correct-horse",
        "https://hub.example/x?token=correct-horse",
        "ghp_" + "a1" * 18,
        "sk-" + "a1" * 20,
        "AKIA" + "A1" * 8,
        "env HF_TOKEN=correct-horse",
        "--api-key=correct-horse",
    ],
)
def test_a_value_that_looks_like_a_secret_is_refused_under_any_key(write, the_problem_of, value):
    problem = the_problem_of(write(f"model: {{base: '{value}'}}"))
    assert problem.key == "model.base"
    assert "looks like a secret" in problem.message
    assert value not in str(problem)


@pytest.mark.parametrize(
    "override", [f"model.base={SECRET}", "token=correct-horse", SECRET, f"optimizer={{x: {SECRET}}}"]
)
def test_the_command_line_is_no_place_for_secrets_either(folder, override):
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        load_run_config("base.yaml", [override])
    assert SECRET not in str(caught.value)
    assert "correct-horse" not in str(caught.value)


def test_a_secret_is_not_repeated_by_the_errors_of_its_neighbours(write):
    with pytest.raises(ConfigError) as caught:
        load_run_config(write(f"seed: [x, {SECRET}]\n{SECRET}: 3\nmodel: {{base: [{SECRET}]}}"))
    assert SECRET not in str(caught.value)


def test_a_secret_in_an_argument_of_a_launcher_is_refused(folder):
    (folder / "p.yaml").write_text(
        f"name: p\noutput_dir: o\nlauncher: [env, HF_TOKEN={SECRET}]\nstages: [{{config: a}}]\n"
    )
    with pytest.raises(ConfigError, match=r"launcher\[1\]: this looks like a secret") as caught:
        load_pipeline_config("p.yaml")
    assert len(caught.value.problems) == 1


def test_no_key_of_the_schema_looks_like_a_secret():
    keys = [key for model in (RunConfig, PipelineConfig) for key in outline_of(model).known_keys]
    assert len(keys) > 50
    assert not [key for key in keys if looks_secret(key, None)]


@pytest.mark.parametrize(
    "value",
    [
        "tokens",
        "google/gemma-3-4b-it",
        "runs/hf_model",
        "a" * 40,
        "s3://bucket/path",
        "--max_tokens=5",
        "--max_token=5",
        "postgresql://host/db?sslmode=require&password_file=x",
    ],
)
def test_ordinary_values_pass(value):
    assert not looks_secret("base", value)
    assert not looks_secret("max_sequence_tokens", value)
