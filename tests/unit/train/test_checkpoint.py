"""Checkpoints: whole or absent, checked to the last bit, and able to put a run back where it was."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.checkpoint_files import (
    FORMAT,
    Origin,
    checkpoint_step,
    checkpoints,
    file_sha256,
    origin_of,
    read_record,
    recorded_origin,
    resolve_checkpoint,
    verify_checkpoint,
)
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.model import TheWorld
from theworld_train.train import checkpoint as checkpoint_module
from theworld_train.train.checkpoint import (
    Carried,
    load_optimizer,
    random_state,
    restore_random_state,
    take_snapshot,
    trained_parameters,
)
from theworld_train.train.engine import ReplicatedEngine
from theworld_train.train.freeze import apply_trainable
from theworld_train.train.groups import build_optimizer

Write = Callable[..., Path]


@pytest.fixture
def saved(write_checkpoint: Write, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run")


# -- the manifest -----------------------------------------------------------------------------------------------------


def test_manifest_names_every_file_with_size_and_hash(saved: Path):
    manifest = verify_checkpoint(saved)
    files = {str(path.relative_to(saved)): path for path in saved.rglob("*") if path.is_file()}
    assert manifest["files"].keys() == files.keys() - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry == {"size": files[name].stat().st_size, "sha256": file_sha256(files[name])}
    assert (manifest["step"], manifest["run"], manifest["world_size"]) == (1, "test", 1)
    assert {"world_projector.safetensors", "optimizer.safetensors", "state.json", "config.yaml"} <= files.keys()
    assert {"components.json", "config.json", "ledger.json", "processor_config.json", "tokenizer.json"} <= files.keys()


@pytest.mark.parametrize("name", ["world_projector.safetensors", "state.json", "config.yaml", "tokenizer.json"])
def test_truncated_file_is_found(saved: Path, name: str):
    file = saved / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{name} is not what was saved"):
        verify_checkpoint(saved)


def test_flipped_bit_is_found(saved: Path):
    file = saved / "world_projector.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"world_projector\.safetensors is not what was saved"):
        verify_checkpoint(saved)


def test_missing_file_is_found(saved: Path):
    (saved / "optimizer.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"optimizer\.safetensors is missing"):
        verify_checkpoint(saved)


@pytest.mark.parametrize("text", ["", '{"files": {"a', "{}"])
def test_damaged_manifest_is_found(saved: Path, text: str):
    (saved / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        verify_checkpoint(saved)


# -- finding ----------------------------------------------------------------------------------------------------------


def test_unsealed_directories_are_ignored(saved: Path, write_checkpoint: Write):
    run = saved.parent
    for name in ("step-9", ".step-5.partial", "step-x", "step-"):
        shutil.copytree(saved, run / name)
    (run / "step-9" / "manifest.json").unlink()
    assert checkpoints(run) == [saved]
    assert resolve_checkpoint(run) == saved
    with pytest.raises(ConfigError, match=r"step-9 is no complete checkpoint"):
        verify_checkpoint(run / "step-9")
    with pytest.raises(ConfigError, match=r"step-9 is no checkpoint"):
        resolve_checkpoint(run / "step-9")
    verify_checkpoint(write_checkpoint(run, 9))
    assert resolve_checkpoint(run) == run / "step-9", "the step is saved in the place of what was left unsealed"


def test_steps_are_numbers_and_not_text(write_checkpoint: Write, tmp_path: Path):
    for step in (10, 9, 100):
        write_checkpoint(tmp_path, step, keep_last=9)
    assert [checkpoint_step(path) for path in checkpoints(tmp_path)] == [9, 10, 100]
    assert resolve_checkpoint(tmp_path) == tmp_path / "step-100"
    assert resolve_checkpoint(tmp_path / "step-9") == tmp_path / "step-9"


def test_directory_without_a_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"is no checkpoint.*manifest\.json"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="is no checkpoint"):
        resolve_checkpoint(tmp_path / "absent")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_newest_checkpoints_stay(write_checkpoint: Write, tmp_path: Path):
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-3"]
    for path in checkpoints(tmp_path):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError("no space left"), ConfigError),
        (SafetensorError("no space left"), ConfigError),
        (KeyboardInterrupt("no space left"), KeyboardInterrupt),
    ],
)
def test_failure_while_writing_leaves_no_checkpoint(
    write_checkpoint: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    raised: type[BaseException],
):
    write_checkpoint(tmp_path, 1, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "seal", lambda *_: (_ for _ in ()).throw(failure))
        with pytest.raises(raised, match="no space left"):
            write_checkpoint(tmp_path, 2, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"], "nothing is left of what was not completed"
    assert resolve_checkpoint(tmp_path) == tmp_path / "step-1", "the older one stays until the newer one is whole"
    verify_checkpoint(write_checkpoint(tmp_path, 2, keep_last=1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_failure_after_the_seal_leaves_nothing_sealed(
    write_checkpoint: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: Path, _: Path) -> None:
        assert (path / "manifest.json").is_file()
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigError) as caught:
        write_checkpoint(tmp_path / "run")
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == ("output_dir", str(tmp_path / "run"))
    assert "No space left on device" in problem.message
    assert "bytes are free" in problem.message
    assert "resume=latest" in problem.hint
    assert list((tmp_path / "run").iterdir()) == []


def test_older_checkpoint_that_cannot_be_removed_fails_no_save(
    write_checkpoint: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: Path, _keep: int) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    write_checkpoint(tmp_path, 1, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "retire", refuse)
        with pytest.raises(ConfigError, match=r"step-2 is saved, but an older checkpoint cannot be removed.*denied"):
            write_checkpoint(tmp_path, 2, keep_last=1)
    verify_checkpoint(tmp_path / "step-2")


@pytest.mark.parametrize("full", [True, False])
def test_full_disk_is_a_plain_error(write_checkpoint: Write, tmp_path: Path, full: bool):
    # Above the size of a file that this process may write, the system answers as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full else before[0], before[1]))
    try:
        if full:
            with pytest.raises(ConfigError, match="a checkpoint cannot be saved there"):
                write_checkpoint(tmp_path, trained=("language_model",))
        else:
            verify_checkpoint(write_checkpoint(tmp_path, trained=("language_model",)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ([] if full else ["step-1"])


def test_saved_step_is_never_written_again(write_checkpoint: Write, tmp_path: Path, tiny: TinyCheckpoint):
    first = write_checkpoint(tmp_path, 1, model=tiny.theworld(seed=0))
    before = file_sha256(first / "world_projector.safetensors")
    assert write_checkpoint(tmp_path, 1, model=tiny.theworld(seed=1)) == first
    assert file_sha256(first / "world_projector.safetensors") == before


def test_masters_are_saved_in_full(write_checkpoint: Write, tmp_path: Path, tiny: TinyCheckpoint):
    model = tiny.theworld()
    apply_trainable(model, [Component.WORLD_PROJECTOR, Component.VISION_TOWER], "bf16")
    path = write_checkpoint(tmp_path, model=model, trained=("world_projector", "vision_tower"))
    for component, module in (("world_projector", model.world_projector), ("vision_tower", model.model.vision_tower)):
        tensors = load_file(path / f"{component}.safetensors")
        expected = dict(module.named_parameters())
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].dtype == torch.float32 for name in tensors)
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_carried_file_is_the_same_to_the_last_byte(write_checkpoint: Write, tmp_path: Path, tiny: TinyCheckpoint):
    model = tiny.theworld()
    earlier = write_checkpoint(
        tmp_path / "vision", model=model, trained=("world_projector", "vision_tower"), run_name="vision"
    )
    source = earlier / "vision_tower.safetensors"
    content = source.read_bytes()
    carried = {"vision_tower": Carried(source, file_sha256(source), "vision")}
    model.model.vision_tower.to(torch.bfloat16)  # how the later stage holds it
    later = write_checkpoint(tmp_path / "language", 2, model=model, carried=carried, run_name="language")
    assert (later / "vision_tower.safetensors").read_bytes() == content
    record = json.loads((later / "components.json").read_text())["components"]
    assert record["vision_tower"] == {
        "file": "vision_tower.safetensors",
        "sha256": file_sha256(source),
        "trained_by": "vision",
    }
    assert record["world_projector"]["trained_by"] == "language"
    shutil.rmtree(earlier)
    verify_checkpoint(later)
    assert (later / "vision_tower.safetensors").read_bytes() == content


def test_files_are_carried_through_a_model_that_lacks_their_component(
    write_checkpoint: Write, saved: Path, tmp_path: Path, tiny: TinyCheckpoint
):
    source = saved / "world_projector.safetensors"
    carried = {"world_projector": Carried(source, file_sha256(source), "test")}
    model = tiny.theworld(enable_world=False)
    later = write_checkpoint(tmp_path / "text", model=model, trained=("language_model",), carried=carried)
    record = json.loads((later / "components.json").read_text())["components"]
    assert record.keys() == {"language_model", "world_projector"}
    assert (later / "world_projector.safetensors").read_bytes() == source.read_bytes()
    verify_checkpoint(later)


def test_what_has_never_trained_names_no_run(write_checkpoint: Write, tmp_path: Path):
    path = write_checkpoint(tmp_path, trained=("vision_tower",), initialised=("world_projector",), run_name="vision")
    record = json.loads((path / "components.json").read_text())["components"]
    assert {name: entry["trained_by"] for name, entry in record.items()} == {
        "vision_tower": "vision",
        "world_projector": None,
    }
    assert file_sha256(path / "world_projector.safetensors") == record["world_projector"]["sha256"]


def test_origin_is_recorded(write_checkpoint: Write, saved: Path, tmp_path: Path):
    origin = origin_of(saved)
    assert origin == Origin(str(saved), file_sha256(saved / "manifest.json"))
    later = write_checkpoint(tmp_path / "later", init_from=origin)
    assert recorded_origin(read_record(later / "components.json")) == origin
    assert recorded_origin(read_record(saved / "components.json")) is None


# -- the format -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["manifest.json", "components.json", "state.json"])
@pytest.mark.parametrize("found", [FORMAT - 1, FORMAT + 1, "2"])
def test_another_format_is_refused_by_name(saved: Path, name: str, found: object):
    record = json.loads((saved / name).read_text())
    assert record["format"] == FORMAT
    (saved / name).write_text(json.dumps(record | {"format": found}))
    read = (lambda: verify_checkpoint(saved)) if name == "manifest.json" else (lambda: read_record(saved / name))
    with pytest.raises(ConfigError, match=rf"{name} is of format {found!r}, .*reads format {FORMAT}"):
        read()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2'])
def test_damaged_record_is_refused(tmp_path: Path, text: str):
    file = tmp_path / "components.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"components\.json is damaged"):
        read_record(file)
    with pytest.raises(ConfigError, match=r"state\.json cannot be read: No such file"):
        read_record(tmp_path / "state.json")


def test_file_systems_without_links_get_a_copy(
    write_checkpoint: Write, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(checkpoint_module.os, "link", refuse)
    source = saved / "world_projector.safetensors"
    carried = {"world_projector": Carried(source, file_sha256(source), "test")}
    later = write_checkpoint(tmp_path / "later", trained=(), carried=carried)
    assert (later / "world_projector.safetensors").read_bytes() == source.read_bytes()
    assert (later / "world_projector.safetensors").stat().st_ino != source.stat().st_ino
    verify_checkpoint(later)


# -- the optimizer ----------------------------------------------------------------------------------------------------


def stepped(model: TheWorld, config: RunConfig) -> ReplicatedEngine:
    """Returns an engine whose optimizer has taken two steps."""
    apply_trainable(model, tuple(config.trainable), "fp32")
    optimizer = build_optimizer(model, config)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return ReplicatedEngine(model, lambda: optimizer)


def fresh_engine(model: TheWorld, config: RunConfig) -> ReplicatedEngine:
    """Returns an engine whose optimizer has taken no step."""
    apply_trainable(model, tuple(config.trainable), "fp32")
    return ReplicatedEngine(model, lambda: build_optimizer(model, config))


def optimizer_tensors(model: TheWorld, engine: ReplicatedEngine) -> dict[str, Tensor]:
    return take_snapshot(model, engine, (), keep=True).optimizer


def test_optimizer_comes_back_bit_for_bit(
    tiny: TinyCheckpoint, run_config: Callable[..., RunConfig], write_checkpoint: Write, tmp_path: Path
):
    config = run_config("world_projector", "vision_tower")
    model, other = tiny.theworld(), tiny.theworld()
    engine, fresh = stepped(model, config), fresh_engine(other, config)
    path = write_checkpoint(tmp_path / "run", model=model, engine=engine)
    load_optimizer(fresh, trained_parameters(other), path / "optimizer.safetensors")
    expected, actual = optimizer_tensors(model, engine), optimizer_tensors(other, fresh)
    assert {name.split("::")[1] for name in expected} == {"step", "exp_avg", "exp_avg_sq"}
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
        assert value.dtype == actual[name].dtype, name


@pytest.mark.parametrize(
    ("others", "strange"),
    [(("world_projector",), "vision_tower"), (("world_projector", "vision_tower", "language_model"), "language_model")],
)
def test_optimizer_of_another_trainable_set_is_refused(
    tiny: TinyCheckpoint,
    run_config: Callable[..., RunConfig],
    write_checkpoint: Write,
    tmp_path: Path,
    others: tuple[str, ...],
    strange: str,
):
    model, other = tiny.theworld(), tiny.theworld()
    engine = stepped(model, run_config("world_projector", "vision_tower"))
    path = write_checkpoint(tmp_path / "run", model=model, engine=engine)
    fresh = fresh_engine(other, run_config(*others))
    with pytest.raises(ConfigError, match=rf"another trainable set.*{strange}.*init_from"):
        load_optimizer(fresh, trained_parameters(other), path / "optimizer.safetensors")
    assert not fresh.optimizer.state, "nothing was taken over"


# -- random states ----------------------------------------------------------------------------------------------------


@pytest.fixture
def _random_state_restored() -> Iterator[None]:
    before = random_state()
    yield
    restore_random_state(before)


def draw() -> tuple[object, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        tuple(np.random.standard_normal(3)),
        tuple(torch.randn(3).tolist()),
        tuple(nn.functional.dropout(torch.ones(20)).tolist()),
    )


@pytest.mark.usefixtures("_random_state_restored")
def test_random_state_survives_json():
    draw()
    state = json.loads(json.dumps(random_state()))
    expected = [draw() for _ in range(3)]
    assert expected[0] != expected[1]
    restore_random_state(state)
    assert [draw() for _ in range(3)] == expected


@pytest.mark.usefixtures("_random_state_restored")
def test_checkpoint_holds_the_state_of_each_rank(saved: Path):
    state = json.loads((saved / "state.json").read_text())
    assert state["step"] == 1
    assert state["world_size"] == len(state["rng"]) == 1
    restore_random_state(state["rng"][0])
    first = draw()
    restore_random_state(state["rng"][0])
    assert draw() == first
