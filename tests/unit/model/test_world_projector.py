"""Protects how latents become embeddings: their scale, their place in time, their number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from theworld_train.model import TheWorldConfig
from theworld_train.model.build import gemma_4b_config
from theworld_train.model.world_projector import WorldProjector

HIDDEN = 64
RMS = 0.7


def build(**fields: Any) -> WorldProjector:
    """Returns a projector with fresh parameters for latents of 4 x 4 cells."""
    config = TheWorldConfig(
        text_config={"model_type": "gemma3_text", "hidden_size": HIDDEN},
        **{"world_resolution": 32, "world_embedding_rms": RMS} | fields,
    )
    projector = WorldProjector(config)
    torch.manual_seed(0)
    projector.reset_parameters()
    return projector


def latents(frames: int, scale: float = 1.0) -> Tensor:
    return torch.randn(frames, 16, 4, 4, generator=torch.Generator().manual_seed(frames)) * scale


def rms(values: Tensor) -> Tensor:
    return values.square().mean(-1).sqrt()


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("layout", ["spatial", "channel"])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_every_token_has_the_rms_of_text(projection: str, layout: str, scale: float):
    projector = build(world_projection=projection, world_tokens=layout)
    nn.init.zeros_(projector.temporal)
    embeddings = projector(latents(3, scale), (1, 2))[0]
    assert embeddings.shape == (3, 16, HIDDEN)
    torch.testing.assert_close(rms(embeddings), torch.full((3, 16), RMS), rtol=1e-3, atol=0)


def test_the_brackets_have_the_rms_of_text():
    brackets = build()(latents(1), (1,))[1]
    assert brackets.shape == (2, HIDDEN)
    torch.testing.assert_close(rms(brackets), torch.full((2,), RMS), rtol=0.3, atol=0)
    assert not torch.equal(*brackets)


def test_an_image_and_the_last_frame_of_a_clip_are_the_present():
    projector = build(max_world_steps=4)
    assert projector.temporal.shape == (9, HIDDEN)
    with torch.no_grad():
        projector.temporal.copy_(torch.arange(9).float()[:, None].expand(9, HIDDEN))
        moved = projector(latents(6), (1, 3, 2))[0]
        projector.temporal.zero_()
        offsets = (moved - projector(latents(6), (1, 3, 2))[0]).mean((1, 2)) / RMS
    torch.testing.assert_close(offsets - 4, torch.tensor([0.0, -2, -1, 0, -1, 0]))


def test_a_block_that_reaches_too_far_back_is_refused():
    projector = build(max_world_steps=2)
    assert projector(latents(3), (3,))[0].shape[0] == 3
    with pytest.raises(ValueError, match=r"4 latent frames reaches 3 steps.*max_world_steps=2"):
        projector(latents(4), (4,))[0]


def test_a_block_may_begin_with_the_present_or_before_it():
    projector = build(max_world_steps=4)
    with torch.no_grad():
        projector.temporal.copy_(torch.arange(9).float()[:, None].expand(9, HIDDEN))
        moved = projector(latents(9), (1, 3, 3, 2), (0, 0, -1, -1))[0]
        projector.temporal.zero_()
        offsets = (moved - projector(latents(9), (1, 3, 3, 2))[0]).mean((1, 2)) / RMS
    torch.testing.assert_close(offsets - 4, torch.tensor([0.0, 0, 1, 2, -1, 0, 1, -1, 0]))


@pytest.mark.parametrize(("count", "first"), [(4, 0), (2, 2), (3, -3)])
def test_a_block_that_reaches_too_far_is_refused(count: int, first: int):
    with pytest.raises(ValueError, match=rf"{count} latent frames reaches 3 steps.*max_world_steps=2"):
        build(max_world_steps=2)(latents(count), (count,), (first,))


@pytest.mark.parametrize("pool", [2, 4])
@pytest.mark.parametrize("layout", ["spatial", "channel"])
def test_pooled_tokens_are_those_of_the_mean_of_their_cells(layout: str, pool: int):
    pooled, values = build(world_tokens=layout, world_pool=pool), latents(2)
    whole = build(world_tokens=layout, world_resolution=32 // pool)
    assert {name: value.shape for name, value in pooled.state_dict().items()} == {
        name: value.shape for name, value in whole.state_dict().items()
    }
    squares = values.unflatten(3, (4 // pool, pool)).unflatten(2, (4 // pool, pool))
    torch.testing.assert_close(pooled(values, (2,))[0], whole(squares.mean((3, 5)), (2,))[0])


def test_a_spatial_token_is_one_cell():
    projector, values = build(world_tokens="spatial", world_projection="linear"), latents(1)
    changed = values.clone()
    changed[0, :, 1, 2] += 1
    with torch.no_grad():
        different = (projector(values, (1,))[0] - projector(changed, (1,))[0]).abs().amax(-1)[0]
    assert different.nonzero().flatten().tolist() == [1 * 4 + 2]


def test_a_channel_token_is_one_channel():
    projector, values = build(world_tokens="channel"), latents(1)
    changed = values.clone()
    changed[0, 5] += torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        different = (projector(values, (1,))[0] - projector(changed, (1,))[0]).abs().amax(-1)[0]
    assert different.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_nothing_follows_the_last_matrix(projection: str):
    layers = [
        module for module in build(world_projection=projection).projection.modules() if not list(module.children())
    ]
    assert [type(layer) for layer in layers] == {
        "linear": [nn.Linear],
        "mlp": [nn.Linear, nn.GELU, nn.Linear],
    }[projection]


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@pytest.mark.parametrize("layout", ["spatial", "channel"])
def test_a_gradient_reaches_every_tensor(projection: str, layout: str):
    projector = build(world_projection=projection, world_tokens=layout, max_world_steps=2)
    target = torch.randn(3, 16, HIDDEN)
    ((projector(latents(3), (3,))[0] - target).square().sum() + projector(latents(1), (1,))[1].pow(3).sum()).backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad is not None, name
        rows = parameter.grad[:3] if name == "temporal" else parameter.grad  # a clip has no future
        assert (rows.flatten(1) if rows.dim() > 1 else rows[:, None]).abs().amax(-1).min() > 0, name


@pytest.mark.parametrize(
    ("layout", "resolution", "tokens", "features"),
    [("spatial", 512, 4096, 16), ("spatial", 224, 784, 16), ("channel", 512, 16, 4096), ("channel", 224, 16, 784)],
)
def test_tokens_and_features_of_a_latent_frame(layout: str, resolution: int, tokens: int, features: int):
    config = gemma_4b_config(world_tokens=layout, world_resolution=resolution)
    assert (config.world_tokens_per_frame, config.world_features) == (tokens, features)


@pytest.mark.parametrize(
    "field",
    [
        {"world_projection": "conv"},
        {"world_tokens": "patch"},
        {"world_resize": "fit"},
        {"world_resolution": 30},
        {"world_pool": 3},
        {"world_pool": 8},
        {"world_resolution": 0},
        {"world_resolution": -8},
    ],
)
def test_a_field_without_meaning_is_refused(field: dict[str, Any]):
    (name,) = field
    with pytest.raises(Exception, match=name):
        build(**field)
