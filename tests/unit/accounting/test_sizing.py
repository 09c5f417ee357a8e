"""Protects the arithmetic from parameters to bytes, tokens, FLOPs and GPUs."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from theworld_train.accounting import sizing
from theworld_train.accounting.architectures import AttentionShape, Counted, Part, Stack
from theworld_train.accounting.presets import describe, preset, preset_names


def test_bytes_of_70b_parameters_are_those_of_the_textbook():
    sizes = {precision: sizing.weight_bytes(70 * 10**9, precision) / 1e9 for precision in sizing.BYTES_PER_PARAMETER}
    assert sizes == {"fp32": 280, "bf16": 140, "int8": 70, "int4": 35}


def test_an_odd_number_of_int4_parameters_takes_a_whole_last_byte():
    assert sizing.weight_bytes(7, "int4") == 4


def test_training_takes_16_bytes_a_parameter():
    assert sizing.training_bytes(1) == 16


def test_chinchilla_and_flops():
    tokens = sizing.chinchilla_tokens(70 * 10**9)
    assert tokens == 1_400_000_000_000
    assert sizing.training_flops(70 * 10**9, tokens) == 588 * 10**21


def test_grouped_queries_shrink_llama_3_70bs_cache_eightfold():
    shape = preset("llama-3-70b").architecture.attention_shape
    assert shape is not None
    cache = sizing.kv_cache(shape, 8192)
    assert cache.saving_of_groups == 8
    assert cache.bytes_per_token == 80 * 2 * 8 * 128 * 2
    assert cache.total_bytes == 8192 * cache.bytes_per_token
    assert cache.saving_of_windows == 1


def test_windowed_layers_keep_their_window_only():
    shape = preset("gemma-3-4b").architecture.attention_shape
    assert shape == AttentionShape(34, 8, 4, 256, sliding_window=1024, num_windowed_layers=29)
    layer = 2 * 4 * 256 * 2
    assert sizing.kv_cache_bytes(shape, 1000) == 34 * 1000 * layer
    assert sizing.kv_cache_bytes(shape, 131_072) == (5 * 131_072 + 29 * 1024) * layer
    assert sizing.kv_cache(shape, 131_072).saving_of_windows == pytest.approx(6.5, rel=0.02)


@pytest.mark.parametrize("context", [20, 100])
def test_the_cache_formula_holds_what_transformers_caches(context: int):
    config = Gemma3TextConfig(
        hidden_size=32,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        vocab_size=50,
        sliding_window=40,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cache = model(torch.zeros(1, context, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * 2
    shape = AttentionShape(7, 4, 2, 8, sliding_window=40, num_windowed_layers=6)
    # transformers drops the window's oldest token, which the next query no longer sees, before that query comes.
    dropped = 6 * 2 * 2 * 8 * 2 if context > 40 else 0
    assert held == sizing.kv_cache_bytes(shape, context) - dropped


def test_the_rule_of_thumb_counts_gpt3s_layers_and_leaves_out_the_embedding():
    rule = sizing.approximation(preset("gpt3-175b").architecture)
    assert rule is not None
    assert rule.parameters == 12 * 96 * 12288**2
    assert rule.error_of_layers == pytest.approx(0, abs=1e-3)
    assert -0.01 < rule.error < 0
    assert sizing.approximation(preset("wan-2.1-vae").architecture) is None


def test_the_rule_of_thumb_adds_up_the_stacks_of_a_composite():
    rule = sizing.approximation(preset("gemma-3-4b").architecture)
    assert rule is not None
    assert rule.parameters == 12 * (27 * 1152**2 + 34 * 2560**2)


def test_the_rule_of_thumb_says_nothing_of_layers_that_are_not_known():
    counted = Counted((Part("", "other", 100, ""),), (Stack(1, 2),))
    assert sizing.approximation(counted) == sizing.Approximation(48, 48 / 100 - 1, None)


def test_the_exercise_of_a_2048_wide_model_with_24_layers():
    result = sizing.size_up(
        "exercise", describe(["d_model=2048", "n_layers=24", "vocab_size=32000"]).architecture, 2048
    )
    assert result.approximation is not None
    assert result.approximation.parameters == 1_207_959_552
    assert result.parameters == 1_364_297_728
    assert sum(part.parameters for part in result.parts) == result.parameters


def test_the_largest_models_on_24_gb():
    assert sizing.largest_parameters(24, 1, reserved=0) == 24_000_000_000
    assert sizing.largest_parameters(24, 0.5, reserved=0) == 48_000_000_000
    models = [(name, preset(name).architecture.num_parameters) for name in preset_names()]
    assert sizing.largest_fitting(models, sizing.largest_parameters(24, 1)) == "llama-2-13b"
    assert sizing.largest_fitting(models, sizing.largest_parameters(24, 0.5)) == "gemma-3-27b"
    assert sizing.largest_fitting(models, 1) is None


def test_gpus_hold_a_model_together_with_its_cache():
    result = sizing.size_up("llama-3-8b", preset("llama-3-8b").architecture, 8192)
    fits = {fit.gpu.memory_gb: fit for fit in result.gpus}
    assert list(fits) == [24, 32, 40, 48, 80, 94, 141, 180]
    assert fits[24].inference == {"fp32": 2, "bf16": 1, "int8": 1, "int4": 1}
    assert fits[80].training == 2
    longer = sizing.size_up("llama-3-8b", preset("llama-3-8b").architecture, 131_072)
    assert longer.gpus[0].inference["bf16"] == 2


@pytest.mark.parametrize("name", preset_names())
def test_more_context_and_more_memory_never_make_it_harder_or_easier_than_before(name: str):
    architecture = preset(name).architecture
    short, long = (sizing.size_up(name, architecture, context) for context in (512, 65_536))
    for before, after in zip(short.gpus, long.gpus, strict=True):
        assert all(before.inference[precision] <= after.inference[precision] for precision in before.inference)
    needed = [fit.training for fit in short.gpus]
    assert needed == sorted(needed, reverse=True)
    assert (short.kv_cache is None) == (short.chinchilla_tokens is None)
