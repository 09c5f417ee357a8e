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


def attended_pairs(positions: int, window: int | None, attention: AttentionWork) -> int:
    """Returns the pairs of positions whose scores one head of one sequence computes.

    Args:
        positions: Length of the sequence.
        window: Positions that each one sees, itself included; None for all before it.
        attention: How scores are computed.
    """
    if attention.kind == "banded":
        starts = range(0, positions, BANDED_BLOCK)
        blocks = [(start, min(positions, start + BANDED_BLOCK)) for start in starts]
        seen = window or positions
        firsts = (max(0, start - seen + 1) // BANDED_ALIGNMENT * BANDED_ALIGNMENT for start, _ in blocks)
        return sum((end - start) * (end - first) for (start, end), first in zip(blocks, firsts, strict=True))
    if attention.kind != "structured":
        return positions**2
    pairs = _causal_pairs(positions, positions if window is None else window, attention.block)
    # Above the diagonal of an image's block, which causal order leaves out.
    return pairs + sum(tokens * (tokens - 1) // 2 for tokens in attention.image_tokens)


@cache
def _causal_pairs(positions: int, window: int, block: int) -> int:
    pairs = 0
    for start in range(0, positions, block):
        end = min(start + block, positions)
        first = max(0, start - window + 1) // block * block
        pairs += (end - start) * (end - first)
    return pairs


def attention_scores(
    kind: Attention,
    shape: tuple[int, int, int],
    key_value_heads: int,
    pairs: int,
    head_dim: int,
    size: int,
    *,
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
        masked: Whether a dense mask is read.
    """
    batch, heads, positions = shape
    tensors = 2 * batch * positions * (heads + key_value_heads) * head_dim * size
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


def decoder_pieces(
    decoder: Decoder, batch: int, positions: int, attention: AttentionWork, size: int
) -> tuple[Piece, ...]:
    """Returns the layers of a decoder, without embedding and head.

    Args:
        decoder: Its sizes.
        batch: Sequences.
        positions: Tokens of each.
        attention: How it attends.
        size: Bytes of an element.
    """
    tokens, hidden = batch * positions, decoder.hidden_size
    heads, key_value_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    queries, keys, inner = heads * decoder.head_dim, key_value_heads * decoder.head_dim, decoder.intermediate_size
    layers, windowed = decoder.num_hidden_layers, decoder.num_windowed_layers
    scores = []
    for number, window in ((windowed, decoder.sliding_window), (layers - windowed, None)):
        pairs = attended_pairs(positions, window, attention)
        shape = (batch, heads, positions)
        one = attention_scores(attention.kind, shape, key_value_heads, pairs, decoder.head_dim, size, masked=True)
        scores.append(one.times(number))
    per_layer = [
        multiply("attention", tokens, hidden, queries, size),
        multiply("attention", tokens, hidden, keys, size).times(2),
        multiply("attention", tokens, queries, hidden, size),
        traffic("attention", tokens * (queries + keys), _ROTARY + (_RMS_NORM if decoder.qk_norm else 0), 24),
        multiply("mlp", tokens, hidden, inner, size).times(2 if decoder.gated_mlp else 1),
        multiply("mlp", tokens, inner, hidden, size),
        traffic("mlp", tokens * inner, _GATE if decoder.gated_mlp else _GELU, 2),
        traffic("norms", tokens * hidden, decoder.norms_per_layer * _RMS_NORM + 2 * _RESIDUAL, 34),
    ]
    return (*scores, *(piece.times(layers) for piece in per_layer))


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
