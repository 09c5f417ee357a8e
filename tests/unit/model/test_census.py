"""Protects the count of models that have no closed formula."""

from __future__ import annotations

from typing import Any

import pytest

from theworld_train.accounting.architectures import AttentionShape, Stack
from theworld_train.accounting.presets import preset
from theworld_train.config.errors import ConfigError
from theworld_train.model.census import census

QWEN2 = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
QWEN2 |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}


def test_a_model_of_another_type_is_counted_with_its_ties_and_its_cache():
    counted = census({**QWEN2, "architectures": ["Qwen2ForCausalLM"]}, "x")
    assert counted.num_parameters == 494_032_768
    assert counted.attention_shape == AttentionShape(24, 14, 2, 64)
    assert counted.stacks == (Stack(24, 896),)
    assert {part.name for part in counted.parts()} == {"embedding", "attention", "mlp", "norms"}
    assert census(QWEN2, "x").num_parameters == counted.num_parameters


def test_a_census_and_a_formula_agree():
    fields = {"hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1}
    fields |= {"head_dim": 256, "intermediate_size": 2048, "vocab_size": 262_144, "sliding_window": 512}
    counted, formula = census({"model_type": "gemma3_text", **fields}, "x"), preset("gemma-3-270m").architecture
    assert {part.name: part.parameters for part in counted.parts()} == {
        part.name: part.parameters for part in formula.parts() if part.parameters
    }
    assert counted.attention_shape == formula.attention_shape
    assert counted.stacks == formula.stacks


def test_a_composite_is_counted_by_component():
    counted = census({"model_type": "gemma3"}, "x")
    components = {part.component for part in counted.parts()}
    assert components == {"vision_tower", "multi_modal_projector", "language_model"}
    assert counted.stacks == ()


@pytest.mark.parametrize(
    "config",
    [{"model_type": "bert", "architectures": ["BertForMaskedLM"]}, {"model_type": "mamba", "num_hidden_layers": 2}],
    ids=["encoder", "state-space"],
)
def test_what_keeps_no_keys_and_values_has_no_cache(config: dict[str, Any]):
    counted = census(config, "x")
    assert counted.num_parameters > 0
    assert counted.attention_shape is None


def test_a_diffusers_model_is_counted():
    config = {"_class_name": "AutoencoderKLWan", "base_dim": 8, "is_residual": True, "_diffusers_version": "0.35.0"}
    counted = census(config, "x")
    assert {part.component for part in counted.parts()} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gemmma3"}, "did you mean 'gemma3'"),
        ({"_class_name": "AutoencoderKLWann"}, "did you mean 'AutoencoderKLWan'"),
        ({**QWEN2, "num_attention_heads": "many"}, "cannot build a 'qwen2'"),
        ({**QWEN2, "num_hidden_layers": -1, "hidden_size": -8}, "cannot build a 'qwen2'"),
        ({"_class_name": "AutoencoderKL", "block_out_channels": 3}, "cannot build a 'AutoencoderKL'"),
    ],
)
def test_what_cannot_be_built_is_a_users_error(config: dict[str, Any], expected: str):
    with pytest.raises(ConfigError, match=expected):
        census(config, "x.json")
