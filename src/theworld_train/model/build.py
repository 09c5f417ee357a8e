"""Models without pretrained weights: tiny checkpoints for a laptop, and a full-size shell that takes no memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaTokenizer,
    GenerationConfig,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.model.pretrained import read_config
from theworld_train.model.processing import CHAT_TEMPLATE
from theworld_train.model.tiny_generator import write_tiny_generator
from theworld_train.model.world_encoder import WorldEncoder, read_vae_config, vae_config

_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>")
_IMAGE_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_SPARE_ROWS = 64


def gemma_4b_config(**world: Any) -> TheWorldConfig:
    """Returns the config of TheWorld on Gemma 3 4B with the Wan 2.1 VAE, without reading a file.

    Sizes are those of `google/gemma-3-4b-it`'s config.

    Args:
        **world: Fields of `TheWorldConfig`, such as `world_projection`.
    """
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262_208,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return TheWorldConfig(text_config=text, vision_config=vision, world_encoder_config=vae_config(), **world)


#: Checkpoints whose architecture `gemma_4b_config` describes; VAEs that have Wan 2.1's default config.
BUILT_IN_BASES = ("google/gemma-3-4b-it", "google/gemma-3-4b-pt")
BUILT_IN_ENCODERS = tuple(f"nvidia/Cosmos-Predict2-{size}-Video2World" for size in ("2B", "14B"))


def describe_architecture(
    base: str, revision: str | None, encoder: str, encoder_revision: str | None, **fields: Any
) -> TheWorldConfig:
    """Returns the config of TheWorld on a base and a VAE, without weights and, for the built-in ones, without a file.

    Args:
        base: Hub id or directory of Gemma 3.
        revision: Hub revision of the base.
        encoder: Hub id or directory with a `vae` folder.
        encoder_revision: Hub revision of the encoder.
        **fields: Fields of `TheWorldConfig`.

    Raises:
        ConfigError: If a config is neither built in nor at hand.
    """
    values = gemma_4b_config().to_dict() if base in BUILT_IN_BASES else read_config(base, revision)
    vae = vae_config(None if encoder in BUILT_IN_ENCODERS else read_vae_config(encoder, encoder_revision))
    for field in ("model_type", "architectures", "transformers_version", *fields):
        values.pop(field, None)
    return TheWorldConfig(**values | {"world_encoder_config": vae} | fields)


def build_on_meta(config: TheWorldConfig) -> TheWorldForConditionalGeneration:
    """Returns the model of `config` on the meta device: every shape, no memory."""
    with torch.device("meta"):
        model = TheWorldForConditionalGeneration(config)
    model.tie_weights()
    return model


# -- tiny checkpoints -------------------------------------------------------------------------------------------------


def tiny_tokenizer(words: Iterable[str]) -> GemmaTokenizer:
    """Returns a tokenizer of Gemma's kind (BPE with byte fallback) in which every one of `words` is a single token.

    Args:
        words: Words of the vocabulary; any other text falls back to characters and bytes.
    """
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    words = sorted(set(words))
    corpus = [form for word in words for form in (word, f"{word} ")]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        special_tokens=[*_SPECIAL_TOKENS, _IMAGE_TOKENS["boi_token"], _IMAGE_TOKENS["eoi_token"], *bytes_],
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n", "▁"],
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "isolated")
    bpe.train_from_iterator(corpus, trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab: dict[str, int] = {}
    for token in sorted(trained["vocab"], key=trained["vocab"].__getitem__):
        vocab[token] = len(vocab)
    vocab[_IMAGE_TOKENS["image_token"]] = len(vocab)
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=[tuple(pair) for pair in trained["merges"]],  # type: ignore[misc] # pairs, as `tokenizers` wants them
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        extra_special_tokens=dict(_IMAGE_TOKENS),
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    return tokenizer


def tiny_gemma_config(tokenizer: GemmaTokenizer, **text: Any) -> Gemma3Config:
    """Returns the config of a Gemma 3 that trains in seconds on a CPU.

    Args:
        tokenizer: Decides the vocabulary.
        **text: Fields of the text config that differ.
    """
    sizes: dict[str, Any] = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "sliding_window": 128,
        "max_position_embeddings": 4096,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "initializer_range": 0.05,
    } | text
    ids: dict[str, Any] = {
        name: tokenizer.convert_tokens_to_ids(_IMAGE_TOKENS[f"{name}_token"]) for name in ("boi", "eoi", "image")
    }
    return Gemma3Config(
        text_config=Gemma3TextConfig(
            vocab_size=len(tokenizer) + _SPARE_ROWS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **sizes,
        ),
        vision_config=SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
            vision_use_head=False,
        ),
        mm_tokens_per_image=16,
        boi_token_index=ids["boi"],
        eoi_token_index=ids["eoi"],
        image_token_index=ids["image"],
        initializer_range=0.05,
    )


def write_tiny(directory: Path, words: Sequence[str], clips: Tensor, seed: int = 0, **text: Any) -> None:
    """Writes a tiny Gemma 3 (`gemma/`) and a tiny video generator with its VAE (`cosmos/`) in the hub's layout.

    The VAE is random, so its latent statistics are measured on `clips`: with the full model's statistics its latents
    would hardly differ from each other.

    Args:
        directory: Where to write; an earlier tiny model there is replaced.
        words: Words that are single tokens.
        clips: `(clips, 3, 1 + 4k, height, width)` in [-1, 1], a sample of what the VAE will see.
        seed: Seed of all weights.
        **text: Fields of the text config that differ.
    """
    temporary = directory.with_name(directory.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(words)
        config: Any = tiny_gemma_config(tokenizer, **text)
        model = Gemma3ForConditionalGeneration(config)
        _enliven(model)
        # Gemma 3 starts its projector at zero; a pretrained one is not zero, and a frozen one must let images through.
        torch.nn.init.normal_(
            model.model.multi_modal_projector.mm_input_projection_weight, std=config.vision_config.hidden_size**-0.5
        )
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(seed)  # the VAE does not depend on the size of the language model
        vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
        _spread(vae)
        mean, std = _latent_statistics(WorldEncoder.from_vae(vae), clips)
    vae.register_to_config(latents_mean=mean, latents_std=std)
    model.save_pretrained(temporary / "gemma")
    side = config.vision_config.image_size
    image_processor = Gemma3ImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )
    processor = Gemma3Processor(
        image_processor, tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=config.mm_tokens_per_image
    )
    processor.save_pretrained(temporary / "gemma")
    vae.save_pretrained(temporary / "cosmos" / "vae")
    write_tiny_generator(temporary / "cosmos", words, seed)
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)


@torch.no_grad()
def _latent_statistics(encoder: WorldEncoder, clips: Tensor) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation of each latent channel before normalisation."""
    mode = encoder.denormalise(encoder.encode(clips)).transpose(0, 1).flatten(1)
    return mode.mean(1).tolist(), mode.std(1).clamp_min(1e-6).tolist()


@torch.no_grad()
def _enliven(model: Gemma3ForConditionalGeneration) -> None:
    """Gives a random language model what training would give it: attention that selects, and logits that can be sure.

    With norm weights of one, random attention is nearly uniform and the tied head's logits span too little for any
    answer to be likely; a frozen language model of that kind can not be taught by its inputs alone.
    """
    language_model = model.model.language_model
    language_model.norm.weight.fill_(3.0)
    for layer in language_model.layers:
        layer.self_attn.q_norm.weight.fill_(1.0)


@torch.no_grad()
def _spread(vae: AutoencoderKLWan) -> None:
    """Widens the initial weights of the encoder's convolutions, so small in PyTorch that the VAE is nearly linear.

    A linear encoder can not mix brightness with motion: what a probe reads of a digit's direction from the latents of
    one cell rises from 36% to 68% with this factor (chance is 25%).
    """
    for module in vae.encoder.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            module.weight.mul_(3.0)
