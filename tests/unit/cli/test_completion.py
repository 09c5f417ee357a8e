"""Protects shell completion: commands, options, config files and names, by each shell's protocol, without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from theworld_train.accounting.gpus import gpu_specs
from theworld_train.cli.app import COMMANDS, PROGRAM, app
from theworld_train.cli.completion import MOST, OPTION_NAMES, config_files
from theworld_train.config.schema import ABLATIONS, FRAME_ABLATIONS, OFFLOADING


def offered(*words: str) -> list[str]:
    """Returns what bash is offered for the last of some words."""
    line = [PROGRAM, *words]
    environment = {
        "_THEWORLD_TRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(line),
        "COMP_CWORD": str(len(line) - 1),
    }
    result = CliRunner().invoke(app, [], prog_name=PROGRAM, env=environment)
    return result.stdout.split()


def test_commands_are_offered_from_the_table():
    assert offered("") == list(COMMANDS)
    assert offered("pl") == ["plan"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options_of_every_command_are_offered(name):
    assert "--help" in offered(name, "--")


def test_config_files_are_offered_and_what_runs_wrote_is_not(folder: Path):
    for path in ("configs/stages/a.yaml", "configs/b.yml", "runs/x/config.yaml", ".hidden/c.yaml", "configs/notes.md"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    assert offered("validate", "configs/") == ["configs/b.yml", "configs/stages/a.yaml"]
    everything = ["configs/b.yml", "configs/stages/a.yaml", "good.yaml", "pipeline.yaml", "wrong.yaml"]
    assert offered("run", "") == everything
    assert config_files("optimizer.lr=") == []
    assert offered("train", "runs/x/") == ["runs/x/config.yaml"], "unless they are asked for"


def test_no_more_files_are_offered_than_can_be_read(folder: Path):
    for number in range(MOST + 5):
        (folder / f"many-{number}.yaml").touch()
    assert len(config_files("many-")) == MOST


def test_names_of_options_are_offered_in_lists_with_commas():
    gpus = [spec.name for spec in gpu_specs()]
    assert offered("plan", "a.yaml", "--gpu", "") == gpus
    assert offered("plan", "a.yaml", "--gpu", f"{gpus[0]},rtx-4") == [f"{gpus[0]},rtx-4090"]
    assert offered("plan", "a.yaml", "--strategy", "zero") == ["zero1", "zero2", "zero3"]
    assert offered("plan", "a.yaml", "--offload", "") == list(OFFLOADING)
    assert offered("evaluate", "runs/x", "--ablation", "") == [*ABLATIONS, *FRAME_ABLATIONS]
    assert offered("encode", "a.yaml", "--only", "world_e") == ["world_encoder"]
    assert offered("checkpoint", "") == ["list", "verify", "show", "prune"]


def test_every_option_with_names_belongs_to_a_command():
    from theworld_train.cli.app import load_command

    options = {name for command in COMMANDS for option in load_command(command).params for name in option.opts}
    assert OPTION_NAMES.keys() - options == set()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell):
    result = CliRunner().invoke(app, [], prog_name=PROGRAM, env={"_THEWORLD_TRAIN_COMPLETE": f"source_{shell}"})
    assert result.exit_code == 0
    assert PROGRAM in result.stdout


def test_completion_imports_no_framework(folder: Path):
    import os
    import subprocess

    code = "import sys\nfrom theworld_train.cli.app import app\ntry:\n    app(prog_name='theworld-train')\n"
    code += "finally:\n    print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)"
    words = {"COMP_WORDS": f"{PROGRAM} plan good.yaml --gpu h", "COMP_CWORD": "4"}
    environment = {**os.environ, "_THEWORLD_TRAIN_COMPLETE": "complete_bash", **words}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "h100-80gb" in done.stdout
    assert done.stderr.strip() == "[]"
