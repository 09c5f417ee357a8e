"""Fail when diffusers moves a seam that the world encoder is built on."""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_wan
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, WanEncoder3d

from theworld_train.model.world_encoder import vae_config


def build() -> WanEncoder3d:
    torch.manual_seed(0)
    return WanEncoder3d(
        dim=4, z_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def test_the_encoder_is_built_from_these_arguments():
    parameters = inspect.signature(WanEncoder3d.__init__).parameters
    ours = {"in_channels", "dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "dropout", "is_residual"}
    assert {*ours, "temperal_downsample"} <= parameters.keys()
    assert parameters["non_linearity"].default == "silu"
    assert list(inspect.signature(WanCausalConv3d.__init__).parameters)[1:4] == [
        "in_channels",
        "out_channels",
        "kernel_size",
    ]


def test_the_config_has_the_fields_that_we_read():
    config = vae_config()
    read = "base_dim z_dim dim_mult num_res_blocks attn_scales temperal_downsample dropout is_residual in_channels"
    assert {*read.split(), "latents_mean", "latents_std", "patch_size"} <= config.keys()
    assert config["patch_size"] is None


def test_its_defaults_are_those_of_wan_2_1():
    """A full-size model is built from them without a download."""
    config = vae_config()
    assert (config["base_dim"], config["z_dim"], config["num_res_blocks"]) == (96, 16, 2)
    assert list(config["dim_mult"]) == [1, 2, 4, 4]
    assert list(config["temperal_downsample"]) == [False, True, True]
    assert list(config["attn_scales"]) == []
    assert not config["is_residual"]
    assert len(config["latents_mean"]) == len(config["latents_std"]) == 16
    assert config["latents_mean"][:2] == [-0.7571, -0.7089]
    assert config["latents_std"][:2] == [2.8184, 1.4541]


def test_a_cache_has_one_place_for_each_causal_convolution():
    """The protocol: a list that the encoder fills in order, and a counter that ends at its length."""
    encoder = build()
    number = sum(isinstance(module, WanCausalConv3d) for module in encoder.modules())
    cache: list[torch.Tensor | None] = [None] * number
    counters = []
    with torch.no_grad():
        for frames in (1, 4, 4):
            counter = [0]
            chunk = encoder(torch.rand(1, 3, frames, 16, 16), feat_cache=cache, feat_idx=counter)
            assert chunk.shape == (1, 8, 1, 2, 2)
            counters.append(counter[0])
    assert len(set(counters)) == 1
    assert 0 < counters[0] <= number
    assert autoencoder_kl_wan.CACHE_T == 2


def test_the_cache_is_all_that_a_call_changes():
    encoder = build()
    with torch.no_grad():
        pixels = torch.rand(1, 3, 1, 16, 16)
        number = sum(isinstance(module, WanCausalConv3d) for module in encoder.modules())
        results = [encoder(pixels, feat_cache=[None] * number, feat_idx=[0]) for _ in range(2)]
    assert torch.equal(*results)


def test_the_vae_has_the_parts_that_are_copied():
    with torch.device("meta"):
        vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    assert isinstance(vae.encoder, WanEncoder3d)
    assert isinstance(vae.quant_conv, WanCausalConv3d)
    assert vae.quant_conv.kernel_size == (1, 1, 1)
    encode = inspect.signature(AutoencoderKLWan.encode).parameters
    assert list(encode)[:2] == ["self", "x"]


@pytest.mark.parametrize("name", ["_enc_feat_map", "_enc_conv_idx"])
def test_the_vae_still_keeps_its_cache_in_itself(name: str):
    """Why the encoder is called directly: one VAE cannot serve two threads. If this fails, that reason is gone."""
    vae = AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.encode(torch.zeros(1, 3, 1, 16, 16))
    assert hasattr(vae, name)
