"""The Wan 2.1 video VAE, which Cosmos-Predict2 uses, as sizes: every convolution and norm of encoder and decoder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from theworld_train.accounting.architectures import Architecture, Part
from theworld_train.config.errors import ConfigError, Problem


def _conv(in_channels: int, out_channels: int, *kernel: int) -> int:
    """Returns the parameters of a convolution with a bias."""
    taps = 1
    for side in kernel:
        taps *= side
    return in_channels * out_channels * taps + out_channels


def _residual(in_channels: int, out_channels: int) -> int:
    """Returns the parameters of a residual block: two norms, two causal 3x3x3 convolutions, a shortcut where needed."""
    norms = in_channels + out_channels
    shortcut = _conv(in_channels, out_channels, 1) if in_channels != out_channels else 0
    convolutions = _conv(in_channels, out_channels, 3, 3, 3) + _conv(out_channels, out_channels, 3, 3, 3)
    return norms + convolutions + shortcut


def _middle(channels: int) -> int:
    """Returns the parameters of the middle: two residual blocks around one single-head attention."""
    attention = channels + _conv(channels, 3 * channels, 1) + _conv(channels, channels, 1)
    return 2 * _residual(channels, channels) + attention


@dataclass(frozen=True)
class VideoVae(Architecture):
    """`AutoencoderKLWan` of the 2.1 kind (no residual down and up blocks, no attention outside the middle).

    The defaults are those of the class in diffusers and of the released VAE.

    Attributes:
        base_dim: Channels at full resolution.
        decoder_base_dim: The decoder's, if they differ.
        z_dim: Latent channels; the encoder writes a mean and a variance for each.
        dim_mult: Channels at each resolution, as multiples of `base_dim`.
        num_res_blocks: Residual blocks at each resolution of the encoder; the decoder has one more.
        temporal_downsample: Whether each halving of the resolution also halves the frame rate.
        in_channels: Colour channels in.
        out_channels: Colour channels out.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 3
    out_channels: int = 3

    def __post_init__(self) -> None:
        """Raises ConfigError: if a size is not positive or the lists do not fit together."""
        sizes = {
            "base_dim": self.base_dim,
            "decoder_base_dim": self.decoder_base_dim,
            "z_dim": self.z_dim,
            "num_res_blocks": self.num_res_blocks,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
        }
        problems = [
            Problem("must be a positive whole number", key=key, value=value)
            for key, value in sizes.items()
            if value is not None and value < 1
        ]
        if not self.dim_mult or min(self.dim_mult) < 1:
            problems.append(Problem("must hold positive whole numbers", key="dim_mult", value=list(self.dim_mult)))
        if len(self.temporal_downsample) < len(self.dim_mult) - 1:
            problems.append(
                Problem(
                    f"needs an entry for each of the {len(self.dim_mult) - 1} halvings between the entries of dim_mult",
                    key="temperal_downsample",
                    value=list(self.temporal_downsample),
                )
            )
        if problems:
            raise ConfigError(problems)

    def parts(self) -> tuple[Part, ...]:
        """Returns the parts of the encoder, both quantisation convolutions and the decoder."""
        return (
            *self._encoder(),
            Part("quant_conv", "conv", _conv(2 * self.z_dim, 2 * self.z_dim, 1), "1x1x1 on mean and variance"),
            Part("post_quant_conv", "conv", _conv(self.z_dim, self.z_dim, 1), "1x1x1 on the latents"),
            *self._decoder(),
        )

    @property
    def _decoder_dim(self) -> int:
        return self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim

    def _encoder(self) -> tuple[Part, ...]:
        widths = [self.base_dim * mult for mult in (1, *self.dim_mult)]
        blocks = 0
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            blocks += _residual(narrow, wide) + (self.num_res_blocks - 1) * _residual(wide, wide)
            if level < len(self.dim_mult) - 1:
                blocks += _conv(wide, wide, 3, 3)
                blocks += _conv(wide, wide, 3, 1, 1) if self.temporal_downsample[level] else 0
        last = widths[-1]
        return (
            Part("encoder", "input", _conv(self.in_channels, widths[0], 3, 3, 3), f"3x3x3 to {widths[0]} channels"),
            Part("encoder", "blocks", blocks, f"widths {widths[1:]}, {self.num_res_blocks} residual blocks each"),
            Part("encoder", "middle", _middle(last), f"2 residual blocks and attention at {last}"),
            Part("encoder", "output", last + _conv(last, 2 * self.z_dim, 3, 3, 3), f"norm, 3x3x3 to {2 * self.z_dim}"),
        )

    def _decoder(self) -> tuple[Part, ...]:
        widths = [self._decoder_dim * mult for mult in (self.dim_mult[-1], *reversed(self.dim_mult))]
        upsample = tuple(reversed(self.temporal_downsample))
        blocks = 0
        for level, (incoming, wide) in enumerate(pairwise(widths)):
            # Upsampling halves the channels, so that every level but the first starts from half of the last one's.
            narrow = incoming // 2 if level else incoming
            blocks += _residual(narrow, wide) + self.num_res_blocks * _residual(wide, wide)
            if level < len(self.dim_mult) - 1:
                blocks += _conv(wide, wide // 2, 3, 3)
                blocks += _conv(wide, 2 * wide, 3, 1, 1) if upsample[level] else 0
        first, last = widths[0], widths[-1]
        return (
            Part("decoder", "input", _conv(self.z_dim, first, 3, 3, 3), f"3x3x3 to {first} channels"),
            Part("decoder", "middle", _middle(first), f"2 residual blocks and attention at {first}"),
            Part("decoder", "blocks", blocks, f"widths {widths[1:]}, {self.num_res_blocks + 1} residual blocks each"),
            Part(
                "decoder",
                "output",
                last + _conv(last, self.out_channels, 3, 3, 3),
                f"norm, 3x3x3 to {self.out_channels}",
            ),
        )
