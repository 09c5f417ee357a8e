"""The loss: cross entropy at supervised positions alone, in chunks, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from theworld_train.batch import IGNORE_INDEX

#: Positions of a chunk where nothing is computed twice, so that small ones cost nothing.
FROZEN_CHUNK = 256


class LossOutput(NamedTuple):
    """What a forward pass yields.

    Attributes:
        loss_sum: Cross entropy in nats, summed over the supervised tokens of this batch.
        predictions: `(supervised tokens,)` the most likely token at each supervised position, if asked for.
        logits: `(batch, sequence, vocabulary)` in fp32, of `reference_loss` alone, whose output holds them.
        token_losses: `(supervised tokens,)` fp32, the loss of each, if predictions are asked for.
    """

    loss_sum: Tensor
    predictions: Tensor | None
    logits: Tensor | None = None
    token_losses: Tensor | None = None


def num_chunks(num_supervised: int, chunk_size: int) -> int:
    """Returns the chunks that so many supervised positions take; one at least, so that every rank calls the head."""
    return max(1, -(-num_supervised // chunk_size))


def next_tokens(labels: Tensor) -> Tensor:
    """Returns the label of the position behind each, `(batch, sequence)`; -100 at the last one."""
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def supervised_loss(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    *,
    chunk_size: int,
    chunks: int,
    places: Tensor | None = None,
    never_generated: Sequence[int] = (),
    want_predictions: bool = False,
    frozen_head: bool = False,
    fused: bool = False,
) -> LossOutput:
    """Computes the loss of next-token prediction from hidden states.

    Logits exist for one chunk at a time. Where there are several, they are computed again in the backward pass, but for
    a frozen head: its gradient with respect to the hidden states is taken while the logits are there.

    Args:
        hidden: `(batch, sequence, hidden)`, the language model's output, or what `places` has of it.
        labels: `(batch, sequence)`, -100 where not supervised; the token itself elsewhere.
        head: Maps hidden states to logits; called as a module, so that engines that shard it can gather it.
        chunk_size: Positions in a chunk.
        chunks: Chunks to compute, at least as many as needed; surplus ones are empty. All ranks pass the same number.
        places: `(positions,)` where in the sequence the hidden states are, if they are not all of it.
        never_generated: Ids that generation suppresses, which therefore cannot be predictions.
        want_predictions: Whether to return predictions, and the loss of each token.
        frozen_head: Whether the head has no gradient and is not gathered by an engine, whose hooks belong to backward
            passes.
        fused: Whether the head is a `LigerHead`, which then computes the loss of what needs a gradient and no
            predictions.

    Returns:
        The summed loss and, if asked for, predictions and losses in row-major order of the supervised positions.
    """
    targets = next_tokens(labels) if places is None else next_tokens(labels)[:, places]
    supervised = targets != IGNORE_INDEX
    states, targets = hidden[supervised], targets[supervised]
    assert len(targets) <= chunks * chunk_size, f"{len(targets)} supervised positions do not fit {chunks} chunks"
    if fused and not want_predictions and torch.is_grad_enabled():
        states, targets = (states, targets) if len(targets) else _nothing(hidden, labels)
        return LossOutput(head(states, targets, chunk_size), None)
    if frozen_head and not want_predictions and torch.is_grad_enabled() and hidden.requires_grad:
        total: Tensor = _FrozenHeadLoss.apply(states, targets, head, min(chunk_size, FROZEN_CHUNK))  # type: ignore[no-untyped-call]
        return LossOutput(total, None)

    def compute(part: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(part).float()
        reduction = "none" if want_predictions else "sum"
        loss = functional.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction=reduction)
        if not want_predictions:
            return loss, target
        if never_generated:
            logits = logits.index_fill(-1, torch.tensor(list(never_generated), device=logits.device), -torch.inf)
        return loss, logits.argmax(-1)

    losses, predictions = [], []
    for index in range(chunks):
        part = states[index * chunk_size : (index + 1) * chunk_size]
        target = targets[index * chunk_size : (index + 1) * chunk_size]
        if not len(part):
            part, target = _nothing(hidden, labels)
        if chunks > 1 and torch.is_grad_enabled():
            loss, predicted = checkpoint(compute, part, target, use_reentrant=False)
        else:
            loss, predicted = compute(part, target)
        losses.append(loss)
        predictions.append(predicted)
    if not want_predictions:
        return LossOutput(torch.stack(losses).sum(), None)
    token_losses = torch.cat(losses)  # those of empty chunks are zero, and at the end
    number = len(targets)
    return LossOutput(token_losses.sum(), torch.cat(predictions)[:number], token_losses=token_losses[:number])


def _nothing(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a state and a target of a loss of zero; they keep the graph, and the calls, equal on every rank."""
    return hidden[:1, 0] * 0.0, labels.new_full((1,), IGNORE_INDEX)


class _FrozenHeadLoss(torch.autograd.Function):
    """The summed loss, with its gradient computed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: nn.Module, chunk_size: int) -> Tensor:  # noqa: ANN401
        gradient = torch.empty_like(states)
        total = torch.zeros((), device=states.device)
        for start in range(0, len(states), chunk_size):
            chunk = slice(start, start + chunk_size)
            with torch.enable_grad():
                part = states[chunk].detach().requires_grad_()
                loss = functional.cross_entropy(head(part).float(), targets[chunk], reduction="sum")
            loss.backward()
            assert part.grad is not None
            gradient[chunk] = part.grad
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None


def reference_loss(hidden: Tensor, labels: Tensor, attention_mask: Tensor, head: nn.Module) -> LossOutput:
    """Computes the same loss the way Gemma 3 of transformers 4.56 does, to compare memory with trainers that use it.

    It holds logits of all positions in fp32, and a shifted copy of those that are no padding.

    Args:
        hidden: `(batch, sequence, hidden)`, the language model's output.
        labels: `(batch, sequence)`, -100 where not supervised.
        attention_mask: `(batch, sequence)`, 1 at real tokens.
        head: Maps hidden states to logits.
    """
    logits = head(hidden).float()
    real = attention_mask[:, 1:] != 0
    shifted = logits[:, :-1][real].contiguous()
    loss = functional.cross_entropy(shifted, labels[:, 1:][real], ignore_index=IGNORE_INDEX, reduction="sum")
    return LossOutput(loss, None, logits)
