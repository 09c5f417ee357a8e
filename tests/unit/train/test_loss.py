"""The chunked loss is the plain cross entropy, with logits for one chunk at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from theworld_train.train.loss import num_chunks, reference_loss, supervised_loss

HIDDEN, VOCABULARY = 8, 50
SHAPE = (3, 12)


class CountingHead(nn.Linear):
    """A head that notes how many positions each call was given."""

    def __init__(self) -> None:
        super().__init__(HIDDEN, VOCABULARY, bias=False)
        self.calls: list[int] = []

    def forward(self, states: Tensor) -> Tensor:
        self.calls.append(len(states))
        return super().forward(states)


@pytest.fixture
def head() -> CountingHead:
    torch.manual_seed(0)
    return CountingHead()


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(*SHAPE, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def labels() -> Tensor:
    """Rows with 7, 2 and 0 supervised positions, and one at the first token, which nothing precedes."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(VOCABULARY, SHAPE, generator=generator)
    keep = torch.zeros(SHAPE, dtype=torch.bool)
    keep[0, 4:11] = True
    keep[1, [3, 11]] = True
    keep[2, 0] = True
    return torch.where(keep, values, -100)


def plain(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    logits = functional.linear(hidden, head.weight)[:, :-1].float()
    targets = labels[:, 1:]
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def test_the_reference_loss_is_the_plain_one_and_keeps_its_logits(hidden: Tensor, labels: Tensor, head: CountingHead):
    mask = torch.ones(SHAPE, dtype=torch.int64)
    mask[1, -1:] = 0  # a supervised token of the padding does not count
    found = reference_loss(hidden, labels, mask, head)
    expected = plain(hidden, labels.masked_fill(mask == 0, -100), head)
    assert found.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(gradients(found.loss_sum, hidden, head), gradients(expected, hidden, head), strict=True):
        torch.testing.assert_close(one, other)
    assert found.logits is not None
    assert found.logits.shape == (*SHAPE, VOCABULARY)
    assert found.logits.dtype == torch.float32
    assert head.calls == [SHAPE[0]]


def gradients(loss: Tensor, hidden: Tensor, head: nn.Module) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [hidden, *head.parameters()])


@pytest.mark.parametrize(
    ("chunk_size", "chunks"),
    [(100, 1), (9, 1), (5, 2), (2, 5), (1, 9), (4, 7), (100, 3)],
    ids=["one", "one-exact", "two", "many", "each", "empty-ones", "empty-only-after-first"],
)
def test_equals_plain_cross_entropy_forward_and_backward(
    hidden: Tensor, labels: Tensor, head: CountingHead, chunk_size: int, chunks: int
):
    assert num_chunks(9, chunk_size) <= chunks
    output = supervised_loss(hidden, labels, head, chunk_size=chunk_size, chunks=chunks)
    assert output.predictions is None
    expected = plain(hidden, labels, head)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-6, atol=0)
    for actual, reference in zip(
        gradients(output.loss_sum, hidden, head), gradients(expected, hidden, head), strict=True
    ):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunks", [1, 2, 5, 9])
def test_head_is_called_once_for_each_chunk(hidden: Tensor, labels: Tensor, head: CountingHead, chunks: int):
    output = supervised_loss(hidden, labels, head, chunk_size=9, chunks=chunks)
    assert head.calls == [9] + [1] * (chunks - 1), "an empty chunk passes one position that counts nothing"
    output.loss_sum.backward()
    # Several chunks are recomputed in the backward pass, each once; that number too is the same on every rank.
    assert len(head.calls) == (1 if chunks == 1 else 2 * chunks)


@pytest.mark.parametrize("chunk_size", [100, 9, 5, 1])
def test_a_frozen_heads_gradient_is_taken_while_the_logits_are_there(
    hidden: Tensor, labels: Tensor, head: CountingHead, chunk_size: int
):
    head.requires_grad_(False)
    chunks = num_chunks(9, chunk_size)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        output = supervised_loss(hidden, labels, head, chunk_size=chunk_size, chunks=chunks, frozen_head=True)
    expected = plain(hidden, labels, head)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-6, atol=0)
    (gradient,), (reference,) = (torch.autograd.grad(loss / 3, hidden) for loss in (output.loss_sum, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-7)
    assert len(head.calls) == chunks, "each chunk is computed once"
    assert 9 * HIDDEN in kept, "what is left is the gradient of the supervised positions"


def test_a_frozen_head_without_a_supervised_token_gives_zero(hidden: Tensor, labels: Tensor, head: CountingHead):
    nothing = torch.full_like(labels, -100)
    head.requires_grad_(False)
    output = supervised_loss(hidden, nothing, head, chunk_size=4, chunks=1, frozen_head=True)
    assert output.loss_sum.item() == 0.0
    assert not torch.autograd.grad(output.loss_sum, hidden)[0].any()


class FusedHead(CountingHead):
    """A head that computes its loss itself where it is given targets."""

    def forward(self, states: Tensor, targets: Tensor | None = None, chunk_size: int = 1) -> Tensor:
        logits = super().forward(states)
        if targets is None:
            return logits
        self.chunk_size = chunk_size
        return functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


@pytest.fixture
def fused_head() -> FusedHead:
    torch.manual_seed(0)
    return FusedHead()


def test_a_fused_head_gets_the_supervised_positions_at_once(hidden: Tensor, labels: Tensor, fused_head: FusedHead):
    output = supervised_loss(hidden, labels, fused_head, chunk_size=4, chunks=3, fused=True)
    torch.testing.assert_close(output.loss_sum, plain(hidden, labels, fused_head), rtol=1e-6, atol=0)
    assert fused_head.calls == [9]
    assert fused_head.chunk_size == 4


def test_a_fused_head_without_a_supervised_token_gives_zero(hidden: Tensor, labels: Tensor, fused_head: FusedHead):
    nothing = torch.full_like(labels, -100)
    output = supervised_loss(hidden, nothing, fused_head, chunk_size=4, chunks=1, fused=True)
    assert output.loss_sum.item() == 0.0
    gradients = torch.autograd.grad(output.loss_sum, [hidden, fused_head.weight])
    assert not any(gradient.any() for gradient in gradients)


def test_a_fused_head_gives_logits_where_predictions_or_no_gradients_are_asked_for(
    hidden: Tensor, labels: Tensor, fused_head: FusedHead
):
    expected = plain(hidden, labels, fused_head)
    output = supervised_loss(hidden, labels, fused_head, chunk_size=4, chunks=3, want_predictions=True, fused=True)
    assert output.predictions is not None
    assert fused_head.calls == [4, 4, 1]
    with torch.no_grad():
        other = supervised_loss(hidden, labels, fused_head, chunk_size=4, chunks=3, fused=True)
    assert fused_head.calls == 2 * [4, 4, 1]
    for loss in (output.loss_sum, other.loss_sum):
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_without_gradients_nothing_is_recomputed(hidden: Tensor, labels: Tensor, head: CountingHead):
    with torch.no_grad():
        supervised_loss(hidden, labels, head, chunk_size=4, chunks=3)
    assert head.calls == [4, 4, 1]


@pytest.mark.parametrize("chunks", [1, 3])
def test_no_supervised_token_gives_zero_loss_and_zero_gradients(
    hidden: Tensor, labels: Tensor, head: CountingHead, chunks: int
):
    output = supervised_loss(
        hidden, torch.full_like(labels, -100), head, chunk_size=4, chunks=chunks, want_predictions=True
    )
    assert output.loss_sum.item() == 0.0
    assert output.predictions is not None
    assert output.predictions.shape == (0,)
    assert len(head.calls) == chunks
    for gradient in gradients(output.loss_sum, hidden, head):
        assert not gradient.any(), "zero, and not absent: the engine waits for it"


def test_logits_exist_for_one_chunk_at_a_time(hidden: Tensor, labels: Tensor, head: CountingHead):
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        supervised_loss(hidden, labels, head, chunk_size=3, chunks=3)
    assert VOCABULARY * 3 not in kept
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        supervised_loss(hidden, labels, head, chunk_size=9, chunks=1)
    assert VOCABULARY * 9 in kept


@pytest.mark.parametrize("chunk_size", [100, 2])
def test_predictions_are_the_most_likely_tokens_in_order(
    hidden: Tensor, labels: Tensor, head: CountingHead, chunk_size: int
):
    chunks = num_chunks(9, chunk_size)
    output = supervised_loss(hidden, labels, head, chunk_size=chunk_size, chunks=chunks, want_predictions=True)
    logits = functional.linear(hidden, head.weight)[:, :-1]
    expected = logits.argmax(-1)[labels[:, 1:] != -100]
    assert output.predictions is not None
    assert output.predictions.tolist() == expected.tolist()
    places = labels[:, 1:] != -100
    losses = functional.cross_entropy(logits[places], labels[:, 1:][places], reduction="none")
    torch.testing.assert_close(output.token_losses, losses)


def test_predictions_leave_out_what_is_never_generated(hidden: Tensor, labels: Tensor, head: CountingHead):
    options = {"chunk_size": 4, "chunks": 3, "want_predictions": True}
    first = supervised_loss(hidden, labels, head, **options)
    assert first.predictions is not None
    banned = sorted(set(first.predictions.tolist()))[:3]
    second = supervised_loss(hidden, labels, head, never_generated=banned, **options)
    assert second.predictions is not None
    logits = functional.linear(hidden, head.weight)[:, :-1][labels[:, 1:] != -100]
    logits[:, banned] = -torch.inf
    assert second.predictions.tolist() == logits.argmax(-1).tolist()
    assert torch.equal(first.loss_sum, second.loss_sum), "the loss is that of the model, suppressed or not"


def test_bf16_states_give_a_loss_in_fp32(hidden: Tensor, labels: Tensor, head: CountingHead):
    half, states = head.to(torch.bfloat16), hidden.detach().to(torch.bfloat16)
    output = supervised_loss(states, labels, half, chunk_size=4, chunks=3)
    assert output.loss_sum.dtype == torch.float32
    torch.testing.assert_close(output.loss_sum, plain(states, labels, half), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("supervised", "size", "expected"), [(0, 4, 1), (1, 4, 1), (4, 4, 1), (5, 4, 2), (9, 4, 3)])
def test_number_of_chunks(supervised: int, size: int, expected: int):
    assert num_chunks(supervised, size) == expected
