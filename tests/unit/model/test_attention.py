"""Attention from layouts: who sees whom, and that blocks and dense masks compute the same."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from theworld_train.accounting.pieces import BANDED_ALIGNMENT, BANDED_BLOCK, AttentionWork, attended_pairs
from theworld_train.model import attention
from theworld_train.model.attention import SequenceLayout, banded_attention, flex_attention

LENGTH = 61


def draw_layout(generator: torch.Generator, kind: str) -> SequenceLayout:
    """Two rows with images at different places; padded on a side, with a hole, or with several documents."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    images = torch.zeros(2, LENGTH, dtype=torch.long)
    images[0, 5:14] = images[0, 20:29] = images[1, 11:20] = 1
    if kind == "right":
        mask[1, 40:] = 0
    elif kind == "left":
        mask[1, :9] = 0
    elif kind == "hole":
        mask[:, 30:44] = 0
    layout = SequenceLayout.of(mask, images)
    if kind != "packed":
        return layout
    documents = torch.zeros(2, LENGTH, dtype=torch.long)
    documents[0, 14:], documents[1, 8:], documents[1, 33:] = 1, 1, 2
    documents[1, 50:] = -1
    return SequenceLayout(documents, layout.image_blocks)


KINDS = ("plain", "right", "left", "hole", "packed")


def dense(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, window: int | None, scale: float
) -> Tensor:
    """The same by scores of all pairs, in the words of the rule."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scale
    batch, length = layout.documents.shape
    allowed = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    for sample in range(batch):
        for row in range(length):
            for column in range(length):
                same_image = layout.image_blocks[sample, row] == layout.image_blocks[sample, column] >= 0
                allowed[sample, 0, row, column] = (
                    layout.documents[sample, row] == layout.documents[sample, column]
                    and (column <= row or same_image)
                    and (window is None or row - column < window)
                )
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that image blocks and windows reach across."""
    monkeypatch.setattr(attention, "BANDED_BLOCK", 8)
    monkeypatch.setattr(attention, "BANDED_ALIGNMENT", 1)


def drawn(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    def tensor(heads: int) -> Tensor:
        return torch.randn(2, heads, LENGTH, 16, generator=generator, requires_grad=True)

    return tensor(4), tensor(2), tensor(2)


@pytest.mark.parametrize("window", [None, 12, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_compute_what_scores_of_all_pairs_do(kind: str, window: int | None):
    generator = torch.Generator().manual_seed(0)
    layout, tensors = draw_layout(generator, kind), drawn(generator)
    real = layout.documents >= 0
    results = []
    for function in (banded_attention, dense):
        output = function(*tensors, layout, window=window, scale=0.3)
        weight = torch.linspace(-1, 1, output.numel()).view_as(output) * real[..., None, None]
        results.append((output[real], *torch.autograd.grad((output * weight).sum(), tensors)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_computes_the_same(kind: str, window: int | None):
    generator = torch.Generator().manual_seed(0)
    layout, tensors = draw_layout(generator, kind), [tensor.detach() for tensor in drawn(generator)]
    actual, expected = (f(*tensors, layout, window=window, scale=0.3) for f in (flex_attention, banded_attention))
    real = layout.documents >= 0
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_flex_attention_is_compiled_for_all_shapes_that_a_kind_of_mask_has(monkeypatch: pytest.MonkeyPatch):
    """Of one piece of code PyTorch refuses a ninth version unless it is told otherwise."""
    versions = CompileCounter()  # as on CUDA, up to the making of kernels
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=versions))
    attend = attention._compiled(attention._attend, "of-this-test")
    shapes = [(100, 100), (100, 300), (200, 300)]  # one block of 128 and several
    for batch, (queries, keys), gradient in product((1, 2), shapes, (False, True)):
        query, key = (torch.randn(batch, heads, n, 16) for heads, n in ((4, queries), (2, keys)))
        begin = keys - queries
        mask = attention._make_block_mask(
            lambda _batch, _head, row, column, begin=begin: column <= row + begin, batch, queries, keys, query.device
        )
        with torch.set_grad_enabled(gradient):
            output = attend(query, key, key, mask, 0.3)
        bias = torch.ones(queries, keys, dtype=torch.bool).tril(begin)
        whole = functional.scaled_dot_product_attention(query, key, key, bias, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(output, whole, rtol=0, atol=1e-5)
    assert versions.frame_count > 8


def test_each_kind_of_mask_is_compiled_by_itself():
    layout = SequenceLayout.of(torch.ones(1, LENGTH))
    last = layout.trimmed(torch.arange(LENGTH)[None] > 50, [12, None, 12])
    kinds = {of.kind(window) for of in (layout, last.last[2]) for window in (12, None)}
    codes = {attention._compiled(attention._attend, kind) for kind in kinds}
    assert len(codes) == len(kinds) == 4


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_stretches_hold_what_their_queries_see_and_begin_and_end_there(kind: str, window: int | None):
    layout = draw_layout(torch.Generator().manual_seed(0), kind)
    covered = []
    for query, key in layout.stretches(window):
        everything = layout.allowed(query, (0, LENGTH), window)
        outside = [*range(key[0]), *range(key[1], LENGTH)]
        assert not everything[..., outside][layout.documents[:, slice(*query)] >= 0].any()
        assert everything[..., key[1] - 1].any()
        covered += range(*query)
    assert covered == list(range(LENGTH))


def test_documents_that_are_packed_cost_what_they_cost_alone():
    documents = torch.arange(4).repeat_interleave(16)[None]
    layout = SequenceLayout(documents, torch.full_like(documents, -1))
    assert [key for _, key in layout.stretches(None)] == [
        (16 * document, 16 * document + 8 * half) for document in range(4) for half in (1, 2)
    ]


@pytest.mark.parametrize("window", [None, 200])
def test_scores_computed_are_those_that_are_counted(window: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "BANDED_BLOCK", BANDED_BLOCK)
    monkeypatch.setattr(attention, "BANDED_ALIGNMENT", BANDED_ALIGNMENT)
    layout = SequenceLayout.of(torch.ones(1, 1300))
    tensor = torch.zeros(1, 1, 1300, 8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        banded_attention(tensor, tensor, tensor, layout, window=window, scale=1.0)
    assert counter.get_total_flops() == 4 * 8 * attended_pairs(1300, window, AttentionWork("banded"))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_added_to_scores_are_aligned_for_kernels(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "BANDED_ALIGNMENT", 4)
    layout = draw_layout(torch.Generator().manual_seed(0), kind)
    for window in (None, 12):
        for _, (first, end) in layout.stretches(window):
            assert first % 4 == 0
            assert end % 4 == 0 or end == LENGTH


def test_gradients_of_keys_are_added_in_fp32():
    generator = torch.Generator().manual_seed(0)
    layout, exact = draw_layout(generator, "plain"), drawn(generator)
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    expected, actual = (
        torch.autograd.grad(banded_attention(*tensors, layout, window=None, scale=0.3).float().sum(), tensors[1])[0]
        for tensors in ([tensor.detach().float().requires_grad_() for tensor in rounded], rounded)
    )
    assert actual.dtype is torch.bfloat16
    assert float((actual - expected).norm() / expected.norm()) < 6e-3


def test_a_sliding_layer_never_reaches_further_than_its_window():
    layout = SequenceLayout.of(torch.ones(1, LENGTH))
    assert all(stop - first <= 12 - 1 + 8 for (_, stop), (first, _) in layout.stretches(12))


def test_keys_of_heads_that_share_them_are_not_repeated(monkeypatch: pytest.MonkeyPatch):
    seen = []
    sdpa = functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
        seen.append((key.shape[1], key.untyped_storage().nbytes()))
        return sdpa(query, key, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", spy)
    generator = torch.Generator().manual_seed(0)
    query, key, value = drawn(generator)
    banded_attention(query, key, value, draw_layout(generator, "plain"), window=12, scale=0.3)
    assert set(seen) == {(2, key.untyped_storage().nbytes())}
