"""The last layers of the language model, which compute the positions alone that the loss depends on."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention, Gemma3DecoderLayer, rotate_half

from theworld_train.model.attention import SequenceLayout


class TrimmedAttention(Gemma3Attention):
    """`Gemma3Attention` whose queries are those positions that its layout names; keys and values are all."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,  # noqa: ANN401
        attention_mask: Any = None,  # noqa: ANN401
        **kwargs: Any,
    ) -> Any:  # noqa: ANN401
        """Maps `(batch, sequence, hidden)` to `(batch, queries, hidden)`; arguments as in the parent."""
        if not isinstance(attention_mask, SequenceLayout) or attention_mask.asking is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        asking = attention_mask.asking
        query = self.q_norm(self._heads(self.q_proj(hidden_states.index_select(1, asking))))
        key = self.k_norm(self._heads(self.k_proj(hidden_states)))
        cos, sin = (each.unsqueeze(1) for each in position_embeddings)
        attended, _ = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation](
            self,
            query * cos[:, :, asking] + rotate_half(query) * sin[:, :, asking],
            key * cos + rotate_half(key) * sin,
            self._heads(self.v_proj(hidden_states)),
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
        )
        return self.o_proj(attended.flatten(2)), None

    def _heads(self, projected: Tensor) -> Tensor:
        """Returns `(batch, heads, sequence, head size)`."""
        batch, length = projected.shape[:2]
        return projected.view(batch, length, -1, self.head_dim).transpose(1, 2)


class TrimmedLayer(Gemma3DecoderLayer):
    """`Gemma3DecoderLayer` that computes the positions alone that its own layout names, if there is one."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,  # noqa: ANN401
        attention_mask: Any = None,  # noqa: ANN401
        **kwargs: Any,
    ) -> Any:  # noqa: ANN401
        """Maps `(batch, sequence, hidden)` to `(batch, queries, hidden)`; arguments as in the parent."""
        layout = attention_mask.last.get(self.layer_idx) if isinstance(attention_mask, SequenceLayout) else None
        if layout is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        assert layout.asking is not None
        cos, sin = (each[:, layout.places] for each in position_embeddings)
        states = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(states, position_embeddings=(cos, sin), attention_mask=layout)
        hidden = hidden_states.index_select(1, layout.asking) + self.post_attention_layernorm(attended)
        result: Tensor = hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))
        return result


def make_trimmed(module: nn.Module) -> None:
    """Lets the layers inside of a module compute less where layouts say so, in place; parameters stay what they are."""
    for part in module.modules():
        if type(part) is Gemma3Attention:
            part.__class__ = TrimmedAttention
        elif type(part) is Gemma3DecoderLayer:
            part.__class__ = TrimmedLayer
