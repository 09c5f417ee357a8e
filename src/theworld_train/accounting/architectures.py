"""What a model is made of, as sizes: descriptions of architectures whose parameters follow from closed formulas."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from theworld_train.config.errors import ConfigError, Problem


class Part(NamedTuple):
    """The parameters of one kind in one component.

    Attributes:
        component: Dotted path of the component, such as `language_model`; empty for a model of one component.
        name: What they do: `embedding`, `position`, `attention`, `mlp`, `norms`, `head`, or a component's own word.
        parameters: How many there are.
        formula: How the number comes about, with the sizes put in.
    """

    component: str
    name: str
    parameters: int
    formula: str


class Stack(NamedTuple):
    """A stack of transformer layers, as far as the approximation 12 x layers x width^2 sees it."""

    num_hidden_layers: int
    hidden_size: int


@dataclass(frozen=True)
class AttentionShape:
    """What decides the size of a decoder's key-value cache.

    Attributes:
        num_hidden_layers: Layers that hold a cache.
        num_attention_heads: Query heads of a layer.
        num_key_value_heads: Key and value heads of a layer; fewer than query heads means grouped-query attention.
        head_dim: Features of one head.
        sliding_window: Tokens that a windowed layer looks back at, itself included.
        num_windowed_layers: Layers that see `sliding_window` tokens only.
    """

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    sliding_window: int | None = None
    num_windowed_layers: int = 0


class Architecture(ABC):
    """Anything whose parameters can be listed by part."""

    @abstractmethod
    def parts(self) -> tuple[Part, ...]:
        """Returns the parts; their parameters add up to the whole, tied weights counted once."""

    @property
    def num_parameters(self) -> int:
        """All parameters, tied weights counted once."""
        return sum(part.parameters for part in self.parts())

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The transformer stacks in it."""
        return ()

    @property
    def attention_shape(self) -> AttentionShape | None:
        """What its key-value cache depends on; None for what does not decode."""
        return None

    @property
    def num_language_parameters(self) -> int | None:
        """Parameters of its language model, embedding included; None for what has none."""
        return None

    def component(self, path: str) -> int:
        """Returns the parameters of the component `path` and of all that lie in it."""
        return sum(
            part.parameters
            for part in self.parts()
            if part.component == path or part.component.startswith(path + ".") or not path
        )


def dimension_problems(sizes: Mapping[str, int | None], zero_allowed: Collection[str] = ()) -> list[Problem]:
    """Returns what is wrong with the sizes of a transformer: each for itself, and those that must divide one another.

    Args:
        sizes: The sizes by their standard names; None stands for one that was not stated and is derived.
        zero_allowed: Names that may be zero.
    """
    problems = []
    for key, value in sizes.items():
        if value is not None and value < (0 if key in zero_allowed else 1):
            expected = "zero or a positive whole number" if key in zero_allowed else "a positive whole number"
            problems.append(Problem(f"must be {expected}", key=key, value=value))
    sound = {
        key: value
        for key, value in sizes.items()
        if value is not None and key not in {problem.key for problem in problems}
    }
    if sizes.get("head_dim") is None:
        problems += _indivisible(sound, "hidden_size", "num_attention_heads", "state head_dim, or a width that divides")
    problems += _indivisible(sound, "num_attention_heads", "num_key_value_heads", None)
    return problems


def _indivisible(sizes: Mapping[str, int], whole: str, divisor: str, hint: str | None) -> list[Problem]:
    if whole not in sizes or divisor not in sizes or sizes[whole] % sizes[divisor] == 0:
        return []
    message = f"must be a multiple of {divisor}, which is {sizes[divisor]}"
    return [Problem(message, key=whole, value=sizes[whole], hint=hint)]


def _times(*factors: int) -> str:
    return " x ".join(f"{factor:,}" for factor in factors)


@dataclass(frozen=True)
class Decoder(Architecture):
    """A decoder-only transformer of the GPT-2, Llama, Gemma or Gemma 3 kind.

    Attributes:
        hidden_size: Width of the residual stream.
        num_hidden_layers: Layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Features of one head; need not be `hidden_size / num_attention_heads`.
        intermediate_size: Width of the MLP.
        vocab_size: Rows of the token embedding; 0 for an expert that is fed embeddings and has no head.
        tie_word_embeddings: Whether the head is the token embedding, and so costs nothing.
        num_learned_positions: Rows of a learned position embedding; 0 for rotary positions.
        gated_mlp: Three matrices (gate, up, down) rather than two.
        qkv_bias: Whether the query, key and value projections have biases.
        output_bias: Whether attention's output projection has one.
        mlp_bias: Whether the MLP's projections have them.
        norm: `rms` has a scale, `layer` a scale and a shift.
        norms_per_layer: 2 (before attention and MLP), or 4 (also after them, Gemma 2 and 3).
        qk_norm: Whether queries and keys are normalised per head.
        sliding_window: Tokens that a windowed layer sees; None if every layer sees all.
        num_full_attention_layers: Layers that see all tokens although there is a window.
        num_last_windowed_layers: Layers with a window behind the last one that sees all tokens; None if those that do
            are every so many layers, as in Gemma 3.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    num_learned_positions: int = 0
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norms_per_layer: int = 2
    qk_norm: bool = False
    sliding_window: int | None = None
    num_full_attention_layers: int = 0
    num_last_windowed_layers: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError: if a size is not positive or one does not divide another that it must divide."""
        problems = dimension_problems(
            {
                "hidden_size": self.hidden_size,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": self.num_key_value_heads,
                "head_dim": self.head_dim,
                "intermediate_size": self.intermediate_size,
                "vocab_size": self.vocab_size,
                "num_learned_positions": self.num_learned_positions,
                "sliding_window": self.sliding_window,
                "num_full_attention_layers": self.num_full_attention_layers,
            },
            zero_allowed=("vocab_size", "num_learned_positions", "num_full_attention_layers"),
        )
        if 0 < self.num_hidden_layers < self.num_full_attention_layers:
            message = f"must not exceed the {self.num_hidden_layers} layers"
            problems.append(Problem(message, key="num_full_attention_layers", value=self.num_full_attention_layers))
        if problems:
            raise ConfigError(problems)

    def parts(self) -> tuple[Part, ...]:
        """Returns embedding, position (if learned), attention, mlp, norms and head."""
        parts = [self._embedding(), self._attention(), self._mlp(), self._norms(), self._head()]
        if self.num_learned_positions:
            parameters = self.num_learned_positions * self.hidden_size
            parts.insert(1, Part("", "position", parameters, _times(self.num_learned_positions, self.hidden_size)))
        return tuple(parts)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Its one stack."""
        return (Stack(self.num_hidden_layers, self.hidden_size),)

    @property
    def attention_shape(self) -> AttentionShape:
        """What its key-value cache depends on."""
        return AttentionShape(
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.sliding_window,
            self.num_windowed_layers,
        )

    @property
    def num_windowed_layers(self) -> int:
        """Layers that see only `sliding_window` tokens."""
        return self.num_hidden_layers - self.num_full_attention_layers if self.sliding_window is not None else 0

    @property
    def last_windows(self) -> tuple[int | None, ...]:
        """Windows of the last layers, the last one first, up to the first among them that sees all tokens."""
        last, full = self.num_last_windowed_layers, self.num_full_attention_layers
        if self.sliding_window is None:
            last = 0
        elif last is None:
            last = self.num_hidden_layers % (self.num_hidden_layers // full) if full else self.num_hidden_layers
        windows = (*[self.sliding_window] * last, None)
        return windows[: self.num_hidden_layers]

    @property
    def num_language_parameters(self) -> int:
        """All of it."""
        return self.num_parameters

    def _embedding(self) -> Part:
        if not self.vocab_size:
            return Part("", "embedding", 0, "none: it is fed embeddings")
        return Part(
            "",
            "embedding",
            self.vocab_size * self.hidden_size,
            f"vocabulary {_times(self.vocab_size, self.hidden_size)}",
        )

    def _attention(self) -> Part:
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        weights = 2 * self.hidden_size * (queries + keys)
        bias = (queries + 2 * keys if self.qkv_bias else 0) + (self.hidden_size if self.output_bias else 0)
        formula = f"{self.num_hidden_layers} x (Q, O: 2 x {_times(self.hidden_size, queries)}"
        formula += f" + K, V: 2 x {_times(self.hidden_size, keys)}" + (f" + biases {bias:,})" if bias else ")")
        return Part("", "attention", self.num_hidden_layers * (weights + bias), formula)

    def _mlp(self) -> Part:
        matrices = 3 if self.gated_mlp else 2
        weights = matrices * self.hidden_size * self.intermediate_size
        bias = ((matrices - 1) * self.intermediate_size + self.hidden_size) if self.mlp_bias else 0
        formula = f"{self.num_hidden_layers} x ({matrices} x {_times(self.hidden_size, self.intermediate_size)}"
        formula += f" + biases {bias:,})" if bias else ")"
        return Part("", "mlp", self.num_hidden_layers * (weights + bias), formula)

    def _norms(self) -> Part:
        vectors = 2 if self.norm == "layer" else 1
        per_layer = self.norms_per_layer * vectors * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        final = vectors * self.hidden_size
        formula = f"{self.num_hidden_layers} x {per_layer:,} + final {final:,}"
        return Part("", "norms", self.num_hidden_layers * per_layer + final, formula)

    def _head(self) -> Part:
        if not self.vocab_size:
            return Part("", "head", 0, "none")
        if self.tie_word_embeddings:
            return Part("", "head", 0, "tied: the token embedding, counted there")
        return Part("", "head", self.vocab_size * self.hidden_size, _times(self.hidden_size, self.vocab_size))


@dataclass(frozen=True)
class VisionTransformer(Architecture):
    """A SigLIP vision tower: patches, learned positions, pre-norm layers with biases, and optionally a pooling head.

    Attributes:
        hidden_size: Width.
        num_hidden_layers: Layers.
        num_attention_heads: Heads; they divide the width.
        intermediate_size: Width of the MLP.
        image_size: Side of the square image in pixels.
        patch_size: Side of a patch in pixels.
        num_channels: Colour channels.
        pooling_head: Whether the attention pooling of contrastive training is kept.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int = 3
    pooling_head: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError: if a size is not positive or the heads do not divide the width."""
        sizes = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "patch_size": self.patch_size,
            "num_channels": self.num_channels,
        }
        problems = dimension_problems(sizes)
        if self.image_size < max(self.patch_size, 1):
            problems.append(Problem("must hold at least one patch", key="image_size", value=self.image_size))
        if problems:
            raise ConfigError(problems)

    def parts(self) -> tuple[Part, ...]:
        """Returns embedding (of patches), position, attention, mlp, norms and head."""
        width, layers, inner = self.hidden_size, self.num_hidden_layers, self.intermediate_size
        pixels = self.num_channels * self.patch_size**2
        patches = (self.image_size // self.patch_size) ** 2
        attention = 4 * (width * width + width)
        mlp = 2 * width * inner + inner + width
        return (
            Part("", "embedding", pixels * width + width, f"patches {_times(pixels, width)} + {width:,}"),
            Part("", "position", patches * width, _times(patches, width)),
            Part("", "attention", layers * attention, f"{layers} x 4 x ({_times(width, width)} + {width:,})"),
            Part("", "mlp", layers * mlp, f"{layers} x (2 x {_times(width, inner)} + biases {inner + width:,})"),
            Part("", "norms", (2 * layers + 1) * 2 * width, f"({layers} x 2 + final) x 2 x {width:,}"),
            self._head(attention + mlp),
        )

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Its one stack."""
        return (Stack(self.num_hidden_layers, self.hidden_size),)

    def _head(self, layer: int) -> Part:
        if not self.pooling_head:
            return Part("", "head", 0, "none")
        # A learned query, attention, one norm and an MLP of a layer's size.
        parameters = 3 * self.hidden_size + layer
        return Part("", "head", parameters, f"query and norm 3 x {self.hidden_size:,} + a layer's {layer:,}")


@dataclass(frozen=True)
class Linear(Architecture):
    """A linear layer."""

    in_features: int
    out_features: int
    bias: bool = True

    def parts(self) -> tuple[Part, ...]:
        """Returns its one part."""
        formula = _times(self.in_features, self.out_features) + (f" + {self.out_features:,}" if self.bias else "")
        parameters = self.in_features * self.out_features + (self.out_features if self.bias else 0)
        return (Part("", "linear", parameters, formula),)


@dataclass(frozen=True)
class Gemma3Projector(Architecture):
    """Gemma 3's `multi_modal_projector`: pooled vision features are normalised and projected, without a bias."""

    vision_hidden_size: int
    text_hidden_size: int

    def parts(self) -> tuple[Part, ...]:
        """Returns the projection and the norm."""
        weights = self.vision_hidden_size * self.text_hidden_size
        return (
            Part("", "linear", weights, _times(self.vision_hidden_size, self.text_hidden_size)),
            Part("", "norms", self.vision_hidden_size, f"{self.vision_hidden_size:,}"),
        )


@dataclass(frozen=True)
class Composite(Architecture):
    """Several architectures in one model, each under a component name.

    Attributes:
        members: Component names and what they are.
        language_model: Name of the member that decodes, if one does.
    """

    members: Mapping[str, Architecture]
    language_model: str | None = None

    def parts(self) -> tuple[Part, ...]:
        """Returns the members' parts, each with its member's name before its component."""
        return tuple(
            part._replace(component=f"{name}.{part.component}" if part.component else name)
            for name, member in self.members.items()
            for part in member.parts()
        )

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The members' stacks."""
        return tuple(stack for member in self.members.values() for stack in member.stacks)

    @property
    def attention_shape(self) -> AttentionShape | None:
        """That of the language model."""
        return self.members[self.language_model].attention_shape if self.language_model else None

    @property
    def num_language_parameters(self) -> int | None:
        """Parameters of the language model."""
        return self.members[self.language_model].num_parameters if self.language_model else None


@dataclass(frozen=True)
class Counted(Architecture):
    """A model without a formula here, whose parameters were counted on an instance.

    Attributes:
        counted: Its parts.
        counted_stacks: Its transformer stacks, as far as they are known.
        shape: What its key-value cache depends on, if that is known.
    """

    counted: tuple[Part, ...]
    counted_stacks: tuple[Stack, ...] = field(default=())
    shape: AttentionShape | None = None

    def parts(self) -> tuple[Part, ...]:
        """Returns the counted parts."""
        return self.counted

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Its stacks, as far as they are known."""
        return self.counted_stacks

    @property
    def attention_shape(self) -> AttentionShape | None:
        """What its key-value cache depends on, if that is known."""
        return self.shape

    @property
    def num_language_parameters(self) -> int | None:
        """All of it, if it decodes."""
        return self.num_parameters if self.shape else None
