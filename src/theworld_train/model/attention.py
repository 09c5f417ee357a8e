"""Attention without dense masks: what each position may see, and two ways to compute with it.

The rule is that of Gemma 3: a position sees itself and those before it in its document, all of its own image block, and
in sliding layers nothing that lies a window or more behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as flex_attention_of_torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from theworld_train.accounting.pieces import BANDED_ALIGNMENT, BANDED_BLOCK

#: Versions of code that is compiled for one kind of mask; two of each of four cases, and some to spare.
MOST_VERSIONS = 24
#: Names of the two ways, as transformers knows them.
BANDED, FLEX = "theworld_banded", "theworld_flex"


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """What each position of a batch belongs to; made once per micro-batch and read by every layer.

    A layer that computes some positions alone has a layout of its own, of the positions that it reads.

    Attributes:
        documents: `(batch, sequence)` the document of each position, ascending; -1 where nothing real is.
        image_blocks: `(batch, sequence)` the image block of each position, ascending; -1 outside of images.
        places: `(sequence,)` where in the whole sequence the positions are, ascending; None if they are all of it.
        asking: `(queries,)` indices of the positions that the layer computes; None for all.
        last: Layouts of the last layers that have one of their own, by the number of the layer.
    """

    documents: Tensor
    image_blocks: Tensor
    places: Tensor | None = None
    asking: Tensor | None = None
    last: Mapping[int, SequenceLayout] = field(default_factory=dict)
    _made: dict[tuple[object, ...], Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, attention_mask: Tensor, image_tokens: Tensor | None = None) -> SequenceLayout:
        """Returns the layout of a batch of one document a row.

        Args:
            attention_mask: `(batch, sequence)`, 1 at what may be seen.
            image_tokens: `(batch, sequence)`, 1 at image tokens; images are runs of them.
        """
        documents = attention_mask.long() - 1
        if image_tokens is None:
            return cls(documents, torch.full_like(documents, -1))
        inside = image_tokens == 1
        begins = inside & ~functional.pad(inside, (1, 0))[:, :-1]
        return cls(documents, (begins.long().cumsum(-1) - 1).where(inside, -1))

    def allowed(self, query: tuple[int, int], key: tuple[int, int], window: int | None) -> Tensor:
        """Returns which keys of a stretch the queries of another may see, `(batch, queries, keys)`.

        Args:
            query: First query and the end behind the last.
            key: First key and the end behind the last.
            window: Keys that a sliding layer sees, the query itself included; None if the layer sees all.
        """
        queries, keys = slice(*query), slice(*key)
        places = self._places()
        row, column = self._of_asking(places)[queries, None], places[None, keys]
        blocks = self._of_asking(self.image_blocks)[:, queries, None]
        seen = (column <= row) | ((blocks == self.image_blocks[:, None, keys]) & (blocks >= 0))
        if window is not None:
            seen &= column > row - window
        return seen & (self._of_asking(self.documents)[:, queries, None] == self.documents[:, None, keys])

    def trimmed(self, needed: Tensor, windows: Sequence[int | None]) -> SequenceLayout:
        """Returns the layout with those of the last layers, which compute what is needed of them alone.

        Of the last layer that is what is asked for, of the one before it what the last one sees from there, and so on
        to the first layer without a window, whose queries may see everything.

        Args:
            needed: `(batch, sequence)` bool, positions whose output of the last layer is needed.
            windows: Of each layer, as in `allowed`.
        """
        length, everything = self.documents.shape[1], self._places()
        # Every rank and every micro-batch calls every layer, so one position is computed where none is needed.
        needed = needed | ((everything == 0) & ~needed.any())
        asked = needed.any(0).nonzero()[:, 0]
        last: dict[int, SequenceLayout] = {}
        for layer in reversed(range(len(windows))):
            if len(asked) == length:
                break
            window, places = windows[layer], everything
            if window is not None and layer > 0:
                needed = self._seen_by(needed, window)
                places = needed.any(0).nonzero()[:, 0]
            asking = torch.searchsorted(places, asked)
            last[layer] = SequenceLayout(self.documents[:, places], self.image_blocks[:, places], places, asking)
            asked = places
        return replace(self, last=last)

    @property
    def outputs(self) -> Tensor | None:
        """Where in the sequence the outputs of the last layer are, `(positions,)`; None if it computes all."""
        if not self.last:
            return None
        layout = self.last[max(self.last)]
        return layout._of_asking(layout._places())

    def _seen_by(self, asking: Tensor, window: int | None) -> Tensor:
        """Returns which positions some of them see, `(batch, sequence)`; those in between count as seen."""
        index = torch.arange(self.documents.shape[1], device=self.documents.device)
        first, end = self._reach(window)
        behind = first.where(asking, len(index)).flip(-1).cummin(-1).values.flip(-1) <= index
        return behind | (end.where(asking, 0).cummax(-1).values > index)

    def _places(self) -> Tensor:
        return (
            torch.arange(self.documents.shape[1], device=self.documents.device) if self.places is None else self.places
        )

    def _of_asking(self, tensor: Tensor) -> Tensor:
        """Returns what `(..., sequence)` holds at the positions that ask."""
        return tensor if self.asking is None else tensor[..., self.asking]

    def stretches(self, window: int | None) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Returns blocks of queries, each with the shortest stretch of keys that holds all they may see."""
        name = ("stretches", window)
        if name not in self._made:
            self._made[name] = self._stretches(window)
        found: list[tuple[tuple[int, int], tuple[int, int]]] = self._made[name]
        return found

    def _reach(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Returns the first key that each position sees, and the end behind the last, both `(batch, sequence)`."""
        length = self.documents.shape[1]
        place = torch.arange(length, device=self.documents.device).expand_as(self.documents)
        # Of a document the first position, of an image block the end; padding sees no further than itself.
        last_seen = self.documents.cummax(-1).values
        opens = functional.pad(last_seen[:, 1:] != last_seen[:, :-1], (1, 0), value=True)
        first = place.where(opens, 0).cummax(-1).values.where(self.documents >= 0, place)
        closes = functional.pad(self.image_blocks[:, 1:] != self.image_blocks[:, :-1], (0, 1), value=True)
        next_close = (place + 1).where(closes, length).flip(-1).cummin(-1).values.flip(-1)
        end = next_close.where(self.image_blocks >= 0, place + 1)
        if window is not None:
            opening = self._places() - window + 1
            first = first.maximum(opening if self.places is None else torch.searchsorted(self.places, opening))
        return first, end

    def _stretches(self, window: int | None) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        first, end = (self._of_asking(tensor) for tensor in self._reach(window))
        queries, length = first.shape[1], self.documents.shape[1]
        # The values of a few blocks are read, not those of all positions: which takes a GPU no time.
        firsts = torch.stack([block.amin() for block in first.split(BANDED_BLOCK, 1)]).tolist()
        ends = torch.stack([block.amax() for block in end.split(BANDED_BLOCK, 1)]).tolist()
        found = []
        for start, first_key, end_key in zip(range(0, queries, BANDED_BLOCK), firsts, ends, strict=True):
            # Kernels copy what is added to the scores where its rows are no multiple of so many keys.
            keys = first_key // BANDED_ALIGNMENT * BANDED_ALIGNMENT, -(-end_key // BANDED_ALIGNMENT) * BANDED_ALIGNMENT
            found.append(((start, min(queries, start + BANDED_BLOCK)), (keys[0], min(length, keys[1]))))
        return found

    def bias(self, index: int, window: int | None, groups: int, dtype: torch.dtype) -> Tensor:
        """Returns what is added to the scores of one of `stretches`.

        Args:
            index: Of the stretch.
            window: As in `allowed`.
            groups: Times that the rows are repeated.
            dtype: Of the result.

        Returns:
            `(batch, 1, groups x queries, keys)`, zero where a key is seen and minus infinity elsewhere.
        """
        name = ("bias", index, window, groups, dtype)
        if name not in self._made:
            allowed = self.allowed(*self.stretches(window)[index], window)
            bias = torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)
            self._made[name] = bias.repeat(1, groups, 1).unsqueeze(1)
        made: Tensor = self._made[name]
        return made

    def kind(self, window: int | None) -> str:
        """Names the kind of mask that the layout makes of a window: what compiled code depends on besides shapes."""
        return f"{'global' if window is None else window}_{'whole' if self.asking is None else 'trimmed'}"

    def block_mask(self, window: int | None) -> BlockMask:
        """Returns the block mask of FlexAttention."""
        name = ("block_mask", window)
        if name not in self._made:
            documents, blocks, places = self.documents, self.image_blocks, self._places()
            asking_documents, asking_blocks = self._of_asking(documents), self._of_asking(blocks)
            asking_places = self._of_asking(places)

            def seen(batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
                block = asking_blocks[batch, row]
                near = (places[column] <= asking_places[row]) | ((block == blocks[batch, column]) & (block >= 0))
                if window is not None:
                    near = near & (places[column] > asking_places[row] - window)
                return near & (asking_documents[batch, row] == documents[batch, column])

            batch, length = documents.shape
            make = _compiled(_make_block_mask, self.kind(window)) if documents.is_cuda else _make_block_mask
            self._made[name] = make(seen, batch, len(asking_places), length, documents.device)
        made: BlockMask = self._made[name]
        return made


def banded_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, *, window: int | None, scale: float
) -> Tensor:
    """Computes attention block by block of queries, each over the keys that it can see.

    Args:
        query: `(batch, heads, queries, head size)`, of the positions that ask.
        key: `(batch, key-value heads, sequence, head size)`.
        value: Like `key`.
        layout: Of the batch, or of the layer.
        window: Keys that a query sees at most, itself included; None if there is no limit.
        scale: Factor on the scores.

    Returns:
        `(batch, queries, heads, head size)`.
    """
    batch, heads, _, size = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    stretches = [keys for _, keys in layout.stretches(window)]
    blocks = query.split(BANDED_BLOCK, dim=2)
    parts = []
    for index, (block, keys, values) in enumerate(
        zip(blocks, _Stretches.apply(key, stretches), _Stretches.apply(value, stretches), strict=True)
    ):
        # Heads that share keys become rows of one head: nothing is repeated but the rows of the bias.
        rows = block.reshape(batch, kv_heads, groups * block.shape[2], size)
        bias = layout.bias(index, window, groups, query.dtype)
        part = functional.scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
        parts.append(part.reshape(batch, heads, block.shape[2], size).transpose(1, 2))
    return torch.cat(parts, 1)


class _Stretches(torch.autograd.Function):
    """Views of stretches of a sequence; their gradients are added into one fp32 tensor, not each into a whole one."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, stretches: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.stretches, ctx.shape = stretches, tensor.shape
        return tuple(tensor[:, :, first:end] for first, end in stretches)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        total = gradients[0].new_zeros(ctx.shape, dtype=torch.float32)
        for (first, end), gradient in zip(ctx.stretches, gradients, strict=True):
            total[:, :, first:end] += gradient
        return total.to(gradients[0].dtype), None


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout, *, window: int | None, scale: float
) -> Tensor:
    """Computes the same by FlexAttention, which skips blocks of pairs that nothing sees; arguments as above.

    It is compiled on CUDA. Elsewhere it computes all pairs, and has no backward pass.
    """
    attend = _compiled(_attend, layout.kind(window)) if query.is_cuda else _attend
    output: Tensor = attend(query, key, value, layout.block_mask(window), scale)
    return output.transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    return flex_attention_of_torch(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)


def _make_block_mask(
    seen: Callable[..., Tensor], batch: int, queries: int, keys: int, device: torch.device
) -> BlockMask:
    return create_block_mask(seen, batch, None, queries, keys, device=device)


@cache
def _compiled(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Compiles a function in full, for one kind of mask: uncompiled, it would hold all pairs without a word.

    PyTorch compiles a piece of code eight times, and then gives up. Each kind has code of its own, as versions are
    looked up one after the other, and may have as many versions as there can be: with and without gradients, for one
    sample and several, one block of queries and several, one block of keys and several.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{kind}")
    compiled = torch.compile(FunctionType(code, function.__globals__), fullgraph=True, dynamic=True)
    limited: Callable[..., Any] = dynamo_config.patch(recompile_limit=MOST_VERSIONS)(compiled)
    return limited


# -- as transformers calls it -----------------------------------------------------------------------------------------


def _banded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    if not isinstance(attention_mask, SequenceLayout):  # in `generate`, which has a cache
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    return banded_attention(query, key, value, attention_mask, window=window, scale=kwargs["scaling"]), None


def _flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    if not isinstance(attention_mask, SequenceLayout):
        return _sdpa(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")
    return flex_attention(query, key, value, attention_mask, window=window, scale=kwargs["scaling"]), None


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    mask = cast(Tensor | None, attention_mask)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0], None


for _name, _function in ((BANDED, _banded), (FLEX, _flex)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
