"""Run directories that have been damaged, filled or taken away: every damage is found and named."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.faults.conftest import Save, settings
from tests.helpers.tiny import TinyCheckpoint
from theworld_train.assemble.run import train
from theworld_train.checkpoint_files import FORMAT, checkpoints, file_sha256, verify_checkpoint
from theworld_train.cli.app import app
from theworld_train.config import parse_run_config
from theworld_train.config.errors import ConfigError
from theworld_train.model import TheWorld
from theworld_train.train import checkpoint as checkpoint_module
from theworld_train.train.checkpoint import retire, seal

CLASSES = (
    "world_projector.safetensors",
    "optimizer.safetensors",
    "components.json",
    "state.json",
    "ledger.json",
    "config.yaml",
    "config.json",
    "processor_config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "manifest.json",
)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(path: Path) -> None:
    """Puts another file of the same size there."""
    path.write_bytes(bytes(reversed(path.read_bytes())))


Damage = Callable[[Path], None]
DAMAGES: dict[str, Damage] = {"truncate": truncate, "flip": flip, "replace": replace, "delete": Path.unlink}


@pytest.fixture(scope="module")
def finished(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints of the last two."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    resume(tiny, directory, {"resume": None})
    return directory


def resume(tiny: TinyCheckpoint, directory: Path, sections: dict[str, Any]) -> str:
    """Trains and returns what it has printed."""
    values = settings(tiny, directory, steps=4) | {"checkpoint": {"every_steps": 2}, "resume": "latest"} | sections
    shown = io.StringIO()
    train(parse_run_config(values), Console(file=shown, width=500))
    return shown.getvalue()


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", CLASSES)
def test_damage_to_any_file_is_found_and_the_file_is_named(name: str, damage: str, run: Path):
    DAMAGES[damage](run / "step-4" / name)
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        verify_checkpoint(run / "step-4")


def test_every_bit_of_the_manifest_is_sealed(run: Path):
    path = run / "step-4" / "manifest.json"
    whole = path.read_text()
    for key, value in (("run", "other"), ("step", 5), ("world_size", 2), ("files", {})):
        path.write_text(json.dumps(json.loads(whole) | {key: value}))
        with pytest.raises(ConfigError, match=r"manifest\.json is damaged: it does not agree with its own SHA-256"):
            verify_checkpoint(run / "step-4")


def test_file_that_has_changed_is_named_with_both_sizes_and_hashes(run: Path):
    file = run / "step-4" / "optimizer.safetensors"
    size, sha256 = file.stat().st_size, file_sha256(file)
    truncate(file)
    with pytest.raises(ConfigError) as caught:
        verify_checkpoint(run / "step-4")
    for part in (f"{size - 1:,} bytes", file_sha256(file), f"{size:,} bytes", sha256):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", "manifest.json"])
def test_latest_falls_back_to_the_one_before(name: str, tiny: TinyCheckpoint, run: Path, finished: Path):
    (run / "step-4" / name).unlink()
    shown = resume(tiny, run, {})
    assert "resumes at step 2" in shown
    if name != "manifest.json":
        assert f"{name} is missing" in shown
        assert (run / ".step-4.damaged").is_dir()
    again = run / "step-4"
    verify_checkpoint(again)
    for file in ("world_projector.safetensors", "optimizer.safetensors", "state.json"):
        assert file_sha256(again / file) == file_sha256(finished / "step-4" / file)


def test_damaged_checkpoint_that_is_named_is_an_error(tiny: TinyCheckpoint, run: Path):
    (run / "step-4" / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"state\.json is missing"):
        resume(tiny, run, {"resume": str(run / "step-4")})
    assert (run / "step-4").is_dir()


def test_other_format_is_no_damage(tiny: TinyCheckpoint, run: Path):
    path = run / "step-4" / "manifest.json"
    path.write_text(path.read_text().replace(f'"format": {FORMAT}', '"format": 1'))
    with pytest.raises(ConfigError, match="is of format 1"):
        resume(tiny, run, {})
    assert (run / "step-4").is_dir(), "it is another version's to read"


def test_order_is_that_of_steps_whatever_the_clock_says(run: Path):
    shutil.copytree(run / "step-4", run / "step-10")
    for path, time in ((run / "step-10", 0), (run / "step-2", 2e9)):
        os.utime(path, (time, time))
        os.utime(path / "manifest.json", (time, time))
    assert [path.name for path in checkpoints(run)] == ["step-2", "step-4", "step-10"]


def test_nothing_is_retired_for_a_checkpoint_that_is_not_whole(run: Path):
    flip(run / "step-4" / "optimizer.safetensors")
    with pytest.raises(ConfigError, match=r"optimizer\.safetensors is not what was saved"):
        retire(run, 1)
    assert [path.name for path in checkpoints(run)] == ["step-2", "step-4"]


def test_remains_are_removed_when_a_run_begins(tiny: TinyCheckpoint, run: Path):
    for name in (".step-9.partial", ".step-1.trash"):
        (run / name).mkdir()
        (run / name / "file").touch()
    resume(tiny, run, {})
    assert not list(run.glob(".step-*"))


def test_checkpoint_that_will_not_fit_is_told_before_a_model_loads(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr("theworld_train.assemble.steps.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError, match=r"a checkpoint takes [\d,]+ bytes, but 1,000 are free there") as error:
        resume(tiny, tmp_path / "run", {})
    assert str(tmp_path / "run") in str(error.value)


def test_save_that_does_not_fit_is_refused_before_it_begins(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(checkpoint_module, "save_file", lambda *_: pytest.fail("it has begun to write"))
    with pytest.raises(
        ConfigError, match=r"the checkpoint takes [\d,]+ bytes, more than are free.*1,000 bytes"
    ) as error:
        save(tmp_path / "run", 4)
    assert str(tmp_path / "run") in str(error.value)
    assert not list((tmp_path / "run").iterdir())


def test_output_directory_that_cannot_be_is_told_before_a_model_loads(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setattr("theworld_train.assemble.steps.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    with pytest.raises(ConfigError, match="output_dir"):
        resume(tiny, tmp_path / "file" / "run", {})


# -- files that are not ours -----------------------------------------------------------------------------------------


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_checkpoints_hold_text_and_safetensors_alone(run: Path):
    for path in (run / "step-4").iterdir():
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            assert path.suffix in (".json", ".yaml", ".jinja"), path.name
            path.read_text()


def test_pickles_in_a_checkpoint_are_not_looked_at(tiny: TinyCheckpoint, run: Path, finished: Path, tmp_path: Path):
    shutil.rmtree(run / "step-4")
    for name in ("pytorch_model.bin", "world_projector.bin", "optimizer.pt", "rng_state.pth", "model.pkl"):
        (run / "step-2" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    resume(tiny, run, {})
    assert file_sha256(run / "step-4" / "state.json") == file_sha256(finished / "step-4" / "state.json")
    TheWorld.from_pretrained(str(run / "step-2"))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["world_projector.safetensors", "optimizer.safetensors", "state.json"])
def test_pickle_under_the_name_of_another_file_is_refused(name: str, tiny: TinyCheckpoint, run: Path, tmp_path: Path):
    """Even if all hashes agree with it."""
    checkpoint = run / "step-2"
    shutil.rmtree(run / "step-4")
    (checkpoint / name).write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    record = json.loads((checkpoint / "components.json").read_text())
    for entry in record["components"].values():
        entry["sha256"] = file_sha256(checkpoint / entry["file"])
    (checkpoint / "components.json").write_text(json.dumps(record))
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, {"step": 2, "run": "run", "world_size": 1})
    with pytest.raises((ConfigError, SafetensorError)):
        resume(tiny, run, {})
    assert not (tmp_path / "mark").exists()


# -- the command -----------------------------------------------------------------------------------------------------


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    return result.exit_code, result.output


def test_command_lists_and_verifies(run: Path):
    code, text = call("list", run)
    assert code == 0
    assert [f"step-{step}  step {step}  run run" in line for step, line in zip((2, 4), text.splitlines(), strict=True)]
    assert call("verify", run) == (0, f"{run}/step-2: whole\n{run}/step-4: whole\n")
    flip(run / "step-2" / "optimizer.safetensors")
    code, text = call("verify", run)
    assert code == 2
    assert f"{run}/step-4: whole" in text
    assert "optimizer.safetensors is not what was saved" in text


def test_command_shows_where_weights_come_from(tiny: TinyCheckpoint, run: Path):
    code, text = call("show", run)
    assert code == 0
    assert f"{run}/step-4: step 4 of run run" in text
    assert f"base: {tiny.gemma}" in text
    sha256 = file_sha256(run / "step-4" / "world_projector.safetensors")
    assert f"world_projector: trained by run, sha256 {sha256}" in text


def test_command_prunes_all_but_the_newest(run: Path):
    assert call("prune", run) == (0, f"{run}/step-2: removed\n")
    assert [path.name for path in checkpoints(run)] == ["step-4"]
    assert call("prune", run) == (0, "")


def test_command_says_that_a_directory_holds_nothing(tmp_path: Path):
    code, text = call("list", tmp_path)
    assert code == 2
    assert "holds no complete checkpoint" in text
