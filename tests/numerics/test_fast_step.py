"""Each lever of the fast step against the plain path: the same loss and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor

from tests.helpers.tiny import Message, TinyCheckpoint, assistant, clip, image, user
from theworld_train.assemble.model import build_stage, load_model
from theworld_train.batch import Batch
from theworld_train.config import parse_run_config
from theworld_train.config.errors import ConfigError
from theworld_train.config.schema import RunConfig
from theworld_train.data import Collator
from theworld_train.data.source import Sample
from theworld_train.model import attention
from theworld_train.model.attention import SequenceLayout
from theworld_train.model.world_encoder import FrameConv3d
from theworld_train.train.ledger import trainable_components

#: The stages' tables.
PROJECTION = ("world_projector",)
FULL = ("world_projector", "vision_tower", "multi_modal_projector", "language_model", "world_encoder")

#: The first reaches beyond the sliding window of 128 tokens; the second has nothing to see.
CONVERSATIONS: list[list[Message]] = [
    [user("Which way", clip(1, frames=9), "does it move?", image(2), image(3)), assistant("left")],
    [user("Which digit is it?"), assistant("5")],
    [user(image(4), "Which digit is it?"), assistant("7"), user("Which way does it move?", clip(5)), assistant("up")],
]


@pytest.fixture(scope="module")
def batch(tiny: TinyCheckpoint) -> Batch:
    samples = [Sample(str(index), "any", messages) for index, messages in enumerate(CONVERSATIONS)]
    return Collator(tiny.processor(), 4096)(samples)


def config_of(tiny: TinyCheckpoint, trainable: tuple[str, ...], **model: Any) -> RunConfig:
    return parse_run_config(
        {
            "name": "fast",
            "output_dir": "runs/fast",
            "precision": "fp32",
            "model": {"base": tiny.gemma, "world": {"encoder": tiny.cosmos, "resolution": 32}} | model,
            "trainable": {name: {"lr": 1e-3} for name in trainable},
            "data": {"train": {"source": "moving_digits", "split": "train", "samples": 8}},
            "training": {"max_steps": 1},
        }
    )


def loss_and_gradients(config: RunConfig, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    model = load_model(config, trainable_components(config)).model
    stage = build_stage(model, config)
    stage.set_training_modes()
    output = stage(batch, stage.encode(batch), 1)
    output.loss_sum.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return output.loss_sum.item(), gradients


@pytest.mark.parametrize("trainable", [PROJECTION, FULL], ids=["projection", "full"])
@pytest.mark.parametrize(
    "lever",
    [
        {"attention": "banded", "last_layers": "whole"},
        {"attention": "banded", "last_layers": "needed"},
        {"kernels": "lean"},
        {"attention": "sdpa"},
        {"attention": "auto", "kernels": "lean"},
    ],
    ids=str,
)
def test_a_lever_moves_neither_loss_nor_gradients(
    lever: dict[str, str],
    trainable: tuple[str, ...],
    tiny: TinyCheckpoint,
    batch: Batch,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(attention, "BANDED_BLOCK", 40)
    plain = {"attention": "eager", "kernels": "plain"}
    expected_loss, expected = loss_and_gradients(config_of(tiny, trainable, **plain), batch)
    loss, gradients = loss_and_gradients(config_of(tiny, trainable, **(plain | lever)), batch)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in gradients.items():
        # Where the mathematics gives zero, as for biases of keys, rounding is all there is.
        scale = max(float(expected[name].norm()), 1e-3 * largest)
        assert float((gradient - expected[name]).norm()) <= 1e-5 * scale, name


def test_the_trainers_attention_gets_a_layout_and_no_mask(
    tiny: TinyCheckpoint, batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[SequenceLayout, int | None]] = []
    banded = attention.banded_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append((args[3], kwargs["window"]))
        return banded(*args, **kwargs)

    monkeypatch.setattr(attention, "banded_attention", spy)
    loss_and_gradients(config_of(tiny, PROJECTION), batch)
    layouts = {id(layout): layout for layout, _ in seen}.values()
    assert [layout.asking is None for layout in layouts] == [True, False], "one for all layers but the last"
    assert {window for _, window in seen} == {128, None}


@pytest.mark.parametrize(
    ("trainable", "lockstep", "calls"),
    [(PROJECTION, False, 1), (PROJECTION, True, 2), (FULL, False, 2)],
    ids=["frozen", "gathered", "trained"],
)
def test_the_head_is_computed_once_where_it_is_frozen_and_whole(
    trainable: tuple[str, ...], lockstep: bool, calls: int, tiny: TinyCheckpoint, batch: Batch
):
    config = config_of(tiny, trainable)
    model = load_model(config, trainable_components(config)).model
    stage = build_stage(model, config)
    stage.set_training_modes()
    stage.lockstep = lockstep
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    stage(batch, stage.encode(batch), 2).loss_sum.backward()
    assert len(seen) == (calls if calls == 1 else 2 * calls)


def test_flex_attention_is_refused_where_it_has_no_backward_pass(tiny: TinyCheckpoint):
    if torch.cuda.is_available():
        pytest.skip("it has one here")
    config = config_of(tiny, PROJECTION, attention="flex")
    with pytest.raises(ConfigError, match="has no backward pass on a CPU"):
        load_model(config, trainable_components(config))


@pytest.mark.parametrize("kernel", [3, (3, 1, 1), 1], ids=str)
@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("past", [0, 1, 2])
def test_a_frame_without_a_past_takes_the_last_tap_alone(kernel: Any, frames: int, past: int):
    torch.manual_seed(0)
    padding = kernel // 2 if isinstance(kernel, int) else (1, 0, 0)
    conv = WanCausalConv3d(4, 6, kernel, padding=padding)
    frame_conv = WanCausalConv3d(4, 6, kernel, padding=padding)
    frame_conv.load_state_dict(conv.state_dict())
    frame_conv.__class__ = FrameConv3d
    inputs = torch.randn(2, 4, frames, 8, 8)
    before = torch.randn(2, 4, past, 8, 8) if past and kernel != 1 else None
    results = []
    for module in (conv, frame_conv):
        given = inputs.clone().requires_grad_()
        output = module(given, before)
        gradients = torch.autograd.grad(output.square().sum(), [given, *module.parameters()])
        results.append((output.detach(), *gradients))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
