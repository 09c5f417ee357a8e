"""Protects the models that are built without pretrained weights: exact sizes, and tiny checkpoints that behave."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, Gemma3ForConditionalGeneration, Gemma3Processor

from tests.helpers.tiny import TinyCheckpoint, digit_clips, write_tiny_checkpoint
from theworld_train.config.components import Component
from theworld_train.data.moving_digits import WORDS
from theworld_train.model import TheWorld
from theworld_train.model.build import build_on_meta, gemma_4b_config, tiny_tokenizer, write_tiny
from theworld_train.model.components import component_parameters
from theworld_train.model.world_encoder import vae_config


def count(module: nn.Module) -> int:
    """Returns the parameters of a module, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


# -- full size ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full() -> TheWorld:
    start = time.perf_counter()
    model = build_on_meta(gemma_4b_config())
    assert time.perf_counter() - start < 10
    return model


def test_the_full_model_takes_no_memory(full: TheWorld):
    assert {parameter.device.type for parameter in full.parameters()} == {"meta"}


def test_exact_sizes_of_the_full_model(full: TheWorld):
    sizes = {component: sum(p.numel() for p in part.values()) for component, part in component_parameters(full).items()}
    assert sizes[Component.VISION_TOWER] == 416_866_032
    assert sizes[Component.MULTI_MODAL_PROJECTOR] == 2_950_272
    assert sizes[Component.LANGUAGE_MODEL] == 3_880_263_168
    gemma = (Component.VISION_TOWER, Component.MULTI_MODAL_PROJECTOR, Component.LANGUAGE_MODEL)
    assert sum(sizes[component] for component in gemma) == 4_300_079_472
    assert count(full.world_encoder.encoder) == 53_595_872
    assert count(full.world_encoder.quant_conv) == 1_056
    assert sizes[Component.WORLD_ENCODER] == 53_595_872 + 1_056
    assert sum(sizes.values()) == count(full)


@pytest.mark.parametrize(("projection", "size"), [("linear", 43_520), ("mlp", 6_599_680)])
def test_exact_sizes_of_the_projection(projection: str, size: int):
    model = build_on_meta(gemma_4b_config(world_projection=projection))
    assert count(model.world_projector.projection) == size
    steps = model.config.max_world_steps
    assert count(model.world_projector) == size + (2 * steps + 1) * 2560 + 2 * 2560


def test_without_world_path_the_full_model_is_gemma():
    assert count(build_on_meta(gemma_4b_config(enable_world=False))) == 4_300_079_472


def test_the_embedding_is_not_resized_and_its_tie_holds(full: TheWorld):
    assert full.get_input_embeddings().weight.shape == (262_208, 2560)
    assert full.lm_head.weight is full.get_input_embeddings().weight
    assert full.config.image_token_index == 262_144
    assert full.config.world_token_ids == (262_145, 262_146, 262_147)


def test_the_parts_of_the_full_model_have_the_names_of_their_bases(full: TheWorld):
    with torch.device("meta"):
        gemma3, vae = Gemma3ForConditionalGeneration(full.config), AutoencoderKLWan()
    theirs = {name: value.shape for name, value in gemma3.named_parameters()}
    theirs |= {f"world_encoder.encoder.{name}": value.shape for name, value in vae.encoder.named_parameters()}
    theirs |= {f"world_encoder.quant_conv.{name}": value.shape for name, value in vae.quant_conv.named_parameters()}
    ours = {name: value.shape for name, value in full.named_parameters() if not name.startswith("world_projector.")}
    assert ours == theirs


# -- tiny -------------------------------------------------------------------------------------------------------------


def test_every_word_is_one_token():
    tokenizer = tiny_tokenizer(WORDS)
    for word in WORDS:
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    for text in ("Which way does it move?", "any other text: äö 日本 \U0001f600", "two\n\nlines  and   spaces"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_tokenizer_does_not_depend_on_the_order_of_the_words():
    vocabularies = [tiny_tokenizer(words).get_vocab() for words in (WORDS, WORDS[::-1], [*WORDS, *WORDS])]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_a_tiny_checkpoint_is_an_ordinary_one(tiny: TinyCheckpoint):
    assert type(AutoModelForImageTextToText.from_pretrained(tiny.gemma)) is Gemma3ForConditionalGeneration
    processor = AutoProcessor.from_pretrained(tiny.gemma)
    assert type(processor) is Gemma3Processor
    assert processor.image_seq_length == 16
    assert type(AutoencoderKLWan.from_pretrained(tiny.cosmos, subfolder="vae")) is AutoencoderKLWan
    assert sorted(path.name for path in tiny.directory.iterdir()) == ["cosmos", "gemma"]
    size = sum(path.stat().st_size for path in tiny.directory.rglob("*") if path.is_file())
    assert size < 8 * 2**20


def test_a_tiny_model_is_alive(tiny: TinyCheckpoint):
    model = tiny.gemma3()
    assert model.model.multi_modal_projector.mm_input_projection_weight.std() > 0.05
    assert model.lm_head.weight is model.get_input_embeddings().weight
    end = AutoProcessor.from_pretrained(tiny.gemma).tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end in model.generation_config.eos_token_id
    with torch.no_grad():
        logits = model(torch.arange(300, 332)[None]).logits
    assert logits.std() > 1, "a head that can be sure of nothing cannot be taught by its inputs alone"


def test_the_latent_statistics_are_those_of_the_clips(tiny: TinyCheckpoint):
    config = json.loads((Path(tiny.cosmos) / "vae" / "config.json").read_text())
    assert config["latents_std"] != vae_config()["latents_std"]
    with torch.no_grad():
        latents = tiny.theworld().world_encoder.encode(digit_clips()).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(1), torch.ones(16), rtol=0, atol=1e-4)


def test_the_vae_does_not_depend_on_the_language_model(tiny: TinyCheckpoint, tmp_path: Path):
    write_tiny(tmp_path / "tiny", WORDS, digit_clips(), hidden_size=48, num_hidden_layers=1, layer_types=None)
    weights = "cosmos/vae/diffusion_pytorch_model.safetensors"
    expected, actual = (load_file(root / weights) for root in (tiny.directory, tmp_path / "tiny"))
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    config = json.loads((tmp_path / "tiny" / "gemma" / "config.json").read_text())["text_config"]
    assert (config["hidden_size"], config["num_hidden_layers"]) == (48, 1)


def test_writing_is_repeatable_and_replaces_what_was_there(tiny: TinyCheckpoint, tmp_path: Path):
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "left-over").write_text("x")
    state = torch.get_rng_state()
    again = write_tiny_checkpoint(directory)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers were touched"
    assert not (directory / "left-over").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    for expected, actual in [(tiny.gemma, again.gemma), (f"{tiny.cosmos}/vae", f"{again.cosmos}/vae")]:
        (weights,) = (path.name for path in Path(expected).glob("*.safetensors"))
        before, after = (load_file(Path(root) / weights) for root in (expected, actual))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
