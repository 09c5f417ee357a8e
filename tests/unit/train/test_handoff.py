"""What a run takes from a checkpoint: its components unrounded, and only if the bases and shapes are the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.checkpoint_files import Origin, file_sha256
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.model import TheWorld
from theworld_train.model.digest import base_digests
from theworld_train.train.checkpoint import Base
from theworld_train.train.freeze import Precision, apply_trainable
from theworld_train.train.handoff import Inheritance, inherit

Write = Callable[..., Path]
PROJECTOR, TOWER = Component.WORLD_PROJECTOR, Component.VISION_TOWER


@pytest.fixture
def trained(tiny: TinyCheckpoint) -> TheWorld:
    """A model whose world projector and vision tower have moved, to numbers that bf16 cannot hold."""
    model = tiny.theworld(seed=5)
    with torch.no_grad():
        for parameter in [*model.model.vision_tower.parameters(), *model.world_projector.parameters()]:
            parameter.add_(torch.full_like(parameter, 1e-4))
    model.config.world_embedding_rms = model.world_projector.scale = 0.75
    return model


@pytest.fixture
def checkpoint(write_checkpoint: Write, trained: TheWorld, tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "earlier", 7, model=trained, trained=("world_projector", "vision_tower"))


def take(
    tiny: TinyCheckpoint,
    checkpoint: Path,
    trainable: Sequence[Component] = (PROJECTOR,),
    precision: Precision = "fp32",
    *,
    resume: bool = False,
    gemma: str | None = None,
    cosmos: str | None = None,
    **world: Any,
) -> tuple[TheWorld, Inheritance]:
    """Does what a run does at its start."""
    gemma, cosmos = gemma or tiny.gemma, cosmos or tiny.cosmos
    model = TheWorld.from_pretrained(gemma, **{"cosmos": cosmos, "resolution": 32} | world)
    digests = base_digests(model)
    apply_trainable(model, trainable, precision)
    base, encoder = Base(gemma, None), Base(cosmos, None) if model.config.enable_world else None
    return model, inherit(
        model,
        checkpoint,
        base=base,
        encoder=encoder,
        digests=digests,
        resume=resume,
        trained=tuple(trainable),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_components_that_train_are_taken_unrounded(
    tiny: TinyCheckpoint, checkpoint: Path, trained: TheWorld, precision: Precision
):
    model, inheritance = take(tiny, checkpoint, (PROJECTOR, TOWER), precision)
    for name in ("world_projector", "model.vision_tower"):
        expected = dict(trained.get_submodule(name).named_parameters())
        for key, parameter in model.get_submodule(name).named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected[key]), f"{name}.{key}"
            assert parameter.requires_grad
    assert inheritance.source == checkpoint
    assert inheritance.components.keys() == {"world_projector", "vision_tower"}
    assert (inheritance.step, inheritance.rng) == (0, ())


def test_component_that_is_frozen_now_is_taken_in_its_dtype(tiny: TinyCheckpoint, checkpoint: Path, trained: TheWorld):
    model, _ = take(tiny, checkpoint, (PROJECTOR,), "bf16")
    expected = dict(trained.model.vision_tower.named_parameters())
    for name, parameter in model.model.vision_tower.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected[name].bfloat16())


def test_scale_of_world_tokens_is_the_chains(tiny: TinyCheckpoint, checkpoint: Path):
    model, _ = take(tiny, checkpoint)
    assert model.world_projector.scale == model.config.world_embedding_rms == 0.75


def test_resuming_takes_step_and_random_state_too(tiny: TinyCheckpoint, checkpoint: Path):
    _, inheritance = take(tiny, checkpoint, (PROJECTOR, TOWER), resume=True)
    assert inheritance.step == 7
    assert len(inheritance.rng) == 1
    assert inheritance.rng[0].keys() >= {"python", "numpy", "torch"}


def test_resuming_with_a_component_that_never_trained_is_refused(tiny: TinyCheckpoint, checkpoint: Path):
    with pytest.raises(ConfigError, match=r"does not train language_model; use init_from"):
        take(tiny, checkpoint, (PROJECTOR, Component.LANGUAGE_MODEL), resume=True)
    take(tiny, checkpoint, (PROJECTOR, Component.LANGUAGE_MODEL), resume=False)


def test_a_new_stage_starts_from_the_checkpoint_and_a_resumed_one_from_where_it_started(
    tiny: TinyCheckpoint, write_checkpoint: Write, trained: TheWorld, tmp_path: Path
):
    origin = Origin("runs/projection/step-9", "0" * 64)
    checkpoint = write_checkpoint(tmp_path / "earlier", model=trained, init_from=origin)
    _, begun = take(tiny, checkpoint)
    assert begun.origin == Origin(str(checkpoint), file_sha256(checkpoint / "manifest.json"))
    _, resumed = take(tiny, checkpoint, resume=True)
    assert resumed.origin == origin


# -- stages without a world path --------------------------------------------------------------------------------------


def test_scale_of_a_model_without_world_path_is_not_taken(
    tiny: TinyCheckpoint, write_checkpoint: Write, tmp_path: Path
):
    plain = tiny.theworld(enable_world=False)
    assert plain.config.world_embedding_rms == 1.0
    checkpoint = write_checkpoint(tmp_path, model=plain, trained=("language_model",))
    model, _ = take(tiny, checkpoint, projection="linear")
    measured = tiny.theworld().config.world_embedding_rms
    assert measured != 1.0
    assert model.world_projector.scale == model.config.world_embedding_rms == measured


def test_a_stage_without_world_path_hands_on_what_is_the_worlds(
    tiny: TinyCheckpoint, write_checkpoint: Write, trained: TheWorld, checkpoint: Path, tmp_path: Path
):
    model, inheritance = take(tiny, checkpoint, (Component.LANGUAGE_MODEL,), enable_world=False)
    assert inheritance.encoder == Base(tiny.cosmos, None)
    assert inheritance.digests == base_digests(tiny.theworld())
    later = write_checkpoint(
        tmp_path / "text",
        model=model,
        trained=("language_model",),
        carried=inheritance.components,
        digests=inheritance.digests,
    )
    again, _ = take(tiny, later)
    assert again.world_projector.scale == 0.75
    for name, parameter in again.world_projector.named_parameters():
        assert torch.equal(parameter, dict(trained.world_projector.named_parameters())[name]), name
    with pytest.raises(ConfigError, match="world_resize 'pad' there and 'crop' here"):
        take(tiny, later, resize="crop")


def test_base_that_has_moved_is_the_same_base(tiny: TinyCheckpoint, checkpoint: Path, tmp_path: Path):
    shutil.copytree(tiny.gemma, tmp_path / "moved-gemma")
    shutil.copytree(tiny.cosmos, tmp_path / "moved-cosmos")
    take(tiny, checkpoint, gemma=str(tmp_path / "moved-gemma"), cosmos=str(tmp_path / "moved-cosmos"))


def test_base_whose_weights_have_changed_is_refused(tiny: TinyCheckpoint, checkpoint: Path):
    model = tiny.theworld()
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ConfigError, match=r"other weights of language_model, those of .*gemma and .*from mine@abc"):
        inherit(
            model,
            checkpoint,
            base=Base("mine", "abc"),
            encoder=Base(tiny.cosmos, None),
            digests=base_digests(model),
            resume=False,
            trained=(PROJECTOR,),
        )


@pytest.mark.parametrize(
    ("world", "named"),
    [
        ({"projection": "linear"}, "world_projection 'mlp' there and 'linear' here"),
        ({"resolution": 64}, "world_resolution 32 there and 64 here"),
        ({"tokens": "channel"}, "world_tokens 'spatial' there and 'channel' here"),
        ({"max_world_steps": 2}, "max_world_steps 4 there and 2 here"),
        ({"resize": "crop"}, "world_resize 'pad' there and 'crop' here"),
        ({"pool": 2}, "world_pool 1 there and 2 here"),
    ],
)
def test_other_shape_of_the_world_path_is_refused(
    tiny: TinyCheckpoint, checkpoint: Path, world: dict[str, Any], named: str
):
    with pytest.raises(ConfigError, match=f"another shape: .*{named}"):
        take(tiny, checkpoint, **world)


def test_damaged_checkpoint_is_refused_before_anything_is_taken(tiny: TinyCheckpoint, checkpoint: Path):
    file = checkpoint / "vision_tower.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    model = tiny.theworld()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"vision_tower\.safetensors is not what was saved"):
        inherit(
            model,
            checkpoint,
            base=Base(tiny.gemma, None),
            encoder=Base(tiny.cosmos, None),
            digests=base_digests(model),
            resume=False,
            trained=(PROJECTOR,),
        )
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_digests_are_the_bases_and_leave_out_the_projector(tiny: TinyCheckpoint):
    first, second = base_digests(tiny.theworld(seed=0)), base_digests(tiny.theworld(seed=1))
    assert first == second
    assert first.keys() == {component.value for component in Component} - {"world_projector"}
    assert json.loads(json.dumps(first)) == first
