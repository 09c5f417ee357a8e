"""Protects the names and `key=value` descriptions that `theworld-train size` takes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from theworld_train.accounting.architectures import Decoder
from theworld_train.accounting.presets import describe, preset, preset_names, styles, variant
from theworld_train.config.errors import ConfigError


def problems(*pairs: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        describe(pairs)
    assert all(problem.source == "command line" for problem in caught.value.problems)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("name", "near"), [("lama-3-8b", "llama-3-8b"), ("gemma3-4b", "gemma-3-4b"), ("gpt-2", "gpt2")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, near: str):
    with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
        preset(name)


def test_a_name_like_no_other_is_answered_with_how_to_list_them():
    with pytest.raises(ConfigError, match="lists them"):
        preset("quux")


def test_every_preset_names_its_source_and_the_indivisible_ones_are_explained():
    assert all(preset(name).source for name in preset_names())
    for name, literal in (("gpt3-13b", "5,140"), ("gpt3-xl", "24 heads")):
        note = preset(name).note
        assert note is not None
        assert literal in note


def test_a_described_llama_equals_the_built_model():
    described = describe(["d_model=2048", "n_layers=24", "vocab_size=32000", "n_heads=16"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                hidden_size=2048,
                num_hidden_layers=24,
                num_attention_heads=16,
                intermediate_size=5632,
                vocab_size=32000,
            )
        )
    assert described.architecture.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert "intermediate_size=5632" in described.assumptions
    assert not any(text.startswith("num_attention_heads") for text in described.assumptions)


@pytest.mark.parametrize("name", [name for name in preset_names() if isinstance(preset(name).architecture, Decoder)])
def test_every_decoder_preset_can_be_described(name: str):
    decoder = preset(name).architecture
    assert isinstance(decoder, Decoder)
    style = next(
        style
        for style, marks in {
            "gpt2": decoder.norm == "layer",
            "gemma3": decoder.qk_norm,
            "gemma": decoder.tie_word_embeddings,
            "llama": True,
        }.items()
        if marks
    )
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    pairs = [f"{key}={getattr(decoder, key)}" for key in (*keys, "intermediate_size", "vocab_size")]
    pairs += [f"style={style}", f"num_learned_positions={decoder.num_learned_positions}"]
    if decoder.sliding_window:
        pairs.append(f"sliding_window={decoder.sliding_window}")
    if decoder.num_full_attention_layers:
        pairs.append("full_attention_every=6")
    assert describe(pairs).architecture == decoder


def test_the_published_mlp_widths_of_llama_2_are_what_is_assumed():
    for width, inner in ((4096, 11008), (5120, 13824)):
        described = describe([f"d_model={width}", "n_layers=1", "vocab_size=1"])
        assert described.architecture.intermediate_size == inner


def test_the_head_may_be_untied_and_the_vocabulary_left_out():
    sizes = ["d_model=128", "n_layers=2", "style=gpt2"]
    tied = describe([*sizes, "vocab_size=100"]).architecture
    untied = describe([*sizes, "vocab_size=100", "tie_word_embeddings=false"]).architecture
    assert untied.num_parameters == tied.num_parameters + 100 * 128
    assert describe([*sizes, "vocab_size=0"]).architecture.num_parameters == tied.num_parameters - 100 * 128


def test_every_problem_is_listed_at_once():
    found = problems("d_model=-5", "n_layers=24", "n_heads=7", "hiden=3", "n_kv_heads=2")
    assert len(found) == 4
    text = "\n".join(found)
    assert "hiden: unknown key; did you mean 'hidden_size'?" in text
    assert "vocab_size: must be stated" in text
    assert "hidden_size: must be a positive whole number (got -5)" in text
    assert "num_attention_heads: must be a multiple of num_key_value_heads, which is 2 (got 7)" in text


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (("d_model=2048", "n_layers=2", "vocab_size=9", "n_heads=24"), "multiple of num_attention_heads, which is 24"),
        (("d_model=2050", "n_layers=2", "vocab_size=9"), "neither 128 nor 64 divides the width"),
        (("d_model=1k", "n_layers=2", "vocab_size=9"), "must be a whole number (got '1k')"),
        (("d_model=64", "n_layers=2", "vocab_size=9", "hidden_size=64"), "given twice"),
        (("d_model=64", "n_layers=2", "vocab_size=9", "style=lama"), "did you mean 'llama'?"),
        (("d_model=64", "n_layers=2", "vocab_size=9", "tie_word_embeddings=1"), "must be true or false"),
        (("d_model=64", "n_layers=2", "vocab_size=9", "full_attention_every=6"), "must be stated with"),
        (("d_model=64", "n_layers=0", "vocab_size=9"), "positive whole number (got 0)"),
        (("d_model=64", "n_layers=2", "vocab_size=9", "gpt2"), "expected key=value (got 'gpt2')"),
    ],
)
def test_a_wrong_description_says_what_was_expected(pairs: tuple[str, ...], expected: str):
    assert expected in "\n".join(problems(*pairs))


def test_a_variant_changes_the_language_model_alone():
    whole, smaller = preset("gemma-3-4b").architecture, variant("gemma-3-4b", {"vocab_size": 262_147})
    assert whole.num_parameters - smaller.num_parameters == 61 * 2560
    assert whole.component("vision_tower") == smaller.component("vision_tower")


def test_the_styles_are_explained():
    assert set(styles()) == {"gpt2", "llama", "gemma", "gemma3"}


def test_presets_and_descriptions_import_no_framework():
    code = (
        "import sys; from theworld_train.accounting import config_json, presets, published, sizing;"
        "[presets.preset(name) for name in presets.preset_names()];"
        "published.markdown();"
        "print(sorted({'torch', 'transformers', 'diffusers', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
