"""Forward passes as pieces: the multiplications, convolutions and memory traffic of each component, from its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

from theworld_train.accounting.architectures import Decoder, VisionTransformer
from theworld_train.accounting.tokens import TEMPORAL_COMPRESSION, latent_frames
from theworld_train.accounting.video_vae import VideoVae

#: What a GPU does with different efficiency. `sdpa`, `structured` and `eager` are attention scores and their product
#: with the values; `elementwise` is all that only moves memory.
Kind = Literal["matmul", "convolution", "sdpa", "structured", "eager", "elementwise"]

#: How scores are computed: all pairs in one kernel (`sdpa`), all pairs through matrices of scores in memory (`eager`),
#: only blocks that hold a pair that the mask allows (`structured`), or for each block of queries the stretch of keys
#: that they see, in the kernel of `sdpa` (`banded`).
Attention = Literal["sdpa", "eager", "structured", "banded"]

#: Queries and keys of a block of structured attention (FlexAttention's default); 1 counts exactly the allowed pairs.
STRUCTURED_BLOCK = 128
#: Queries that banded attention gives to one call of the kernel.
BANDED_BLOCK = 512
#: Its stretches of keys begin at multiples of so many, and end there unless the sequence does.
BANDED_ALIGNMENT = 16

#: Bytes that PyTorch's operators move for one element in the forward pass: bf16 in and out, fp32 inside where the
#: model computes in fp32. The backward pass moves twice as much.
_RMS_NORM, _LAYER_NORM, _GELU, _GATE, _RESIDUAL, _ROTARY, _CAST, _CROSS_ENTROPY = 40, 14, 4, 10, 6, 18, 6, 14
#: Likewise around a convolution of the VAE in fp32: norm, activation, padding and the cache of past frames.
_CONVOLUTION = 60
#: Bytes for each pair of positions and head: the additive mask of a kernel, or eager's scores, mask and softmax.
_SDPA_PAIR, _EAGER_PAIR = 2, 20


class Piece(NamedTuple):
    """Work of one kind in a component's forward pass.

    Attributes:
        part: What it belongs to: `attention`, `mlp`, `norms`, `embedding`, `head`, `convolution` or `projection`.
        kind: Decides the efficiency.
        flops: Floating-point operations, two for a multiplication with its addition.
        bytes: Memory traffic.
        kernels: Launches.
        has_weights: Whether its weights have a gradient when the component trains; the work is that of the forward.
        input_gradient: Work of the gradients of its inputs, relative to the forward pass; 0 where the input is pixels.
        recomputed: Whether checkpointing runs it again; not where nothing of it is saved.
    """

    part: str
    kind: Kind
    flops: int
    bytes: int
    kernels: int = 1
    has_weights: bool = True
    input_gradient: float = 1.0
    recomputed: bool = True

    def times(self, number: int) -> Piece:
        """Returns the piece, so many times."""
        return self._replace(flops=self.flops * number, bytes=self.bytes * number, kernels=self.kernels * number)


@dataclass(frozen=True)
class AttentionWork:
    """How a decoder attends.

    Attributes:
        kind: How scores are computed.
        block: Granularity of `structured` in positions.
        image_tokens: Lengths of the blocks of a sample that attend to themselves in both directions; `banded` computes
            most of their pairs anyway, and the rest is not counted.
    """

    kind: Attention = "sdpa"
    block: int = STRUCTURED_BLOCK
    image_tokens: tuple[int, ...] = ()


def multiply(part: str, rows: int, inputs: int, outputs: int, size: int) -> Piece:
    """Returns a matrix product `(rows, inputs) x (inputs, outputs)` with elements of `size` bytes."""
    moved = rows * inputs + inputs * outputs + rows * outputs
    return Piece(part, "matmul", 2 * rows * inputs * outputs, moved * size)


def traffic(part: str, elements: int, bytes_per_element: int, kernels: int) -> Piece:
    """Returns work that only moves memory; its backward pass moves twice as much."""
    return Piece(part, "elementwise", 0, elements * bytes_per_element, kernels, has_weights=False, input_gradient=2.0)


class Span(NamedTuple):
    """Positions of a sequence.

    Attributes:
        start: The first.
        end: The one behind the last.
    """

    start: int
    end: int

    @property
    def number(self) -> int:
        """How many there are."""
        return self.end - self.start


def attended_pairs(positions: int, window: int | None, attention: AttentionWork, queries: Span | None = None) -> int:
    """Returns the pairs of positions whose scores one head of one sequence computes.

    Args:
        positions: Length of the sequence.
        window: Positions that each one sees, itself included; None for all before it.
        attention: How scores are computed.
        queries: The positions that ask; all if absent.
    """
    start, end = queries or (0, positions)
    seen = positions if window is None else window
    if attention.kind == "banded":
        return _pairs_of_blocks(positions, seen, (start, end), BANDED_BLOCK, BANDED_ALIGNMENT)
    if attention.kind != "structured":
        return positions * (end - start)
    pairs = _pairs_of_blocks(positions, seen, (start, end), attention.block, attention.block)
    # Above the diagonal of an image's block, which causal order leaves out; few images lie among the last positions.
    return pairs if queries else pairs + sum(tokens * (tokens - 1) // 2 for tokens in attention.image_tokens)


@cache
def _pairs_of_blocks(positions: int, window: int, queries: tuple[int, int], block: int, alignment: int) -> int:
    """Returns the pairs of blocks of queries, each with its keys; these begin and end at multiples of an alignment."""
    pairs = 0
    for start in range(*queries, block):
        end = min(start + block, queries[1])
        first = max(0, start - window + 1) // alignment * alignment
        pairs += (end - start) * (min(positions, -(-end // alignment) * alignment) - first)
    return pairs


def attention_scores(
    kind: Attention,
    shape: tuple[int, int, int],
    key_value_heads: int,
    pairs: int,
    head_dim: int,
    size: int,
    *,
    queries: int | None = None,
    masked: bool = False,
) -> Piece:
    """Returns scores and their product with the values, without projections.

    The backward pass of a fused kernel computes five products (the scores once more), that of eager attention four.

    Args:
        kind: How scores are computed.
        shape: Sequences, heads and positions.
        key_value_heads: Heads of keys and values.
        pairs: Pairs of positions that one head of one sequence computes.
        head_dim: Features of a head.
        size: Bytes of an element.
        queries: Positions that ask; all if absent.
        masked: Whether a dense mask is read.
    """
    batch, heads, positions = shape
    asking = positions if queries is None else queries
    tensors = 2 * batch * (asking * heads + positions * key_value_heads) * head_dim * size
    computed: Kind = "sdpa" if kind == "banded" else kind
    per_pair = _EAGER_PAIR if kind == "eager" else _SDPA_PAIR if computed == "sdpa" and masked else 0
    return Piece(
        "attention",
        computed,
        4 * batch * heads * pairs * head_dim,
        tensors + batch * heads * pairs * per_pair,
        kernels=8 if kind == "eager" else 1,
        has_weights=False,
        input_gradient=2.0 if kind == "eager" else 2.5,
    )


class Layers(NamedTuple):
    """Layers that compute alike.

    Attributes:
        number: How many there are.
        window: Positions that each one sees; None for all before it.
        positions: Positions that they read, whose keys and values they make.
        queries: Those among them that they compute.
    """

    number: int
    window: int | None
    positions: int
    queries: Span


def decoder_layers(decoder: Decoder, positions: int, needed: int | None = None) -> list[Layers]:
    """Returns the layers of a decoder by what they compute.

    Args:
        decoder: Its sizes.
        positions: Tokens of a sequence.
        needed: Positions whose output is needed, the last ones but for the very last, which predicts nothing; the last
            layers compute what they are made from alone. None if all layers compute everything.
    """
    whole = {decoder.sliding_window: decoder.num_windowed_layers}
    whole[None] = decoder.num_hidden_layers - decoder.num_windowed_layers
    trimmed, queries = [], positions if needed is None else max(1, needed)
    for index, window in enumerate(decoder.last_windows):
        if queries >= positions:
            break
        if window is None or index + 1 == decoder.num_hidden_layers:
            trimmed.append(Layers(1, window, positions, Span(positions - 1 - queries, positions - 1)))
            queries = positions
        else:
            read = min(positions - 1, queries + window - 1)
            trimmed.append(Layers(1, window, read, Span(read - queries, read)))
            queries = read
        whole[window] -= 1
    everything = Span(0, positions)
    return [*(Layers(number, window, positions, everything) for window, number in whole.items() if number), *trimmed]


def decoder_pieces(
    decoder: Decoder, batch: int, positions: int, attention: AttentionWork, size: int, needed: int | None = None
) -> tuple[Piece, ...]:
    """Returns the layers of a decoder, without embedding and head.

    Args:
        decoder: Its sizes.
        batch: Sequences.
        positions: Tokens of each.
        attention: How it attends.
        size: Bytes of an element.
        needed: As in `decoder_layers`.
    """
    layers = decoder_layers(decoder, positions, needed)
    return tuple(piece for alike in layers for piece in _layer_pieces(decoder, batch, alike, attention, size))


def _layer_pieces(decoder: Decoder, batch: int, layers: Layers, attention: AttentionWork, size: int) -> list[Piece]:
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    heads, key_value_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    query_width, key_width = heads * decoder.head_dim, key_value_heads * decoder.head_dim
    read, computed = batch * layers.positions, batch * layers.queries.number
    whole = layers.queries.number == layers.positions
    pairs = attended_pairs(layers.positions, layers.window, attention, None if whole else layers.queries)
    rotary = _ROTARY + (_RMS_NORM if decoder.qk_norm else 0)
    # Of a layer's norms the first one is over all that it reads.
    normed = (read + (decoder.norms_per_layer - 1) * computed) * hidden
    pieces = [
        attention_scores(
            attention.kind,
            (batch, heads, layers.positions),
            key_value_heads,
            pairs,
            decoder.head_dim,
            size,
            queries=layers.queries.number,
            masked=True,
        ),
        multiply("attention", computed, hidden, query_width, size),
        multiply("attention", read, hidden, key_width, size).times(2),
        multiply("attention", computed, query_width, hidden, size),
        traffic("attention", computed * query_width + read * key_width, rotary, 24),
        multiply("mlp", computed, hidden, inner, size).times(2 if decoder.gated_mlp else 1),
        multiply("mlp", computed, inner, hidden, size),
        traffic("mlp", computed * inner, _GATE if decoder.gated_mlp else _GELU, 2),
        traffic("norms", normed, _RMS_NORM, 34),
        traffic("norms", computed * hidden, 2 * _RESIDUAL, 0),
    ]
    return [piece.times(layers.number) for piece in pieces]


def head_pieces(decoder: Decoder, supervised: int, chunks: int, size: int) -> tuple[Piece, ...]:
    """Returns head and cross entropy at the supervised positions of a micro-batch, in so many chunks."""
    product = multiply("head", supervised, decoder.hidden_size, decoder.vocab_size, size)
    weights = (chunks - 1) * decoder.hidden_size * decoder.vocab_size * size
    logits = traffic("head", supervised * decoder.vocab_size, _CROSS_ENTROPY, 4 * chunks)
    return product._replace(bytes=product.bytes + weights, kernels=chunks), logits._replace(input_gradient=1.0)


def vision_pieces(vision: VisionTransformer, images: int, attention: Attention, size: int) -> tuple[Piece, ...]:
    """Returns a vision tower without a pooling head, over so many images.

    `structured` and `banded` compute what `sdpa` does: every patch sees every patch.
    """
    width, inner, heads = vision.hidden_size, vision.intermediate_size, vision.num_attention_heads
    patches = (vision.image_size // vision.patch_size) ** 2
    tokens, pixels = images * patches, vision.num_channels * vision.patch_size**2
    embedding = multiply("embedding", tokens, pixels, width, size)
    embedding = embedding._replace(kind="convolution", input_gradient=0.0, recomputed=False)
    scores = attention_scores(attention, (images, heads, patches), heads, patches**2, width // heads, size)
    per_layer = [
        scores,
        multiply("attention", tokens, width, width, size).times(4),
        multiply("mlp", tokens, width, inner, size),
        # The layer's last product, of which nothing but its input is saved: recomputation stops before it.
        multiply("mlp", tokens, inner, width, size)._replace(recomputed=False),
        traffic("mlp", tokens * inner, _GELU, 1),
        traffic("norms", tokens * width, 2 * (_LAYER_NORM + _RESIDUAL), 8),
    ]
    return (embedding, *(piece.times(vision.num_hidden_layers) for piece in per_layer))


def projector_pieces(vision_hidden: int, text_hidden: int, tokens: int, size: int) -> tuple[Piece, ...]:
    """Returns Gemma 3's projection of pooled patches: so many tokens of all images."""
    norm = traffic("norms", tokens * vision_hidden, _RMS_NORM, 12)
    return multiply("projection", tokens, vision_hidden, text_hidden, size), norm


def world_projector_pieces(
    projection: Literal["linear", "mlp"], features: int, hidden: int, tokens: int, size: int
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Returns the projection of world tokens: what stands at the latents, and what stands behind it."""
    first = (multiply("projection", tokens, features, hidden, size),)
    rest = [traffic("norms", tokens * hidden, _RMS_NORM, 8)]
    if projection == "mlp":
        rest += [multiply("projection", tokens, hidden, hidden, size), traffic("projection", tokens * hidden, _GELU, 1)]
    return first, tuple(rest)


def world_encoder_pieces(
    vae: VideoVae, blocks: int, frames: int, resolution: int, attention: Attention, size: int
) -> tuple[Piece, ...]:
    """Returns the VAE's encoder and quant convolution over blocks of equal length.

    The causal convolutions run chunk by chunk: the first frame alone, in two dimensions, then four at a time, each with
    the cached frames before it.

    Args:
        vae: Its sizes.
        blocks: Images or clips.
        frames: Frames of each, 1 + 4k.
        resolution: Pixels along a side.
        attention: How the middle attends; `structured` and `banded` compute what `sdpa` does.
        size: Bytes of an element.
    """
    chunks = latent_frames(frames) - 1
    first = _encoder_chunk(vae, blocks, 1, resolution, attention, size, leads=True)
    later = _encoder_chunk(vae, blocks, TEMPORAL_COMPRESSION, resolution, attention, size, leads=False)
    quant = blocks * (1 + chunks) * (resolution // 2 ** (len(vae.dim_mult) - 1)) ** 2
    last = _convolution(2 * vae.z_dim, 2 * vae.z_dim, 1, quant, quant, size)
    return (*first, *(piece.times(chunks) for piece in later if chunks), *last)


def _encoder_chunk(
    vae: VideoVae, blocks: int, frames: int, resolution: int, attention: Attention, size: int, *, leads: bool
) -> list[Piece]:
    """Returns one chunk; the one that leads has no past: one tap in time, and no compression."""
    taps = 9 if leads else 27
    widths = [vae.base_dim * mult for mult in (1, *vae.dim_mult)]
    side = resolution
    places = blocks * frames * side**2
    pieces = list(_convolution(vae.in_channels, widths[0], taps, places, places, size))
    pieces[0] = pieces[0]._replace(input_gradient=0.0)
    for level, wide in enumerate(widths[1:]):
        for block in range(vae.num_res_blocks):
            pieces += _residual(widths[level] if block == 0 else wide, wide, taps, places, size)
        if level == len(vae.dim_mult) - 1:
            break
        side //= 2
        smaller = blocks * frames * side**2
        pieces += _convolution(wide, wide, 9, places, smaller, size)
        places = smaller
        if vae.temporal_downsample[level] and not leads:
            frames //= 2
            smaller = blocks * frames * side**2
            pieces += _convolution(wide, wide, 3, places, smaller, size)
            places = smaller
    last = widths[-1]
    pieces += 2 * _residual(last, last, taps, places, size)
    pieces += _convolution(last, 3 * last, 1, places, places, size)
    scores = attention_scores(attention, (blocks * frames, 1, side**2), 1, side**4, last, size)
    pieces.append(scores)
    pieces += _convolution(last, last, 1, places, places, size)
    pieces += _convolution(last, 2 * vae.z_dim, taps, places, places, size)
    return pieces


def _residual(narrow: int, wide: int, taps: int, places: int, size: int) -> list[Piece]:
    """Returns a residual block's two convolutions, and its shortcut where the width changes."""
    shortcut = _convolution(narrow, wide, 1, places, places, size) if narrow != wide else ()
    first = _convolution(narrow, wide, taps, places, places, size)
    return [*first, *_convolution(wide, wide, taps, places, places, size), *shortcut]


def _convolution(narrow: int, wide: int, taps: int, read: int, written: int, size: int) -> tuple[Piece, Piece]:
    """Returns a convolution with so many taps, and what stands around it, over places read and written."""
    moved = read * narrow + written * wide + taps * narrow * wide
    product = Piece("convolution", "convolution", 2 * written * wide * narrow * taps, moved * size)
    return product, traffic("norms", written * wide, _CONVOLUTION * size // 4, 10)


def cast_piece(parameters: int) -> Piece:
    """Returns the rounding of so many fp32 masters to bf16, which autocast does once a pass."""
    return traffic("casts", parameters, _CAST, 1)._replace(input_gradient=1.0)


def without_input_gradient(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Returns the pieces as they are where nothing upstream of them trains."""
    return tuple(piece._replace(input_gradient=0.0) for piece in pieces)
