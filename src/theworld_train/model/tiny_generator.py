"""A tiny pipeline of Cosmos-Predict2's kind, random, around a VAE that has been written before."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from string import ascii_letters, digits, punctuation
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos2VideoToWorldPipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import T5Config, T5EncoderModel, T5Tokenizer

_CHARACTERS = ascii_letters + digits + punctuation


def write_tiny_generator(directory: Path, words: Iterable[str], seed: int = 0) -> None:
    """Completes a directory with `vae/` to a pipeline in the hub's layout: transformer, text encoder, scheduler.

    Args:
        directory: Holds the VAE.
        words: Words of the text encoder that are single tokens.
        seed: Seed of the weights.
    """
    vae: Any = AutoencoderKLWan.load_config(directory, subfolder="vae")
    tokenizer = _tokenizer(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = T5EncoderModel(
            T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
        )
        transformer: Any = CosmosTransformer3DModel(
            in_channels=vae["z_dim"] + 1,  # and a mask of the frames that are given
            out_channels=vae["z_dim"],
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2.0,
            text_embed_dim=32,
            adaln_lora_dim=4,
            rope_scale=(1.0, 3.0, 3.0),
            extra_pos_embed_type=None,
        )
    scheduler: Any = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    text_encoder.save_pretrained(directory / "text_encoder")
    tokenizer.save_pretrained(directory / "tokenizer")
    transformer.save_pretrained(directory / "transformer")
    scheduler.save_pretrained(directory / "scheduler")
    parts = (text_encoder, tokenizer, transformer, scheduler)
    names = ("text_encoder", "tokenizer", "transformer", "scheduler")
    index = {
        name: [type(part).__module__.split(".")[0], type(part).__name__]
        for name, part in zip(names, parts, strict=True)
    }
    index["vae"] = ["diffusers", AutoencoderKLWan.__name__]
    header = {"_class_name": Cosmos2VideoToWorldPipeline.__name__, "_diffusers_version": vae["_diffusers_version"]}
    (directory / "model_index.json").write_text(json.dumps(header | index, indent=2))


def _tokenizer(words: Iterable[str]) -> T5Tokenizer:
    """Returns a tokenizer of T5's kind, a unigram model, in which every one of `words` is a single token."""
    pieces = ["▁", *_CHARACTERS, *(f"▁{word}" for word in sorted(set(words)))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *((piece, -1.0) for piece in dict.fromkeys(pieces))], extra_ids=0)
