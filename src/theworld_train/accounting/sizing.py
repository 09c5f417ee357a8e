"""What a model of a given size needs: bytes of weights, of its key-value cache and of training, tokens and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from theworld_train.accounting.architectures import Architecture, AttentionShape, Part
from theworld_train.accounting.gpus import gpu_specs

#: Bytes of one parameter; int4 packs two into a byte. Scales and zero points of quantised weights are not counted.
BYTES_PER_PARAMETER = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}

#: Bytes of one parameter in training with AdamW in mixed precision, with nothing sharded (Rajbhandari et al. 2020,
#: ZeRO, section 3.1). Training that keeps fp32 weights and gradients under autocast, as this project's does, also needs
#: 16: 4 of weights, 4 of gradient and 8 of moments.
TRAINING_BYTES_PER_PARAMETER = {
    "bf16 weight": 2,
    "bf16 gradient": 2,
    "fp32 master weight": 4,
    "fp32 first moment": 4,
    "fp32 second moment": 4,
}

#: Training tokens for each parameter at the compute optimum (Hoffmann et al. 2022, "Chinchilla", table 3).
CHINCHILLA_TOKENS_PER_PARAMETER = 20

#: Share of a GPU's memory that is left for the CUDA context, buffers and fragmentation.
RESERVED_MEMORY = 0.1

#: Context at which the key-value cache is sized unless another is asked for.
DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class Gpu:
    """A class of GPUs with the same marketed memory, `memory_gb` x 10^9 bytes."""

    name: str
    memory_gb: float


@dataclass(frozen=True)
class Approximation:
    """The rule of thumb 12 x layers x width^2 (4 of attention, 8 of an MLP four times as wide as the model).

    Attributes:
        parameters: What it gives, summed over the transformer stacks.
        error: Relative to all parameters; negative where the rule counts too few.
        error_of_layers: Relative to attention and MLP alone, which are all that it means to count; None where the
            parts are not known.
    """

    parameters: int
    error: float
    error_of_layers: float | None


@dataclass(frozen=True)
class KvCache:
    """The key-value cache in bf16, for one sequence.

    Attributes:
        bytes_per_token: What one more token costs while no window is full.
        context: Tokens at which `total_bytes` holds.
        total_bytes: The cache at `context`; a windowed layer keeps no more than its window.
        saving_of_groups: How many times larger it would be with a key and value head for every query head.
        saving_of_windows: How many times larger it would be if every layer kept the whole context.
    """

    bytes_per_token: int
    context: int
    total_bytes: int
    saving_of_groups: float
    saving_of_windows: float


@dataclass(frozen=True)
class GpuFit:
    """How many GPUs of one kind hold the model, in each precision for inference and for training with AdamW."""

    gpu: Gpu
    inference: dict[str, int]
    training: int


@dataclass(frozen=True)
class Sizing:
    """Everything that `theworld-train size` says about an architecture.

    Attributes:
        name: What was asked for.
        parts: Its parameters by part.
        parameters: Their sum.
        approximation: The rule of thumb beside it; None without transformer layers.
        weight_bytes: Bytes of the weights by precision.
        kv_cache: Its cache; None for what does not decode.
        training_bytes: Weights, gradients and optimizer state of training all of it, without activations.
        chinchilla_tokens: Training tokens at the compute optimum of its language model; None without one.
        chinchilla_flops: FLOPs of training the language model on them.
        gpus: How many GPUs of each kind hold it.
    """

    name: str
    parts: tuple[Part, ...]
    parameters: int
    approximation: Approximation | None
    weight_bytes: dict[str, int]
    kv_cache: KvCache | None
    training_bytes: int
    chinchilla_tokens: int | None
    chinchilla_flops: int | None
    gpus: tuple[GpuFit, ...]


def transformer_approximation(num_hidden_layers: int, hidden_size: int) -> int:
    """Returns 12 x layers x width^2, the parameters of a transformer's attention and MLP by rule of thumb."""
    return 12 * num_hidden_layers * hidden_size**2


def approximation(architecture: Architecture) -> Approximation | None:
    """Returns the rule of thumb for the architecture with its errors, or None if it has no transformer layers."""
    estimate = sum(transformer_approximation(*stack) for stack in architecture.stacks)
    if not estimate:
        return None
    layers = sum(part.parameters for part in architecture.parts() if part.name in ("attention", "mlp"))
    error_of_layers = estimate / layers - 1 if layers else None
    return Approximation(estimate, estimate / architecture.num_parameters - 1, error_of_layers)


def weight_bytes(parameters: int, precision: str) -> int:
    """Returns the bytes of so many parameters at fp32, bf16, int8 or int4."""
    return math.ceil(parameters * BYTES_PER_PARAMETER[precision])


def kv_cache_bytes_per_token(shape: AttentionShape, bytes_per_element: int = 2) -> int:
    """Returns the bytes of one token's keys and values in all layers (2 for bf16), while no window is full."""
    return shape.num_hidden_layers * _layer_bytes_per_token(shape, bytes_per_element)


def kv_cache_bytes(shape: AttentionShape, context: int, bytes_per_element: int = 2) -> int:
    """Returns the bytes of one sequence's key-value cache at `context` tokens; a windowed layer keeps its window."""
    full = (shape.num_hidden_layers - shape.num_windowed_layers) * context
    windowed = shape.num_windowed_layers * min(context, shape.sliding_window or context)
    return (full + windowed) * _layer_bytes_per_token(shape, bytes_per_element)


def kv_cache(shape: AttentionShape, context: int) -> KvCache:
    """Returns the key-value cache of one sequence in bf16, and what grouped queries and windows save of it."""
    per_token = kv_cache_bytes_per_token(shape)
    total = kv_cache_bytes(shape, context)
    groups = shape.num_attention_heads / shape.num_key_value_heads
    return KvCache(per_token, context, total, groups, per_token * context / total)


def training_bytes(parameters: int) -> int:
    """Returns the bytes of weights, gradients and AdamW state in mixed precision: 16 a parameter, no activations."""
    return parameters * sum(TRAINING_BYTES_PER_PARAMETER.values())


def chinchilla_tokens(parameters: int) -> int:
    """Returns the training tokens at the compute optimum, 20 a parameter (Hoffmann et al. 2022)."""
    return CHINCHILLA_TOKENS_PER_PARAMETER * parameters


def training_flops(parameters: int, tokens: int) -> int:
    """Returns 6 x parameters x tokens: 2 forward and 4 backward (Kaplan et al. 2020), attention scores left out."""
    return 6 * parameters * tokens


def gpus() -> tuple[Gpu, ...]:
    """Returns the known kinds of GPUs, by memory; those of equal memory are one kind."""
    by_memory = groupby(gpu_specs(), key=lambda spec: spec.memory_gb)
    return tuple(Gpu(", ".join(spec.title for spec in specs), memory_gb) for memory_gb, specs in by_memory)


def usable_bytes(memory_gb: float) -> int:
    """Returns what a GPU with so many marketed gigabytes (10^9 bytes) has left for a model."""
    return int(memory_gb * 1e9 * (1 - RESERVED_MEMORY))


def gpus_needed(num_bytes: int, memory_gb: float) -> int:
    """Returns how many GPUs hold so many bytes if they are split evenly."""
    return max(math.ceil(num_bytes / usable_bytes(memory_gb)), 1)


def largest_parameters(memory_gb: float, bytes_per_parameter: float, reserved: float = RESERVED_MEMORY) -> int:
    """Returns the parameters of the largest model whose weights alone fit on one GPU.

    Args:
        memory_gb: The GPU's marketed memory in 10^9 bytes.
        bytes_per_parameter: 0.5 for int4 to 4 for fp32, 16 for training.
        reserved: Share of the memory that the weights must leave; 0 for the bound that textbooks give.
    """
    return int(memory_gb * 1e9 * (1 - reserved) / bytes_per_parameter)


def size_up(name: str, architecture: Architecture, context: int) -> Sizing:
    """Returns everything there is to say about the architecture's size.

    Args:
        name: What to call it.
        architecture: What it is made of.
        context: Tokens at which its key-value cache is sized.
    """
    parameters = architecture.num_parameters
    shape, language = architecture.attention_shape, architecture.num_language_parameters
    cache = kv_cache(shape, context) if shape else None
    weights = {precision: weight_bytes(parameters, precision) for precision in BYTES_PER_PARAMETER}
    tokens = chinchilla_tokens(language) if language else None
    return Sizing(
        name=name,
        parts=architecture.parts(),
        parameters=parameters,
        approximation=approximation(architecture),
        weight_bytes=weights,
        kv_cache=cache,
        training_bytes=training_bytes(parameters),
        chinchilla_tokens=tokens,
        chinchilla_flops=training_flops(language, tokens) if language and tokens else None,
        gpus=tuple(_fit(gpu, weights, cache, parameters) for gpu in gpus()),
    )


def largest_fitting(sizes: Iterable[tuple[str, int]], limit: int) -> str | None:
    """Returns the name with the most parameters among those that have at most `limit`."""
    fitting = [(parameters, name) for name, parameters in sizes if parameters <= limit]
    return max(fitting)[1] if fitting else None


def _layer_bytes_per_token(shape: AttentionShape, bytes_per_element: int) -> int:
    return 2 * shape.num_key_value_heads * shape.head_dim * bytes_per_element


def _fit(gpu: Gpu, weights: dict[str, int], cache: KvCache | None, parameters: int) -> GpuFit:
    cached = cache.total_bytes if cache else 0
    inference = {name: gpus_needed(size + cached, gpu.memory_gb) for name, size in weights.items()}
    return GpuFit(gpu, inference, gpus_needed(training_bytes(parameters), gpu.memory_gb))
