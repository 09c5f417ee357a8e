"""Small models that plans are made of, described in memory and never written."""

from __future__ import annotations

from typing import Any

import torch

from theworld_train.config import parse_run_config
from theworld_train.config.schema import RunConfig
from theworld_train.model.attention import BANDED
from theworld_train.model.build import build_on_meta
from theworld_train.model.configuration import TheWorldConfig
from theworld_train.model.modeling import TheWorldForConditionalGeneration
from theworld_train.model.world_encoder import vae_config
from theworld_train.plan.dry_run import materialise

#: The components of the `full` stage.
EVERYTHING = ("world_projector", "vision_tower", "multi_modal_projector", "language_model", "world_encoder")
RESOLUTION = 32


def architecture(attention: str = BANDED, **text: Any) -> TheWorldConfig:
    """Returns a model with every part of the full one, small."""
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4} | {
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 576,
        "sliding_window": 64,
    }
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4} | {
        "model_type": "siglip_vision_model",
        "image_size": 64,
        "patch_size": 16,
        "vision_use_head": False,
    }
    config = TheWorldConfig(
        text_config=sizes | text,
        vision_config=vision,
        world_encoder_config=vae_config({"base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}),
        world_resolution=RESOLUTION,
        mm_tokens_per_image=16,
        boi_token_index=506,
        eoi_token_index=507,
        image_token_index=508,
    )
    config._attn_implementation = {
        "text_config": attention,
        "vision_config": "eager" if attention == "eager" else "sdpa",
    }
    return config


def run_config(
    trainable: tuple[str, ...] = EVERYTHING,
    *,
    batch: int = 2,
    global_batch: int | None = None,
    length: int | None = 128,
    **training: Any,
) -> RunConfig:
    """Returns a run config for it, with a sample length and without data that exists."""
    return parse_run_config(
        {
            "name": "small",
            "output_dir": "unused",
            "model": {"world": {"resolution": RESOLUTION}},
            "trainable": {name: {} for name in trainable},
            "data": {
                "train": {"source": "moving_digits", "split": "train", "samples": 8, "frames": 1},
                "max_sequence_length": length,
            },
            "training": {"max_steps": 2, "global_batch_size": global_batch or batch, "micro_batch_size": batch}
            | training,
        }
    )


def real_model(config: TheWorldConfig) -> TheWorldForConditionalGeneration:
    """Returns the model with random bf16 weights."""
    model = build_on_meta(config)
    materialise(model, torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model
