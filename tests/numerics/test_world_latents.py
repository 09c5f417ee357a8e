"""The world encoder gives the latents of diffusers' own VAE, to the last bit, in every way that it is called."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from tests.helpers.tiny import TinyCheckpoint
from theworld_train.model.world_encoder import WorldEncoder

SIDE = 32


@pytest.fixture(scope="module")
def vae(tiny: TinyCheckpoint) -> AutoencoderKLWan:
    return AutoencoderKLWan.from_pretrained(tiny.cosmos, subfolder="vae").eval()


@pytest.fixture(scope="module")
def encoder(vae: AutoencoderKLWan) -> WorldEncoder:
    return WorldEncoder.from_vae(vae).eval()


def clips(frames: int, number: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + frames)
    return torch.rand(number, 3, frames, SIDE, SIDE, generator=generator) * 2 - 1


@torch.no_grad()
def reference(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    """The published recipe: the posterior's mode, minus the config's mean, over its standard deviation."""
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (vae.encode(frames).latent_dist.mode() - mean) / std


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_latents_are_the_vaes(vae: AutoencoderKLWan, encoder: WorldEncoder, frames: int):
    pixels = clips(frames, number=2)
    with torch.no_grad():
        latents = encoder.encode(pixels)
    assert latents.shape == (2, 16, 1 + (frames - 1) // 4, SIDE // 8, SIDE // 8)
    assert latents.dtype == torch.float32
    assert (latents - reference(vae, pixels)).abs().max() == 0


def test_the_statistics_of_the_config_are_used(vae: AutoencoderKLWan):
    assert len(set(vae.config.latents_mean)) == len(set(vae.config.latents_std)) == 16
    stretched = WorldEncoder({**vae.config, "latents_mean": [1.0] * 16, "latents_std": [2.0] * 16})
    stretched.load_state_dict(WorldEncoder.from_vae(vae).state_dict())
    with torch.no_grad():
        mode = vae.encode(clips(5)).latent_dist.mode()
        torch.testing.assert_close(stretched.encode(clips(5)), (mode - 1) / 2, rtol=0, atol=1e-6)
        assert torch.allclose(stretched.denormalise(stretched.encode(clips(5))), mode, atol=1e-6)


def test_blocks_of_several_lengths_come_back_in_their_order(vae: AutoencoderKLWan, encoder: WorldEncoder):
    lengths = (5, 1, 9, 1, 5)
    blocks = [clips(length, seed=index)[0].transpose(0, 1) for index, length in enumerate(lengths)]
    with torch.no_grad():
        latents, counts = encoder(torch.cat(blocks), lengths)
    assert counts == (2, 1, 3, 1, 2)
    for block, part in zip(blocks, latents.split(list(counts)), strict=True):
        expected = reference(vae, block.transpose(0, 1)[None])[0].transpose(0, 1)
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-5)


def test_a_block_does_not_depend_on_its_neighbours(encoder: WorldEncoder):
    first, second, other = (clips(5, seed=seed)[0].transpose(0, 1) for seed in range(3))
    with torch.no_grad():
        before, _ = encoder(torch.cat([first, second]), (5, 5))
        after, _ = encoder(torch.cat([other, second]), (5, 5))
    assert torch.equal(before[2:], after[2:])
    assert not torch.equal(before[:2], after[:2])


def test_later_frames_do_not_change_earlier_latents(encoder: WorldEncoder):
    with torch.no_grad():
        pixels = clips(9)
        start, whole = encoder.encode(pixels[:, :, :5]), encoder.encode(pixels)
        torch.testing.assert_close(whole[:, :, :2], start, rtol=0, atol=1e-6)


def test_one_instance_serves_several_threads(encoder: WorldEncoder):
    inputs = [clips(frames, seed=index) for index, frames in enumerate([5, 9] * 8)]
    with torch.no_grad():
        expected = [encoder.encode(pixels) for pixels in inputs]

    def encode(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return encoder.encode(pixels)

    with ThreadPoolExecutor(2) as threads:
        actual = list(threads.map(encode, inputs))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_calls_leave_nothing_behind(encoder: WorldEncoder):
    state = set(vars(encoder))
    with torch.no_grad():
        before = encoder.encode(clips(5))
        encoder.encode(clips(9, seed=1))
        assert torch.equal(encoder.encode(clips(5)), before)
    assert vars(encoder).keys() == state
    assert not list(encoder.buffers())


def test_autocast_does_not_touch_it(encoder: WorldEncoder):
    with torch.no_grad():
        expected = encoder.encode(clips(5))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.mm(torch.ones(1, 1), torch.ones(1, 1)).dtype == torch.bfloat16
            assert torch.equal(encoder.encode(clips(5)), expected)
            blocks, _ = encoder(clips(5)[0].transpose(0, 1), (5,))
    assert torch.equal(blocks, expected[0].transpose(0, 1))


def test_pixels_are_brought_to_its_dtype(encoder: WorldEncoder):
    with torch.no_grad():
        pixels = clips(1).bfloat16()
        assert torch.equal(encoder.encode(pixels), encoder.encode(pixels.float()))


@pytest.mark.parametrize("frames", [0, 2, 4, 8])
def test_a_clip_of_another_length_is_refused(encoder: WorldEncoder, frames: int):
    with pytest.raises(ValueError, match="1 \\+ 4k frames"):
        encoder.encode(clips(frames))


def test_a_vae_that_patchifies_is_refused(vae: AutoencoderKLWan):
    with pytest.raises(ValueError, match="patch_size is 2, expected None"):
        WorldEncoder({**vae.config, "patch_size": 2})
