"""The world encoder: the encoder half of the Wan 2.1 video VAE, from pixels to normalised latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, WanEncoder3d
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from theworld_train.accounting.tokens import TEMPORAL_COMPRESSION, latent_frames
from theworld_train.config.errors import ConfigError, Problem


def vae_config(overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the full config of the VAE: the class's defaults, which are Wan 2.1's, with `overrides`."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(AutoencoderKLWan.__init__).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    return defaults | {key: value for key, value in (overrides or {}).items() if key in defaults}


def read_vae_config(source: str, revision: str | None) -> dict[str, Any]:
    """Reads what the config of a VAE states, without its weights.

    Args:
        source: Hub id or directory whose `vae` folder holds the VAE.
        revision: Hub revision.

    Raises:
        ConfigError: If there is none, or it is not of Wan 2.1's kind.
    """
    key = "model.world.encoder"
    try:
        stated = dict(AutoencoderKLWan.load_config(source, subfolder="vae", revision=revision))
    except (OSError, ValueError) as error:  # the hub refuses a name that is no repository with a ValueError
        message = f"the config of its video VAE, vae/config.json, cannot be read: {error}"
        hint = "name a directory with a `vae` folder, or run `theworld-train fetch CONFIG` first"
        raise ConfigError(Problem(message, key=key, value=source, hint=hint)) from error
    # Without a `vae` folder, diffusers reads whatever config lies beside it.
    kind, expected = stated.get("_class_name"), AutoencoderKLWan.__name__
    difference = difference_from_wan(stated) if kind == expected else f"_class_name is {kind}, expected {expected}"
    if difference:
        message = f"its VAE is not the one of Wan 2.1 that Cosmos-Predict2 uses: {difference}"
        raise ConfigError(Problem(message, key=key, value=source))
    return {name: value for name, value in stated.items() if name in vae_config()}


def difference_from_wan(config: Mapping[str, Any]) -> str | None:
    """Says in what a VAE's config differs from the kind of Wan 2.1, whose sizes alone may differ."""
    full = vae_config(config)
    expected = {
        "z_dim": 16,
        "in_channels": 3,
        "patch_size": None,
        "is_residual": False,
        "temperal_downsample": [False, True, True],
    }
    found = {name: list(full[name]) if isinstance(full[name], tuple) else full[name] for name in expected}
    found |= {name: len(full[name]) for name in ("dim_mult", "latents_mean", "latents_std")}
    expected |= {"dim_mult": 4, "latents_mean": 16, "latents_std": 16}
    different = [name for name in expected if found[name] != expected[name]]
    return "; ".join(f"{name} is {found[name]}, expected {expected[name]}" for name in different) or None


class FrameConv3d(WanCausalConv3d):
    """A causal convolution; of a frame without a past it computes the last tap in time alone, as others see zeros."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        """Convolves `(clips, channels, frames, height, width)`, given the frames that came before."""
        if x.shape[2] > 1 or cache_x is not None or self.stride[0] > 1:
            result: Tensor = super().forward(x, cache_x)
            return result
        # Channels last: in bf16 the kernels of CPUs and GPUs want it, and norms over channels read in order.
        tap = self.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
        padding = (int(self._padding[2]), int(self._padding[0]))
        frame = functional.conv2d(x.squeeze(2), tap, self.bias, self.stride[1:], padding)
        return frame.unsqueeze(2)


class WorldEncoder(nn.Module):
    """Encoder and quant conv of `AutoencoderKLWan`; parameters carry the names they have there.

    The mode of the posterior is normalised by the `latents_mean` and `latents_std` of the VAE's config. The caches of
    the causal convolutions live in the call, so one instance may serve several threads.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Args: config: the VAE's config as diffusers writes it."""
        super().__init__()
        config = vae_config(config)
        if difference := difference_from_wan(config):
            raise ValueError(f"not a VAE of Wan 2.1's kind: {difference}")
        z_dim = int(config["z_dim"])
        self.z_dim = z_dim
        self.encoder = WanEncoder3d(
            in_channels=config["in_channels"],
            dim=config["base_dim"],
            z_dim=2 * z_dim,
            dim_mult=list(config["dim_mult"]),
            num_res_blocks=config["num_res_blocks"],
            attn_scales=list(config["attn_scales"]),
            temperal_downsample=list(config["temperal_downsample"]),
            dropout=config["dropout"],
            is_residual=config["is_residual"],
        )
        self.quant_conv = WanCausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self._latents_mean = tuple(float(value) for value in config["latents_mean"])
        self._latents_std = tuple(float(value) for value in config["latents_std"])
        #: Whether activations are recomputed in the backward pass, and how; layers of transformers have the same two.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        for module in self.modules():
            if type(module) is WanCausalConv3d:
                module.__class__ = FrameConv3d
        self._cached_convs = sum(isinstance(module, WanCausalConv3d) for module in self.encoder.modules())

    def encode(self, frames: Tensor) -> Tensor:
        """Encodes clips of one length.

        Args:
            frames: `(clips, 3, 1 + 4k, height, width)` in [-1, 1].

        Returns:
            Normalised latents `(clips, channels, 1 + k, height / 8, width / 8)` in the encoder's dtype.

        Raises:
            ValueError: If the number of frames is not 1 + 4k.
        """
        with torch.autocast(frames.device.type, enabled=False):
            return self._encode(frames.to(self.quant_conv.weight.dtype))

    def _encode(self, frames: Tensor) -> Tensor:
        steps = latent_frames(frames.shape[2]) - 1
        if not steps:
            return self._normalised(self.encoder(frames))
        cache: list[Tensor | None] = [None] * self._cached_convs
        chunks = [self.encoder(frames[:, :, :1], feat_cache=cache, feat_idx=[0])]
        for step in range(steps):
            start = 1 + TEMPORAL_COMPRESSION * step
            chunk = frames[:, :, start : start + TEMPORAL_COMPRESSION]
            chunks.append(self.encoder(chunk, feat_cache=cache, feat_idx=[0]))
        return self._normalised(torch.cat(chunks, dim=2))

    def _normalised(self, moments: Tensor) -> Tensor:
        mode = self.quant_conv(moments)[:, : self.z_dim]
        mean, std = self._statistic(self._latents_mean, mode), self._statistic(self._latents_std, mode)
        latents: Tensor = (mode - mean) / std
        return latents

    @classmethod
    def from_vae(cls, vae: AutoencoderKLWan) -> WorldEncoder:
        """Returns an encoder with copies of a whole VAE's weights; its decoder is left behind."""
        encoder = cls(dict(vae.config)).to(vae.quant_conv.weight.device, vae.quant_conv.weight.dtype)
        encoder.encoder.load_state_dict(vae.encoder.state_dict())
        encoder.quant_conv.load_state_dict(vae.quant_conv.state_dict())
        return encoder

    def is_alike(self, other: WorldEncoder) -> bool:
        """Whether another encoder has the same weights, as far as the coarser dtype tells, and the same statistics."""
        ours, theirs = self.state_dict(), other.state_dict()
        coarser = min(self.quant_conv.weight.dtype, other.quant_conv.weight.dtype, key=lambda dtype: dtype.itemsize)
        statistics = (self._latents_mean, self._latents_std) == (other._latents_mean, other._latents_std)
        return (
            statistics
            and ours.keys() == theirs.keys()
            and all(
                weight.shape == theirs[name].shape
                and torch.equal(weight.to(coarser), theirs[name].to(weight.device, coarser))
                for name, weight in ours.items()
            )
        )

    def denormalise(self, latents: Tensor) -> Tensor:
        """Returns the posterior's mode, as the VAE's decoder expects it, from normalised latents."""
        return latents * self._statistic(self._latents_std, latents) + self._statistic(self._latents_mean, latents)

    def _statistic(self, values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)

    def forward(self, frames: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """Encodes world blocks of several lengths: one call for a batch, whatever it holds, so that ranks stay in step.

        Args:
            frames: `(sum(counts), 3, height, width)` in [-1, 1], the blocks one after the other.
            counts: Frames of each block, 1 + 4k.

        Returns:
            Latents `(latent frames of all blocks, channels, height / 8, width / 8)` in the order of the blocks, and the
            latent frames of each block.
        """
        if self.gradient_checkpointing and torch.is_grad_enabled() and self.quant_conv.weight.requires_grad:
            # As a whole: inside, the causal convolutions hand their caches from chunk to chunk.
            latents = self._gradient_checkpointing_func(self._encode_blocks, frames, counts)
        else:
            latents = self._encode_blocks(frames, counts)
        return self._touch(latents, max(counts)), tuple(latent_frames(count) for count in counts)

    def _encode_blocks(self, frames: Tensor, counts: tuple[int, ...]) -> Tensor:
        blocks = frames.split(list(counts))
        latents: list[Tensor] = [frames] * len(blocks)
        for length in sorted(set(counts)):
            members = [index for index, count in enumerate(counts) if count == length]
            encoded = self.encode(torch.stack([blocks[index] for index in members]).transpose(1, 2))
            for index, latent in zip(members, encoded.transpose(1, 2), strict=True):
                latents[index] = latent
        return torch.cat(latents)

    def _touch(self, latents: Tensor, longest: int) -> Tensor:
        """Gives the convolutions over time, which single frames never reach, a gradient of zero instead of none."""
        if longest > 1 or not torch.is_grad_enabled():
            return latents
        idle = [p for name, p in self.encoder.named_parameters() if ".time_conv." in name and p.requires_grad]
        return latents + torch.stack([p.sum() * 0.0 for p in idle]).sum() if idle else latents
