"""Liger's kernels, for CUDA: Gemma's norms and gated activation, and the head with its loss."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm

from theworld_train.batch import IGNORE_INDEX
from theworld_train.model.kernels import Forms


class LigerRMSNorm(Gemma3RMSNorm):
    """`Gemma3RMSNorm` as one kernel forward and one backward; keeps its input and one fp32 number for each row."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last dimension of `x`, in its dtype."""
        from liger_kernel.transformers.functional import liger_rms_norm

        # Not in place: the gradient of the output is needed again where it passes the norm by.
        result: Tensor = liger_rms_norm(x, self.weight, self.eps, offset=1.0, casting_mode="gemma", in_place=False)
        return result


class LigerMLP(Gemma3MLP):
    """`Gemma3MLP` with one kernel between its matrix products, which computes the activation again backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(batch, sequence, hidden)` to the same shape."""
        from liger_kernel.transformers.functional import liger_geglu

        result: Tensor = self.down_proj(liger_geglu(self.gate_proj(x), self.up_proj(x)))
        return result


#: Liger's forms.
LIGER = Forms(LigerRMSNorm, LigerMLP)


class LigerHead(nn.Linear):
    """The head of a language model, which computes its loss itself where it is given targets."""

    def forward(self, input: Tensor, targets: Tensor | None = None, chunk_size: int = 1) -> Tensor:  # noqa: A002
        """Returns the logits, or the loss.

        Gradients are computed with the loss, in chunks: that of the weight in fp32, and only if it trains.

        Args:
            input: `(positions, hidden)`, or any leading dimensions without targets.
            targets: `(positions,)` the token to predict at each position, or -100; at least one position.
            chunk_size: Positions whose logits are held at once; more of them where the vocabulary is not many times as
                large as the hidden size, as Liger's chunks have at least as many numbers as all states.

        Returns:
            Without targets the logits, and with them their cross entropy in nats, summed, in fp32.
        """
        if targets is None:
            return super().forward(input)
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        chunks = -(-len(input) // chunk_size)
        loss: Tensor = liger_fused_linear_cross_entropy(
            input,
            self.weight,
            targets,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            accum_dtype=torch.float32,
            # Chunks so large that each has a `chunks`-th of the positions; by itself Liger would take few positions a
            # chunk, and read the weight once more for each.
            chunk_mem_const=-(-self.out_features // (self.in_features * chunks)),
        )
        return loss


def fuse_head(head: nn.Linear) -> None:
    """Makes a head compute its loss itself, in place; its weight stays what it is."""
    assert isinstance(head, nn.Linear), type(head).__name__
    assert head.bias is None, "Gemma 3's head has none"
    head.__class__ = LigerHead


def find_obstacle() -> str | None:
    """Returns why Liger's kernels cannot run on this machine, or None if they can."""
    if find_spec("liger_kernel") is None:
        return "needs the package 'liger-kernel', which is not installed"
    return None if torch.cuda.is_available() else "needs a GPU, and there is none"
