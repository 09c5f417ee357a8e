"""The last layers compute what is needed of them alone: outputs and gradients are those of whole layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import Gemma3TextConfig, Gemma3TextModel

from tests.unit.model.test_attention import KINDS, LENGTH, draw_layout
from theworld_train.accounting import pieces
from theworld_train.accounting.architectures import Decoder
from theworld_train.accounting.config_json import architecture_from_config
from theworld_train.accounting.pieces import AttentionWork, attended_pairs, decoder_layers
from theworld_train.model import attention
from theworld_train.model.attention import BANDED, FLEX, SequenceLayout
from theworld_train.model.last_layers import make_trimmed

WINDOW = 7
#: Layers by kind, and how many of the last ones compute less.
DEPTHS = {
    "ends-in-windows": ("fss", 3),
    "ends-in-all": ("sfsf", 1),
    "all-windows": ("sss", 3),
    "one": ("s", 1),
}


def build(kinds: str, implementation: str = BANDED) -> Gemma3TextModel:
    names = {"s": "sliding_attention", "f": "full_attention"}
    config = Gemma3TextConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=len(kinds),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=[names[kind] for kind in kinds],
    )
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = Gemma3TextModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    make_trimmed(model)
    return model.eval()


def windows(kinds: str) -> list[int | None]:
    return [WINDOW if kind == "s" else None for kind in kinds]


def run(model: Gemma3TextModel, embeds: Tensor, layout: SequenceLayout) -> Tensor:
    masks: Any = dict.fromkeys(model.config.layer_types, layout)
    positions = torch.arange(LENGTH)[None]
    return model(inputs_embeds=embeds, attention_mask=masks, position_ids=positions, use_cache=False).last_hidden_state


def late(layout: SequenceLayout) -> Tensor:
    """The last three real positions of each row."""
    real = layout.documents >= 0
    return real & (real.flip(-1).cumsum(-1).flip(-1) <= 3)


def scattered(layout: SequenceLayout) -> Tensor:
    """Several positions of a row, some of them before an image, within one, or in another document."""
    needed = torch.zeros_like(layout.documents, dtype=torch.bool)
    needed[0, [3, 22, 40]] = needed[1, [13, 35]] = True
    return needed & (layout.documents >= 0)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BANDED_BLOCK", 8)
    monkeypatch.setattr(attention, "BANDED_ALIGNMENT", 4)


@pytest.mark.parametrize("which", [late, scattered])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_needed_positions_and_all_gradients_are_those_of_whole_layers(
    kind: str, depth: str, which: Callable[[SequenceLayout], Tensor]
):
    kinds, trimmed_layers = DEPTHS[depth]
    layout, model = draw_layout(torch.Generator().manual_seed(0), kind), build(kinds)
    needed = which(layout)
    trimmed = layout.trimmed(needed, windows(kinds))
    assert len(trimmed.last) == trimmed_layers
    embeds = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    results = []
    for given in (layout, trimmed):
        output = run(model, embeds, given)
        places = needed if given is layout else needed[:, given.outputs]
        states = output[places]
        weight = torch.linspace(-1, 1, states.numel()).view_as(states)
        results.append((states, *torch.autograd.grad((states * weight).sum(), [embeds, *model.layers.parameters()])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_flex_attention_trims_as_well():
    layout = draw_layout(torch.Generator().manual_seed(0), "packed")
    trimmed = layout.trimmed(scattered(layout), windows("fss"))
    embeds = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = [run(build("fss", name), embeds, replace(trimmed, _made={})) for name in (BANDED, FLEX)]
    assert trimmed.outputs is not None
    places = scattered(layout)[:, trimmed.outputs]
    torch.testing.assert_close(outputs[0][places], outputs[1][places], rtol=1e-5, atol=1e-5)


def test_what_layers_compute_grows_by_a_window_a_layer():
    layout = SequenceLayout.of(torch.ones(1, LENGTH))
    needed = torch.zeros(1, LENGTH, dtype=torch.bool)
    needed[0, 50:55] = True
    last = layout.trimmed(needed, windows("sfsss")).last
    computed = {layer: own.places[own.asking].tolist() for layer, own in last.items()}
    assert computed == {
        4: list(range(50, 55)),
        3: list(range(44, 55)),
        2: list(range(38, 55)),
        1: list(range(32, 55)),
    }
    assert last[1].places.tolist() == list(range(LENGTH)), "a layer without a window reads everything"


@pytest.mark.parametrize("needed", [1, 5, 40, LENGTH - 1])
@pytest.mark.parametrize("kinds", ["sfsss", "fss", "sfsf", "sss", "ff", "ssf", "fs", "s"])
def test_what_is_counted_is_what_is_computed(kinds: str, needed: int):
    model = build(kinds)
    layout = SequenceLayout.of(torch.ones(1, LENGTH))
    supervised = (torch.arange(LENGTH) >= LENGTH - 1 - needed) & (torch.arange(LENGTH) < LENGTH - 1)
    last = layout.trimmed(supervised[None], windows(kinds)).last
    decoder = architecture_from_config(model.config.to_dict(), "config.json")
    assert isinstance(decoder, Decoder)
    counted = [each for each in decoder_layers(decoder, LENGTH, needed) if each.queries != (0, LENGTH)]
    assert [(len(own.places), own.asking.tolist()) for own in last.values()] == [
        (each.positions, list(range(*each.queries))) for each in counted
    ]
    assert sum(each.number for each in decoder_layers(decoder, LENGTH, needed)) == len(kinds)
    for own, each in zip(last.values(), counted, strict=True):
        pairs = sum((end - start) * (stop - first) for (start, end), (first, stop) in own.stretches(each.window))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "BANDED_BLOCK", 8)
            patch.setattr(pieces, "BANDED_ALIGNMENT", 4)
            assert attended_pairs(each.positions, each.window, AttentionWork("banded"), each.queries) == pairs


def test_an_image_that_is_seen_from_within_is_seen_to_its_end():
    images = torch.zeros(1, LENGTH, dtype=torch.long)
    images[0, 20:40] = 1
    layout = SequenceLayout.of(torch.ones(1, LENGTH), images)
    needed = torch.zeros(1, LENGTH, dtype=torch.bool)
    needed[0, 25] = True
    last = layout.trimmed(needed, windows("ss")).last
    assert last[1].places.tolist() == list(range(19, 40))


def test_one_position_is_computed_where_none_is_needed():
    layout = SequenceLayout.of(torch.ones(2, LENGTH))
    trimmed = layout.trimmed(torch.zeros(2, LENGTH, dtype=torch.bool), windows("fs"))
    assert run(build("fs"), torch.randn(2, LENGTH, 32), trimmed).shape == (2, 1, 32)


def test_nothing_is_trimmed_where_everything_is_needed():
    layout = SequenceLayout.of(torch.ones(1, LENGTH))
    trimmed = layout.trimmed(torch.ones(1, LENGTH, dtype=torch.bool), windows("fs"))
    assert not trimmed.last
    assert trimmed.outputs is None


def test_fewer_positions_are_multiplied():
    layout, model = SequenceLayout.of(torch.ones(1, LENGTH)), build("fss")
    needed = torch.zeros(1, LENGTH, dtype=torch.bool)
    needed[0, -4:] = True
    trimmed = layout.trimmed(needed, windows("fss"))
    counts = []
    for given in (layout, trimmed):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(model, torch.zeros(1, LENGTH, 32), given)
        counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    per_query, per_key = 2 * 32 * (2 * 64 + 3 * 48), 2 * 32 * 2 * 32
    whole = 3 * LENGTH * (per_query + per_key)
    queries, keys = 4 + (4 + 6) + (4 + 12), (4 + 6) + (4 + 12) + LENGTH
    assert counts == [whole, queries * per_query + keys * per_key]
