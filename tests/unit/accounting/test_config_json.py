"""Protects the reading of a `config.json`: with every key left out it means what the library's class means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    SiglipVisionModel,
)

from theworld_train.accounting.config_json import architecture_from_config
from theworld_train.accounting.presets import preset
from theworld_train.accounting.resources import table
from theworld_train.config.errors import ConfigError

DEFAULTS: dict[str, dict[str, Any]] = table("config_defaults")["defaults"]
SMALL = {"hidden_size": 48, "num_hidden_layers": 8, "num_attention_heads": 6, "intermediate_size": 40, "vocab_size": 90}


def built(config: dict[str, Any]) -> int:
    autos = {"gemma3": AutoModelForImageTextToText, "siglip_vision_model": SiglipVisionModel}
    auto = autos.get(config["model_type"], AutoModelForCausalLM)
    parsed = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = auto._from_config(parsed) if auto is SiglipVisionModel else auto.from_config(parsed)
    return sum(parameter.numel() for parameter in model.parameters())


def read(config: dict[str, Any]) -> int:
    architecture = architecture_from_config(config, "config.json")
    assert architecture is not None
    return architecture.num_parameters


@pytest.mark.parametrize("kind", [kind for kind in DEFAULTS if kind != "AutoencoderKLWan"])
def test_the_defaults_are_those_of_the_config_class(kind: str):
    config = CONFIG_MAPPING[kind]()
    derived = ("head_dim", "num_key_value_heads", "layer_types", "text_config", "vision_config")
    for key, value in DEFAULTS[kind].items():
        if value is not None or key not in derived:
            assert getattr(config, key) == value, key


def test_the_defaults_of_the_vae_are_those_of_its_class():
    with torch.device("meta"):
        config = AutoencoderKLWan().config
    assert {key: config[key] for key in DEFAULTS["AutoencoderKLWan"]} == DEFAULTS["AutoencoderKLWan"]
    assert read({"_class_name": "AutoencoderKLWan"}) == preset("wan-2.1-vae").architecture.num_parameters


@pytest.mark.parametrize("kind", [kind for kind in DEFAULTS if kind != "AutoencoderKLWan"])
def test_a_config_of_defaults_alone_equals_the_built_model(kind: str):
    assert read({"model_type": kind}) == built({"model_type": kind})


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_embd": 48, "n_head": 6, "n_layer": 2, "n_inner": 50, "tie_word_embeddings": False},
        {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
        {"model_type": "llama", **SMALL, "head_dim": 12, "tie_word_embeddings": True},
        {"model_type": "mistral", **SMALL, "num_key_value_heads": 3, "sliding_window": None},
        {"model_type": "gemma", **SMALL, "head_dim": 16, "num_key_value_heads": 1, "attention_bias": True},
        {"model_type": "gemma3_text", **SMALL, "num_key_value_heads": 2, "attention_bias": True},
        {
            "model_type": "gemma3",
            "text_config": {**SMALL, "num_key_value_heads": 3},
            "vision_config": {"image_size": 64},
        },
        {"model_type": "siglip_vision_model", "hidden_size": 48, "num_attention_heads": 6, "vision_use_head": False},
    ],
    ids=lambda config: config["model_type"],
)
def test_a_config_of_other_sizes_equals_the_built_model(config: dict[str, Any]):
    assert read(config) == built(config)


def test_the_released_config_of_gemma_3_4b_leaves_out_what_is_default():
    vision = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model"}
    vision |= {"num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    architecture = architecture_from_config({"model_type": "gemma3", "text_config": text, "vision_config": vision}, "x")
    assert architecture == preset("gemma-3-4b").architecture


@pytest.mark.parametrize(
    ("keys", "windowed"),
    [
        ({}, 7),
        ({"sliding_window_pattern": 2}, 4),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 5}, 5),
        ({"sliding_window": None}, 0),
    ],
    ids=["default", "pattern", "types", "none"],
)
def test_windowed_layers_are_counted(keys: dict[str, Any], windowed: int):
    architecture = architecture_from_config(
        {"model_type": "gemma3_text", **SMALL, "num_key_value_heads": 2, **keys}, "x"
    )
    assert architecture is not None
    assert architecture.attention_shape is not None
    assert architecture.attention_shape.num_windowed_layers == windowed


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen2"},
        {"model_type": "gpt2", "add_cross_attention": True},
        {"model_type": "gemma3", "vision_config": {"model_type": "clip_vision_model"}},
        {"_class_name": "AutoencoderKLWan", "is_residual": True},
        {"_class_name": "AutoencoderKL"},
    ],
    ids=["qwen2", "cross-attention", "other-tower", "residual", "other-vae"],
)
def test_what_has_no_formula_is_left_to_the_census(config: dict[str, Any]):
    assert architecture_from_config(config, "x") is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["names no model"]),
        ({"model_type": "llama", "hidden_size": 4100}, ["hidden_size: must be a multiple of num_attention_heads"]),
        (
            {"model_type": "llama", "hidden_size": -1, "vocab_size": "x", "num_hidden_layers": None, "mlp_bias": 3},
            ["hidden_size: must be", "vocab_size: must be", "num_hidden_layers: must be", "mlp_bias: must be true"],
        ),
        ({"model_type": "gpt2", "n_embd": 10, "n_head": 3}, ["n_embd: must be a multiple of num_attention_heads"]),
        (
            {"model_type": "gemma3", "text_config": {"hidden_size": 0}, "vision_config": {"patch_size": -14}},
            ["text_config.hidden_size: must be", "vision_config.patch_size: must be"],
        ),
        ({"model_type": "gemma3", "text_config": 3}, ["text_config: must be a table"]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, ["sliding_window_pattern: must be"]),
        (
            {"_class_name": "AutoencoderKLWan", "dim_mult": "12", "z_dim": 0},
            ["dim_mult: must be a list", "z_dim: must"],
        ),
    ],
)
def test_a_config_that_cannot_be_lists_all_its_problems(config: dict[str, Any], expected: list[str]):
    with pytest.raises(ConfigError) as caught:
        architecture_from_config(config, "some/config.json")
    texts = [str(problem) for problem in caught.value.problems]
    assert len(texts) == len(expected)
    for text in expected:
        assert any(f"some/config.json: {text}" in found for found in texts), (text, texts)
