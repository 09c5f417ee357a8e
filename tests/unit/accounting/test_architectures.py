"""Protects the closed formulas: each equals the parameter count of the class that it stands for, built on meta."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PaliGemmaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from theworld_train.accounting.architectures import Composite, Decoder, VisionTransformer
from theworld_train.accounting.presets import preset, preset_names
from theworld_train.accounting.video_vae import VideoVae
from theworld_train.config.errors import ConfigError

#: Counts of the released classes, as they are published with the models or were taken from them.
EXACT = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-27b": 27_432_406_640,
    "siglip-so400m": 412_442_352,
    "siglip-so400m-384": 428_225_600,
    "siglip-so400m-896": 416_866_032,
    "wan-2.1-vae": 126_892_531,
    "gemma_2b": 2_508_531_712,
    "gemma_300m": 311_464_960,
    "pi0": 3_238_048_528,
}
DECODERS = [name for name in preset_names() if isinstance(preset(name).architecture, Decoder)]
TOWERS = [name for name in preset_names() if isinstance(preset(name).architecture, VisionTransformer)]
#: Small, and with every size different from every other.
SMALL = Decoder(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    intermediate_size=56,
    vocab_size=70,
)


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def kinds(model: torch.nn.Module) -> dict[str, int]:
    """Returns the parameters of a causal model by what their names say, as `Decoder.parts` splits them."""
    words = {"norms": ("norm", "ln_"), "head": ("lm_head",), "position": ("wpe",), "embedding": ("embed", "wte")}
    words |= {"attention": ("attn",), "mlp": ("mlp",)}
    found = dict.fromkeys(words, 0)
    for name, parameter in model.named_parameters():
        kind = next(kind for kind, marks in words.items() if any(mark in name for mark in marks))
        found[kind] += parameter.numel()
    return found


def build(config: object, auto: type = AutoModelForCausalLM) -> torch.nn.Module:
    with torch.device("meta"):
        return auto.from_config(config)


def sizes(decoder: Decoder) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    return {name: getattr(decoder, name) for name in (*names, "intermediate_size", "vocab_size")}


def reference(decoder: Decoder) -> torch.nn.Module:
    """Returns the transformers model of a decoder, by the traits that tell the kinds apart."""
    if decoder.num_learned_positions:
        return build(
            GPT2Config(
                n_embd=decoder.hidden_size,
                n_layer=decoder.num_hidden_layers,
                n_head=decoder.num_attention_heads,
                n_inner=decoder.intermediate_size,
                vocab_size=decoder.vocab_size,
                n_positions=decoder.num_learned_positions,
            )
        )
    if decoder.qk_norm:
        return build(Gemma3TextConfig(**sizes(decoder), sliding_window=decoder.sliding_window))
    if decoder.tie_word_embeddings:
        return build(GemmaConfig(**sizes(decoder)))
    if decoder.sliding_window:
        return build(MistralConfig(**sizes(decoder), sliding_window=decoder.sliding_window))
    return build(LlamaConfig(**sizes(decoder)))


def siglip(tower: VisionTransformer) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=tower.hidden_size,
        num_hidden_layers=tower.num_hidden_layers,
        num_attention_heads=tower.num_attention_heads,
        intermediate_size=tower.intermediate_size,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
        num_channels=tower.num_channels,
        vision_use_head=tower.pooling_head,
    )


def test_every_preset_has_its_exact_value():
    assert {name: preset(name).architecture.num_parameters for name in preset_names()} == EXACT


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "gemma_300m"])
def test_a_decoder_preset_equals_the_built_model_part_by_part(name: str):
    decoder = preset(name).architecture
    assert isinstance(decoder, Decoder)
    model = reference(decoder)
    expected = kinds(model)
    ours = dict.fromkeys(expected, 0) | {part.name: part.parameters for part in decoder.parts()}
    assert ours == expected
    assert decoder.num_parameters == count(model)


def test_the_action_expert_is_a_gemma_without_its_embedding():
    expert = preset("gemma_300m").architecture
    assert isinstance(expert, Decoder)
    model = build(GemmaConfig(**{**sizes(expert), "vocab_size": 257_152}))
    assert expert.num_parameters == count(model) - 257_152 * expert.hidden_size


@pytest.mark.parametrize(
    ("decoder", "config"),
    [
        (
            {"qkv_bias": True, "output_bias": True, "mlp_bias": True},
            LlamaConfig(**sizes(SMALL), attention_bias=True, mlp_bias=True),
        ),
        ({"tie_word_embeddings": True}, LlamaConfig(**sizes(SMALL), tie_word_embeddings=True)),
        (
            {"norms_per_layer": 4, "qk_norm": True, "qkv_bias": True, "output_bias": True},
            Gemma3TextConfig(**sizes(SMALL), attention_bias=True, tie_word_embeddings=False),
        ),
    ],
    ids=["biases", "tied", "gemma3"],
)
def test_switches_of_a_decoder_equal_those_of_the_built_model(decoder: dict[str, object], config: object):
    assert Decoder(**sizes(SMALL), **decoder).num_parameters == count(build(config))


@pytest.mark.parametrize("name", TOWERS)
def test_a_vision_preset_equals_the_built_tower(name: str):
    tower = preset(name).architecture
    assert isinstance(tower, VisionTransformer)
    with torch.device("meta"):
        assert tower.num_parameters == count(SiglipVisionModel(siglip(tower)))


@pytest.mark.parametrize("pooling_head", [True, False])
def test_a_tower_whose_image_is_no_multiple_of_its_patch_equals_the_built_one(pooling_head: bool):
    tower = VisionTransformer(24, 2, 3, 44, image_size=50, patch_size=8, num_channels=1, pooling_head=pooling_head)
    with torch.device("meta"):
        assert tower.num_parameters == count(SiglipVisionModel(siglip(tower)))


@pytest.mark.parametrize("name", ["gemma-3-4b", "gemma-3-12b", "gemma-3-27b"])
def test_a_multimodal_gemma_3_equals_the_built_model_component_by_component(name: str):
    composite = preset(name).architecture
    assert isinstance(composite, Composite)
    text, vision = composite.members["language_model"], composite.members["vision_tower"]
    assert isinstance(text, Decoder)
    assert isinstance(vision, VisionTransformer)
    config = Gemma3Config(text_config=sizes(text), vision_config=siglip(vision).to_dict())
    model = build(config, AutoModelForImageTextToText)
    for component in ("vision_tower", "multi_modal_projector", "language_model"):
        assert composite.component(component) == count(getattr(model.model, component)), component
    assert composite.num_parameters == count(model)


def test_pi0_equals_paligemma_and_expert_and_projections():
    composite = preset("pi0").architecture
    assert isinstance(composite, Composite)
    language, expert = composite.members["language_model"], composite.members["action_expert"]
    assert isinstance(language, Decoder)
    assert isinstance(expert, Decoder)
    vision = siglip(preset("siglip-so400m").architecture).to_dict()
    config = PaliGemmaConfig(
        text_config={**sizes(language), "model_type": "gemma"},
        vision_config=vision,
        projection_dim=language.hidden_size,
    )
    model = build(config, AutoModelForImageTextToText)
    width = expert.hidden_size
    linears = [(32, width), (32, width), (2 * width, width), (width, width), (width, 32)]
    projections = sum(count(torch.nn.Linear(*pair, device="meta")) for pair in linears)
    assert composite.num_parameters == count(model) + expert.num_parameters + projections
    assert composite.num_language_parameters == language.num_parameters


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"base_dim": 8, "decoder_base_dim": 12, "z_dim": 3, "num_res_blocks": 1, "in_channels": 2, "out_channels": 5},
        {"base_dim": 4, "dim_mult": [1, 3, 5], "temperal_downsample": [True, False]},
    ],
    ids=["released", "other-widths", "three-levels"],
)
def test_the_video_vae_equals_the_built_class_component_by_component(sizes: dict[str, object]):
    with torch.device("meta"):
        model = AutoencoderKLWan(**sizes)
    names = {"temperal_downsample": "temporal_downsample"}
    ours = {names.get(key, key): tuple(value) if isinstance(value, list) else value for key, value in sizes.items()}
    vae = VideoVae(**ours)
    for component in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        assert vae.component(component) == count(getattr(model, component)), component
    assert vae.num_parameters == count(model)


def test_a_component_is_not_taken_for_one_whose_name_begins_alike():
    architecture = Composite({"tower": SMALL, "tower_two": SMALL})
    assert architecture.component("tower") == SMALL.num_parameters
    assert architecture.component("") == architecture.num_parameters == 2 * SMALL.num_parameters


@pytest.mark.parametrize(
    ("build", "keys"),
    [
        (
            lambda: Decoder(0, -1, 6, 4, 8, 32, -1),
            {"hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"},
        ),
        (lambda: Decoder(8, 2, 2, 1, 4, 8, 8, num_full_attention_layers=3), {"num_full_attention_layers"}),
        (lambda: VisionTransformer(30, 1, 4, 8, image_size=4, patch_size=8), {"hidden_size", "image_size"}),
        (
            lambda: VideoVae(base_dim=0, dim_mult=(1, 0), temporal_downsample=()),
            {"base_dim", "dim_mult", "temperal_downsample"},
        ),
    ],
    ids=["decoder", "layers", "vision", "vae"],
)
def test_sizes_that_cannot_be_are_all_listed(build, keys: set[str]):
    with pytest.raises(ConfigError) as caught:
        build()
    assert {problem.key for problem in caught.value.problems} == keys
