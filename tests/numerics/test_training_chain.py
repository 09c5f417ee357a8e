"""Stages in a row: what one has trained is in every later checkpoint, to the last bit, and loads as it was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny import held_out, logits
from theworld_train.assemble.model import load_model
from theworld_train.checkpoint_files import Origin, origin_of, read_record, recorded_origin
from theworld_train.config.components import Component
from theworld_train.config.schema import RunConfig
from theworld_train.export.directory import DTYPES, Dtype, export
from theworld_train.model import TheWorld

CHAIN = ("projection", "vision", "language")
EVERYTHING = tuple(Component)


@pytest.fixture(params=["fp32", "bf16"])
def chain(
    request: pytest.FixtureRequest,
    shipped: Callable[..., RunConfig],
    finish: Callable[[RunConfig], Any],
    tmp_path: Path,
) -> dict[str, Any]:
    """The finished runs of three stages, each from the one before."""
    runs: dict[str, Any] = {}
    for stage in CHAIN:
        previous = {"init_from": str(tmp_path / list(runs)[-1])} if runs else {}
        runs[stage] = finish(shipped(stage, tmp_path / stage, precision=request.param, **previous))
    runs["precision"] = request.param
    return runs


def components(run: Any) -> dict[str, dict[str, str]]:
    return json.loads((run.checkpoint / "components.json").read_text())["components"]


def origin(run: Any) -> Origin | None:
    return recorded_origin(read_record(run.checkpoint / "components.json"))


def file(run: Any, component: str) -> bytes:
    return (run.checkpoint / f"{component}.safetensors").read_bytes()


def test_checkpoints_hold_all_that_the_chain_has_trained(chain: dict[str, Any]):
    vision, language = chain["vision"], chain["language"]
    assert components(chain["projection"]).keys() == {"world_projector"}
    assert components(vision).keys() == {"world_projector", "vision_tower", "multi_modal_projector"}
    assert components(language).keys() == {*components(vision), "language_model"}
    for name in ("vision_tower", "multi_modal_projector"):
        assert file(language, name) == file(vision, name), f"{name} is frozen in the later stage"
        assert components(language)[name]["trained_by"] == "vision"
    assert file(language, "world_projector") != file(vision, "world_projector")
    assert origin(chain["projection"]) is None
    for stage, before in zip(CHAIN[1:], CHAIN, strict=False):
        assert origin(chain[stage]) == origin_of(chain[before].checkpoint)
    optimizers = load_file(language.checkpoint / "optimizer.safetensors")
    assert {name.split(".")[0] for name in optimizers} == {"world_projector", "model"}
    assert not [name for name in optimizers if "vision_tower" in name]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_frozen_tower_is_in_the_last_checkpoint_and_its_export(
    dtype: Dtype,
    chain: dict[str, Any],
    shipped: Callable[..., RunConfig],
    finish: Callable[[RunConfig], Any],
    tmp_path: Path,
):
    """The shipped last stage trains the tower on, so it is left out of that one's table here."""
    table = {"trainable": {"world_projector": {}, "language_model": {}, "world_encoder": {}}, "expect_trainable": None}
    source = {"init_from": str(chain["language"].checkpoint), "precision": chain["precision"]}
    full = finish(shipped("full", tmp_path / "full", **source, **table))
    assert file(full, "vision_tower") == file(chain["vision"], "vision_tower")
    assert components(full)["vision_tower"]["trained_by"] == "vision"
    export(full.checkpoint, tmp_path / "exported", dtype)
    exported = TheWorld.from_pretrained(tmp_path / "exported")
    trained = load_file(chain["vision"].checkpoint / "vision_tower.safetensors")
    for name, parameter in exported.model.vision_tower.named_parameters():
        assert parameter.dtype == DTYPES[dtype]
        assert torch.equal(parameter, trained.pop(name).to(DTYPES[dtype])), name
    assert not trained


def test_thawed_masters_are_what_the_stage_before_the_last_left(
    chain: dict[str, Any], shipped: Callable[..., RunConfig], tmp_path: Path
):
    config = shipped("full", tmp_path / "full", precision=chain["precision"])
    model = load_model(config, EVERYTHING, chain["language"].checkpoint).model
    expected = load_file(chain["vision"].checkpoint / "vision_tower.safetensors")
    for name, parameter in model.model.vision_tower.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected[name]), name
    rounded = [name for name, value in expected.items() if torch.equal(value, value.bfloat16().float())]
    assert len(rounded) < len(expected) / 2, "numbers that bf16 can hold would prove nothing"
    frozen = chain["language"].model.model.vision_tower
    dtype = torch.bfloat16 if chain["precision"] == "bf16" else torch.float32
    for name, parameter in frozen.named_parameters():
        assert torch.equal(parameter, expected[name].to(dtype)), name


def test_a_stage_without_world_path_loses_nothing_of_it(
    shipped: Callable[..., RunConfig], finish: Callable[[RunConfig], Any], tmp_path: Path
):
    world = finish(shipped("projection", tmp_path / "world"))
    text = finish(
        shipped(
            "language",
            tmp_path / "text",
            model__world__enabled=False,
            trainable={"language_model": {}},
            expect_trainable=None,
            init_from=str(world.directory),
        )
    )
    assert components(text).keys() == {"world_projector", "language_model"}
    assert components(text)["world_projector"] == components(world)["world_projector"]
    assert file(text, "world_projector") == file(world, "world_projector")
    config = shipped("vision", tmp_path / "vision", init_from=str(text.directory))
    again = load_model(config, (Component.VISION_TOWER,), text.checkpoint).model
    for name, parameter in again.world_projector.named_parameters():
        trained = dict(world.model.world_projector.named_parameters())[name]
        assert torch.equal(parameter, trained.to(parameter.dtype)), name
    assert again.world_projector.scale == world.model.world_projector.scale != 1.0


def test_a_world_projector_that_never_trained_names_no_run(
    shipped: Callable[..., RunConfig], finish: Callable[[RunConfig], Any], tmp_path: Path
):
    table = {"trainable": {"vision_tower": {}}, "expect_trainable": None}
    first = finish(shipped("vision", tmp_path / "first", **table))
    assert components(first)["vision_tower"]["trained_by"] == "vision"
    assert components(first)["world_projector"]["trained_by"] is None
    second = finish(shipped("vision", tmp_path / "second", init_from=str(first.directory), name="again", **table))
    assert components(second)["world_projector"] == components(first)["world_projector"]
    third = finish(shipped("projection", tmp_path / "third", init_from=str(second.directory)))
    assert components(third)["world_projector"]["trained_by"] == "projection"


def test_a_resumed_run_keeps_its_origin_though_its_source_has_changed(
    shipped: Callable[..., RunConfig], finish: Callable[[RunConfig], Any], tmp_path: Path
):
    source = finish(shipped("projection", tmp_path / "source"))
    settings = {"init_from": str(source.directory), "resume": "latest", "allow_changed": ["training.max_steps"]}
    begun = finish(shipped("vision", tmp_path / "run", **settings))
    recorded = origin(begun)
    assert recorded == origin_of(source.checkpoint)
    shutil.rmtree(source.directory)
    resumed = finish(shipped("vision", tmp_path / "run", training__max_steps=3, **settings))
    assert resumed.checkpoint.name == "step-3"
    assert origin(resumed) == recorded


def test_a_stage_starts_from_the_weights_of_the_one_before(
    chain: dict[str, Any], shipped: Callable[..., RunConfig], finish: Callable[[RunConfig], Any], tmp_path: Path
):
    settings = {"precision": chain["precision"], "training__max_steps": 1}
    source = str(chain["language"].checkpoint)
    on = finish(shipped("language", tmp_path / "on", init_from=source, **settings))
    afresh = finish(shipped("language", tmp_path / "afresh", **settings))
    assert on.train[0]["train/loss"] < afresh.train[0]["train/loss"]
    assert on.train[0]["step"] == 1
    # The first step of a fresh optimizer: its moments are those of one gradient.
    assert set(load_file(on.checkpoint / "optimizer.safetensors")) == set(
        load_file(chain["language"].checkpoint / "optimizer.safetensors")
    )
    steps = {
        float(value)
        for name, value in load_file(on.checkpoint / "optimizer.safetensors").items()
        if name.endswith("::step")
    }
    assert steps == {1.0}


def test_checkpoint_loads_as_the_model_that_was_trained(
    chain: dict[str, Any], shipped: Callable[..., RunConfig], tmp_path: Path
):
    run = chain["language"]
    loaded = TheWorld.from_pretrained(run.checkpoint)
    batch = held_out(run.checkpoint, shipped("language", tmp_path))
    assert loaded.world_projector.scale == run.model.world_projector.scale
    if chain["precision"] == "fp32":
        for (name, parameter), trained in zip(loaded.named_parameters(), run.model.parameters(), strict=True):
            assert torch.equal(parameter, trained), name
        assert torch.equal(logits(loaded, batch), logits(run.model, batch))
    else:
        # The run holds fp32 masters and computes in bf16; what is loaded holds what its base holds, here fp32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            trained = logits(run.model, batch).float()
        base = logits(TheWorld.from_pretrained(chain["projection"].checkpoint), batch)
        near, far = ((other - trained).abs().mean() for other in (logits(loaded, batch), base))
        print(f"mean difference of logits: {near:.4f}, from those of the first stage: {far:.4f}")
        assert near < 0.1 * far


def test_saved_model_loads_without_the_checkpoint_and_its_bases(
    chain: dict[str, Any], shipped: Callable[..., RunConfig], tmp_path: Path
):
    run = chain["language"]
    loaded = TheWorld.from_pretrained(run.checkpoint)
    loaded.save_pretrained(tmp_path / "whole")
    again = TheWorld.from_pretrained(tmp_path / "whole")
    batch = held_out(run.checkpoint, shipped("language", tmp_path / "run"))
    assert torch.equal(logits(again, batch), logits(loaded, batch))
