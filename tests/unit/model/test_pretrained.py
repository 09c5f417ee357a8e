"""Protects loading: nothing missing, nothing extra, nothing rounded, and what is saved comes back exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.helpers.tiny import RESOLUTION, TinyCheckpoint, clip, image, user
from theworld_train.checkpoint_files import FORMAT, file_sha256
from theworld_train.config.components import Component
from theworld_train.config.errors import ConfigError
from theworld_train.model import TheWorld, TheWorldConfig, TheWorldForConditionalGeneration, pretrained
from theworld_train.model.components import component_parameters
from theworld_train.model.digest import base_digests

WEIGHTS = "model.safetensors"
FREEZE_ARGUMENTS = {
    "freeze_gemma_vision": {"vision_tower", "multi_modal_projector"},
    "freeze_gemma_language": {"language_model"},
    "freeze_cosmos_vae": {"world_encoder"},
}


def rewritten(directory: str | Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    """Returns a copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(directory, target)
    save_file(change(load_file(target / WEIGHTS)), target / WEIGHTS, metadata={"format": "pt"})
    return str(target)


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    """Returns whether two modules hold the same names with the same values, to the last bit."""
    expected, actual = left.state_dict(), right.state_dict()
    return expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)


# -- the hub's layouts ------------------------------------------------------------------------------------------------


def hub_names(name: str) -> str:
    """Returns the name that a tensor has in `google/gemma-3-4b-it`, from its name in the model."""
    if name.startswith("model.vision_tower."):
        return name.replace("model.vision_tower.", "vision_tower.vision_model.")
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.")
    return name.removeprefix("model.")


def module_names(name: str) -> str:
    """Returns the name that a tensor has in the model."""
    return name


@pytest.mark.parametrize("layout", [hub_names, module_names])
@pytest.mark.parametrize("enable_world", [True, False])
def test_both_layouts_of_the_hub_load_whole(
    tiny: TinyCheckpoint, tmp_path: Path, layout: Callable[[str], str], enable_world: bool
):
    reference = tiny.gemma3()
    tensors = {layout(name): value.clone() for name, value in reference.named_parameters()}
    source = rewritten(tiny.gemma, tmp_path / "gemma", lambda _: tensors)
    if layout is hub_names:
        assert {name.split(".")[0] for name in tensors} == {"vision_tower", "multi_modal_projector", "language_model"}
        assert "language_model.model.embed_tokens.weight" in tensors
        assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in tensors
    model = TheWorld.from_pretrained(source, cosmos=tiny.cosmos, enable_world=enable_world)
    assert same(model.model, reference.model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_missing_and_extra_tensors_are_named(tiny: TinyCheckpoint, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in tensors.items() if "layers.2.mlp.up_proj" not in name} | {
            "language_model.model.surplus": torch.zeros(1)
        }

    source = rewritten(tiny.gemma, tmp_path / "gemma", change)
    for enable_world in (True, False):
        with pytest.raises(ConfigError, match=r"missing .*layers\.2\.mlp\.up_proj\.weight.*unexpected .*surplus"):
            TheWorld.from_pretrained(source, cosmos=tiny.cosmos, enable_world=enable_world)


def test_tensors_of_another_shape_are_refused(tiny: TinyCheckpoint, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value[:-1].clone() if "layers.2.mlp.up_proj" in name else value for name, value in tensors.items()
        }

    source = rewritten(tiny.gemma, tmp_path / "gemma", change)
    with pytest.raises(ConfigError, match=r"of another shape .*layers\.2\.mlp\.up_proj\.weight"):
        TheWorld.from_pretrained(source, cosmos=tiny.cosmos)


def test_a_saved_model_needs_its_world_path(tiny: TinyCheckpoint, tmp_path: Path):
    tiny.theworld().save_pretrained(tmp_path / "saved")

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in tensors.items() if name != "world_projector.boundary"}

    source = rewritten(tmp_path / "saved", tmp_path / "changed", change)
    with pytest.raises(ConfigError, match=r"missing .*world_projector\.boundary"):
        TheWorld.from_pretrained(source)


def test_a_model_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ConfigError, match="'qwen2'; expected 'gemma3' or 'theworld'"):
        TheWorld.from_pretrained(tmp_path)


def test_a_vocabulary_without_spare_rows_is_refused(tiny: TinyCheckpoint, tmp_path: Path):
    config = json.loads((Path(tiny.gemma) / "config.json").read_text())
    config["text_config"]["vocab_size"] = config["image_token_index"] + 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="no spare embedding rows"):
        TheWorld.from_pretrained(tmp_path, cosmos=tiny.cosmos)


# -- what is fused ----------------------------------------------------------------------------------------------------


def test_the_world_encoder_is_the_vaes(tiny: TinyCheckpoint):
    model, vae = tiny.theworld(), AutoencoderKLWan.from_pretrained(tiny.cosmos, subfolder="vae")
    assert same(model.world_encoder.encoder, vae.encoder)
    assert same(model.world_encoder.quant_conv, vae.quant_conv)
    assert not any("decoder" in name for name, _ in model.named_modules() if name.startswith("world"))
    assert model.config.world_encoder_config["latents_mean"] == vae.config.latents_mean
    assert model.config.world_encoder_config["latents_std"] == vae.config.latents_std


def test_the_world_encoder_stays_in_fp32_and_is_never_rounded(tiny: TinyCheckpoint, tmp_path: Path):
    reference = tiny.theworld()
    fused = tiny.theworld(dtype=torch.bfloat16)
    fused.save_pretrained(tmp_path)
    for model in (fused, TheWorld.from_pretrained(tmp_path, dtype=torch.bfloat16), TheWorld.from_pretrained(tmp_path)):
        assert {parameter.dtype for parameter in model.world_encoder.parameters()} == {torch.float32}
        assert same(model.world_encoder, reference.world_encoder)
    assert {parameter.dtype for parameter in fused.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in fused.world_projector.parameters()} == {torch.bfloat16}


def test_the_embedding_scale_is_measured_over_the_rows_that_tokens_use(tiny: TinyCheckpoint, tmp_path: Path):
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        embedding = tensors["language_model.model.embed_tokens.weight"]
        embedding[spare_row:] = 1e3
        return tensors

    model = tiny.theworld()
    spare_row = model.config.start_of_world_token_id
    ids = torch.arange(model.config.image_token_index)
    with torch.no_grad():
        expected = model.get_input_embeddings()(ids).square().mean().sqrt()
    assert model.config.world_embedding_rms == pytest.approx(float(expected), rel=1e-6)
    assert model.world_projector.scale == model.config.world_embedding_rms
    spoilt = TheWorld.from_pretrained(rewritten(tiny.gemma, tmp_path / "gemma", change), cosmos=tiny.cosmos)
    assert spoilt.config.world_embedding_rms == model.config.world_embedding_rms


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"projection": "linear"}, {"world_projection": "linear"}),
        ({"tokens": "channel", "resolution": 64}, {"world_tokens": "channel", "world_resolution": 64}),
        ({"resize": "crop", "max_world_steps": 2}, {"world_resize": "crop", "max_world_steps": 2}),
        ({"pool": 2}, {"world_pool": 2}),
    ],
)
def test_arguments_describe_the_world_path(tiny: TinyCheckpoint, arguments: dict[str, Any], expected: dict[str, Any]):
    config = tiny.theworld(**arguments).config
    assert {field: getattr(config, field) for field in expected} == expected


def test_a_description_that_is_not_the_checkpoints_is_refused(tiny: TinyCheckpoint, tmp_path: Path):
    tiny.theworld().save_pretrained(tmp_path)
    assert TheWorld.from_pretrained(tmp_path, resolution=RESOLUTION).config.world_resolution == RESOLUTION
    with pytest.raises(ConfigError) as caught:
        TheWorld.from_pretrained(tmp_path, resolution=64, projection="linear")
    assert [problem.value for problem in caught.value.problems] == ["linear", 64]
    assert f"resolution={RESOLUTION}" in str(caught.value)
    with pytest.raises(ConfigError, match="describe the world path by projection"):
        TheWorld.from_pretrained(tiny.gemma, config=TheWorldConfig())


# -- what trains ------------------------------------------------------------------------------------------------------


def test_by_default_only_the_world_projector_trains(tiny: TinyCheckpoint):
    model = tiny.theworld()
    expected = sum(parameter.numel() for parameter in model.world_projector.parameters())
    assert model.get_trainable_parameters() == {"world_projector": expected}


@pytest.mark.parametrize("argument", FREEZE_ARGUMENTS)
def test_a_freeze_argument_rules_its_components(tiny: TinyCheckpoint, argument: str):
    model = tiny.theworld(**{argument: False})
    trainable = model.get_trainable_parameters()
    assert trainable.keys() == {"world_projector"} | FREEZE_ARGUMENTS[argument]
    for component, parameters in component_parameters(model).items():
        assert {parameter.requires_grad for parameter in parameters.values()} == {component.value in trainable}
        if component.value in trainable:
            assert trainable[component.value] == sum(parameter.numel() for parameter in parameters.values())


def test_a_model_without_world_path_is_frozen_only_when_asked(tiny: TinyCheckpoint):
    gemma = {Component.VISION_TOWER, Component.MULTI_MODAL_PROJECTOR, Component.LANGUAGE_MODEL}
    assert tiny.theworld(enable_world=False).get_trainable_parameters().keys() == gemma
    frozen = tiny.theworld(enable_world=False, freeze_gemma_vision=True)
    assert frozen.get_trainable_parameters().keys() == {"language_model"}


def test_freezing_is_not_saved(tiny: TinyCheckpoint, tmp_path: Path):
    tiny.theworld(**dict.fromkeys(FREEZE_ARGUMENTS, False)).save_pretrained(tmp_path)
    assert "freeze" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert TheWorld.from_pretrained(tmp_path).get_trainable_parameters().keys() == {"world_projector"}


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [{}, {"projection": "linear", "max_world_steps": 2}, {"tokens": "channel"}, {"enable_world": False}],
    ids=["mlp", "linear", "channel", "without-world"],
)
def test_a_saved_model_comes_back_exactly(tiny: TinyCheckpoint, tmp_path: Path, arguments: dict[str, Any]):
    model = tiny.theworld(**arguments)
    model.save_pretrained(tmp_path)
    again = TheWorld.from_pretrained(tmp_path)
    assert same(model, again)
    assert not again.training
    assert again.lm_head.weight is again.get_input_embeddings().weight
    ignored = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    before, after = ({k: v for k, v in m.config.to_dict().items() if k not in ignored} for m in (model, again))
    assert before == after
    processor = tiny.processor(
        enable_world=model.config.enable_world, world_tokens=arguments.get("tokens", "spatial"), world_resize="pad"
    )
    inputs = processor.apply_chat_template([user(clip(1), image(2), "Which digit is it?")], tokenize=True)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_the_auto_classes_load_it(tiny: TinyCheckpoint, tmp_path: Path):
    model = tiny.theworld()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TheWorldConfig
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is TheWorldForConditionalGeneration is TheWorld
    assert same(model, again)
    assert again.config.world_embedding_rms == again.world_projector.scale == model.world_projector.scale
    assert again.get_trainable_parameters().keys() == {"world_projector"}


def test_tied_weights_are_saved_once_under_the_hubs_names(tiny: TinyCheckpoint, tmp_path: Path):
    tiny.theworld().save_pretrained(tmp_path)
    names = set(load_file(tmp_path / WEIGHTS))
    assert "language_model.model.embed_tokens.weight" in names
    assert not any("lm_head" in name for name in names)
    assert {"world_projector.boundary", "world_projector.temporal", "world_encoder.quant_conv.weight"} <= names


def test_a_saved_world_path_can_be_left_out(tiny: TinyCheckpoint, tmp_path: Path):
    tiny.theworld().save_pretrained(tmp_path)
    model = TheWorld.from_pretrained(tmp_path, enable_world=False)
    assert same(model, tiny.gemma3())
    assert not hasattr(model, "world_projector")
    assert same(AutoModelForImageTextToText.from_pretrained(tmp_path, enable_world=False), model)
    config = AutoConfig.from_pretrained(tmp_path)
    TheWorld.from_pretrained(tmp_path, config=config, enable_world=False)
    assert config.enable_world, "the caller's config was changed"


# -- a run's checkpoint -----------------------------------------------------------------------------------------------


def write_checkpoint(tiny: TinyCheckpoint, directory: Path, model: TheWorld, components: set[str]) -> None:
    """Writes what a run's checkpoint has for loading: the config, the bases, and the components that were trained."""
    directory.mkdir()
    model.config.save_pretrained(directory)
    record: dict[str, Any] = {
        "format": FORMAT,
        "base": {"id": tiny.gemma, "revision": None},
        "encoder": {"id": tiny.cosmos, "revision": None},
        "base_digests": base_digests(tiny.theworld()),
        "components": {},
    }
    for component, parameters in component_parameters(model).items():
        if component.value not in components:
            continue
        handle = {"world_projector": model.world_projector, "vision_tower": model.model.vision_tower}[component.value]
        assert len(dict(handle.named_parameters())) == len(parameters)
        file = directory / f"{component}.safetensors"
        save_file(dict(handle.named_parameters()), file)
        record["components"][component.value] = {"file": file.name, "sha256": file_sha256(file)}
    (directory / "components.json").write_text(json.dumps(record))


def replace_projector(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Replaces the projector's file, and its hash in the record."""
    file, record = directory / "world_projector.safetensors", json.loads((directory / "components.json").read_text())
    save_file(tensors, file)
    record["components"]["world_projector"]["sha256"] = file_sha256(file)
    (directory / "components.json").write_text(json.dumps(record))


def change_record(directory: Path, **values: Any) -> None:
    """Replaces values of a checkpoint's `components.json`."""
    file = directory / "components.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def trained(tiny: TinyCheckpoint) -> TheWorld:
    """A model whose world projector and vision tower are not those of its bases."""
    model = tiny.theworld(seed=7, projection="linear")
    with torch.no_grad():
        for parameter in model.model.vision_tower.parameters():
            parameter.add_(0.01)
    model.config.world_embedding_rms = model.world_projector.scale = 0.75
    return model


def test_a_runs_checkpoint_is_its_bases_and_what_was_trained(tiny: TinyCheckpoint, tmp_path: Path, trained: TheWorld):
    write_checkpoint(tiny, tmp_path / "step-1", trained, {"world_projector", "vision_tower"})
    model = TheWorld.from_pretrained(tmp_path / "step-1")
    assert same(model, trained)
    assert model.world_projector.scale == model.config.world_embedding_rms == 0.75, "the chain's scale is constant"
    plain = TheWorld.from_pretrained(tmp_path / "step-1", enable_world=False)
    assert same(plain.model, trained.model)
    rounded = TheWorld.from_pretrained(tmp_path / "step-1", dtype=torch.bfloat16)
    assert rounded.world_projector.boundary.dtype == torch.bfloat16
    assert torch.equal(rounded.world_projector.boundary, trained.world_projector.boundary.bfloat16())


def test_a_component_that_does_not_fit_is_refused(tiny: TinyCheckpoint, tmp_path: Path, trained: TheWorld):
    directory = tmp_path / "step-1"
    write_checkpoint(tiny, directory, trained, {"world_projector"})
    tensors = load_file(directory / "world_projector.safetensors")
    replace_projector(directory, {name: value for name, value in tensors.items() if name != "temporal"})
    with pytest.raises(ConfigError, match=r"world_projector.*temporal"):
        TheWorld.from_pretrained(directory)
    replace_projector(directory, tensors | {"temporal": tensors["temporal"][1:].clone()})
    with pytest.raises(ConfigError, match="temporal has shape"):
        TheWorld.from_pretrained(directory)


@pytest.mark.parametrize("component", ["world_projector", "vision_tower"])
def test_a_component_that_is_not_what_was_saved_is_refused_before_anything_loads(
    tiny: TinyCheckpoint, tmp_path: Path, trained: TheWorld, component: str, monkeypatch: pytest.MonkeyPatch
):
    directory = tmp_path / "step-1"
    write_checkpoint(tiny, directory, trained, {"world_projector", "vision_tower"})
    file = directory / f"{component}.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    if component == "world_projector":  # which is not read then
        assert same(TheWorld.from_pretrained(directory, enable_world=False).model, trained.model)
    monkeypatch.setattr(pretrained, "_fuse", lambda *_, **__: pytest.fail("the bases were loaded"))
    with pytest.raises(ConfigError, match=rf"{component}\.safetensors is not what was saved"):
        TheWorld.from_pretrained(directory)
    file.unlink()
    with pytest.raises(ConfigError, match=rf"{component}\.safetensors is missing"):
        TheWorld.from_pretrained(directory)


@pytest.mark.parametrize("dtype", ["auto", "float32", torch.bfloat16])
def test_a_base_whose_weights_have_changed_is_refused(
    tiny: TinyCheckpoint, tmp_path: Path, trained: TheWorld, dtype: object
):
    def change(part: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        def add(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            next(value for name, value in tensors.items() if part in name).view(-1)[0] += 1e-3
            return tensors

        return add

    directory = tmp_path / "step-1"
    write_checkpoint(tiny, directory, trained, {"world_projector", "vision_tower"})
    for part, refused in (("layers.1.mlp.up_proj", True), ("vision_tower", False)):
        base = rewritten(tiny.gemma, tmp_path / part, change(part))
        change_record(directory, base={"id": base, "revision": None})
        if refused:
            with pytest.raises(ConfigError, match="trained on other weights of language_model than"):
                TheWorld.from_pretrained(directory, dtype=dtype)
        else:  # what the checkpoint holds itself is not the base's to say
            TheWorld.from_pretrained(directory, dtype=dtype)


def test_a_vae_whose_weights_have_changed_is_refused(tiny: TinyCheckpoint, tmp_path: Path, trained: TheWorld):
    directory, cosmos = tmp_path / "step-1", tmp_path / "cosmos"
    write_checkpoint(tiny, directory, trained, {"world_projector"})
    shutil.copytree(tiny.cosmos, cosmos)
    file = cosmos / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quant_conv.bias"] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    change_record(directory, encoder={"id": str(cosmos), "revision": None})
    TheWorld.from_pretrained(directory, enable_world=False)
    with pytest.raises(ConfigError, match="other weights of world_encoder than"):
        TheWorld.from_pretrained(directory)


def test_a_checkpoint_loads_its_base_at_the_recorded_revision(
    tiny: TinyCheckpoint, tmp_path: Path, trained: TheWorld, monkeypatch: pytest.MonkeyPatch
):
    asked: list[object] = []
    fuse = pretrained._fuse

    def record(*args: Any, **kwargs: Any) -> TheWorld:
        asked.append(kwargs["revision"])
        return fuse(*args, **kwargs)

    directory = tmp_path / "step-1"
    write_checkpoint(tiny, directory, trained, {"world_projector", "vision_tower"})
    monkeypatch.setattr(pretrained, "_fuse", record)
    change_record(directory, base={"id": tiny.gemma, "revision": "abc"})
    for revision in ({}, {"revision": None}, {"revision": "abc"}):
        assert same(TheWorld.from_pretrained(directory, **revision), trained)
    assert asked == ["abc"] * 3
    with pytest.raises(ConfigError, match=r"builds on revision abc .*; leave revision='main' out"):
        TheWorld.from_pretrained(directory, revision="main")


def test_a_checkpoint_in_another_dtype_is_as_transformers_loads_it(
    tiny: TinyCheckpoint, tmp_path: Path, trained: TheWorld
):
    directory = tmp_path / "step-1"
    write_checkpoint(tiny, directory, trained, {"world_projector", "vision_tower"})
    loaded = TheWorld.from_pretrained(directory, dtype=torch.bfloat16)
    expected = tiny.theworld(projection="linear", dtype=torch.bfloat16)
    buffers = dict(expected.named_buffers())
    assert buffers
    for name, value in loaded.named_buffers():
        assert value.dtype == buffers[name].dtype, name
        assert torch.equal(value, buffers[name]), name
    assert same(loaded.model.language_model, expected.model.language_model)
    assert same(loaded.world_encoder, expected.world_encoder)
    assert loaded.config.dtype == expected.config.dtype == torch.bfloat16


def test_a_checkpoint_of_another_format_is_refused(tiny: TinyCheckpoint, tmp_path: Path, trained: TheWorld):
    write_checkpoint(tiny, tmp_path / "step-1", trained, {"world_projector", "vision_tower"})
    change_record(tmp_path / "step-1", format=FORMAT + 1)
    with pytest.raises(ConfigError, match=rf"components\.json is of format {FORMAT + 1}, but"):
        TheWorld.from_pretrained(tmp_path / "step-1")


def test_a_checkpoint_is_not_quantised(tiny: TinyCheckpoint, tmp_path: Path, trained: TheWorld):
    write_checkpoint(tiny, tmp_path / "step-1", trained, {"world_projector", "vision_tower"})
    with pytest.raises(ConfigError, match="put together unquantised"):
        TheWorld.from_pretrained(tmp_path / "step-1", quantization_config={"load_in_4bit": True})


# -- bases that cannot be used ----------------------------------------------------------------------------------------


def refused_key(source: object, **kwargs: Any) -> tuple[str, str]:
    """Returns key and message of the one problem that loading ends in."""
    with pytest.raises(ConfigError) as caught:
        TheWorld.from_pretrained(str(source), **kwargs)
    (problem,) = caught.value.problems
    return problem.key, problem.message


def test_pickles_are_never_read(tiny: TinyCheckpoint, tmp_path: Path):
    gemma, cosmos = tmp_path / "gemma", tmp_path / "cosmos"
    shutil.copytree(tiny.gemma, gemma)
    shutil.copytree(tiny.cosmos, cosmos)
    torch.save(load_file(gemma / WEIGHTS), gemma / "pytorch_model.bin")
    (gemma / WEIGHTS).unlink()
    weights = cosmos / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    key, message = refused_key(gemma, cosmos=tiny.cosmos)
    assert key == "model.base"
    assert "cannot be read as safetensors" in message
    assert refused_key(gemma, cosmos=tiny.cosmos, use_safetensors=False)[0] == "model.base"
    key, message = refused_key(tiny.gemma, cosmos=str(cosmos))
    assert key == "model.world.encoder"
    assert "cannot be read as safetensors" in message


def test_truncated_weights_are_refused(tiny: TinyCheckpoint, tmp_path: Path):
    shutil.copytree(tiny.gemma, tmp_path / "gemma")
    (tmp_path / "gemma" / WEIGHTS).write_bytes((tmp_path / "gemma" / WEIGHTS).read_bytes()[:1000])
    assert refused_key(tmp_path / "gemma", cosmos=tiny.cosmos)[0] == "model.base"


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "_load_weights", lambda *_, **__: pytest.fail("weights were loaded"))


@pytest.mark.usefixtures("_no_weights")
def test_a_base_without_config_is_refused(tiny: TinyCheckpoint, tmp_path: Path):
    key, message = refused_key(tmp_path, cosmos=tiny.cosmos)
    assert key == "model.base"
    assert "it has no config.json" in message
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert refused_key(tmp_path)[0] == "model.base"


@pytest.mark.usefixtures("_no_weights")
def test_an_encoder_without_vae_is_refused(tiny: TinyCheckpoint, tmp_path: Path):
    key, message = refused_key(tiny.gemma, cosmos=str(tmp_path))
    assert key == "model.world.encoder"
    assert "vae/config.json, cannot be read" in message


WAN_2_2 = {"z_dim": 48, "in_channels": 12, "patch_size": 2, "is_residual": True, "base_dim": 160}


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(
    ("values", "named"),
    [
        (WAN_2_2, "z_dim is 48, expected 16; in_channels is 12, expected 3; patch_size is 2, expected None"),
        ({"z_dim": 8}, "z_dim is 8, expected 16"),
        ({"is_residual": True}, "is_residual is True, expected False"),
        ({"temperal_downsample": [True, True, True]}, "temperal_downsample is"),
        ({"dim_mult": [1, 2, 2]}, "dim_mult is 3, expected 4"),
        ({"latents_mean": [0.0]}, "latents_mean is 1, expected 16"),
        ({"_class_name": "AutoencoderKLCosmos"}, "_class_name is AutoencoderKLCosmos, expected AutoencoderKLWan"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_a_vae_of_another_kind_is_refused(tiny: TinyCheckpoint, tmp_path: Path, values: dict[str, Any], named: str):
    shutil.copytree(tiny.cosmos, tmp_path / "cosmos")
    file = tmp_path / "cosmos" / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    key, message = refused_key(tiny.gemma, cosmos=str(tmp_path / "cosmos"))
    assert key == "model.world.encoder"
    assert named in message


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn"])
def test_attention_that_drops_the_image_mask_is_refused(tiny: TinyCheckpoint, attention: str) -> None:
    with pytest.raises(ConfigError, match="image mask"):
        tiny.theworld(attn_implementation=attention)


def test_a_world_path_cannot_be_had_from_a_model_saved_without_one(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    tiny.theworld(enable_world=False).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="without a world path"):
        TheWorld.from_pretrained(str(tmp_path), enable_world=True)
