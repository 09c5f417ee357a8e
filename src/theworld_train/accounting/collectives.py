"""What ranks exchange in an optimizer step: bytes and time by strategy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from theworld_train.config.errors import ConfigError, Problem, did_you_mean

Strategy = Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

#: Bytes of a gradient and of a master weight: both are fp32 under every strategy.
_FP32 = 4
#: Bytes of a DDP bucket (PyTorch's default) and of a ZeRO bucket (200 million elements of fp32, as the engine sets it).
_DDP_BUCKET, _ZERO_BUCKET = 25 * 2**20, 200_000_000 * _FP32


class Collective(NamedTuple):
    """One kind of exchange in a step.

    Attributes:
        operation: What is exchanged how.
        payload: Bytes of the whole tensors, summed over the step.
        calls: How often it is called.
        overlaps: Whether it runs beside the computation.
    """

    operation: Literal["all_reduce", "reduce_scatter", "all_gather"]
    payload: int
    calls: int
    overlaps: bool

    def bytes_sent(self, ranks: int) -> float:
        """Returns what each rank sends around a ring of so many, which is as much as it receives."""
        rounds = 2 if self.operation == "all_reduce" else 1
        return rounds * self.payload * (ranks - 1) / ranks


@dataclass(frozen=True)
class Exchanged:
    """The parameters that an engine wraps; frozen encoders are outside of it.

    Attributes:
        trainable: Parameters that train.
        frozen: Parameters that do not, which sharding splits as well.
        units: Modules that sharding gathers one by one.
        trainable_bytes: Bytes of one that trains when it is gathered: 2 for bf16.
        frozen_bytes: Bytes of one that does not.
    """

    trainable: int
    frozen: int
    units: int
    trainable_bytes: int = 2
    frozen_bytes: int = 2


@dataclass(frozen=True)
class Cluster:
    """Ranks and what joins them.

    Attributes:
        ranks: GPUs in all.
        gpus_per_node: GPUs of one node.
        link: Bytes/s of one GPU to the others of its node, in one direction.
        network: Bytes/s of a node to the others, in one direction.
        latency: Seconds of a collective for each doubling of the ranks.
    """

    ranks: int
    gpus_per_node: int
    link: float
    network: float
    latency: float = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes/s at which a ring of all ranks moves; across nodes every byte passes each node's network once."""
        return self.link if self.ranks <= self.gpus_per_node else min(self.link, self.network)

    def seconds(self, collective: Collective) -> float:
        """Returns how long an exchange takes on its own."""
        if self.ranks == 1:
            return 0.0
        waiting = collective.calls * self.latency * math.ceil(math.log2(self.ranks))
        return collective.bytes_sent(self.ranks) / self.bandwidth + waiting


def check_strategies(names: Sequence[str], source: str | None = None, key: str | None = None) -> tuple[Strategy, ...]:
    """Returns the strategies of these names.

    Raises:
        ConfigError: With every name that is no strategy, and the nearest one.
    """
    unknown = [name for name in names if name not in STRATEGIES]
    if unknown:
        raise ConfigError(
            Problem("no strategy has this name", source, key, name, did_you_mean(name, STRATEGIES)) for name in unknown
        )
    return tuple(strategy for name in names for strategy in STRATEGIES if strategy == name)


def collectives(
    strategy: Strategy, parameters: Exchanged, gradient_accumulation_steps: int = 1
) -> tuple[Collective, ...]:
    """Returns what a step exchanges.

    - ddp: gradients are averaged once a step, bucket by bucket, beside the last backward pass.
    - zero1: each rank receives its share of the gradients once a step and sends its share of the new weights.
    - zero2: as zero1, but gradients are split after every micro-batch.
    - zero3: weights are gathered for every forward and every backward pass, and gradients split after each.
    - fsdp2: as zero3, beside the computation. What DeepSpeed exchanges is waited for: the engine asks for no overlap.

    Args:
        strategy: How the ranks share weights, gradients and optimizer state.
        parameters: What the engine wraps.
        gradient_accumulation_steps: Micro-batches of a step.
    """
    gradients, steps = parameters.trainable * _FP32, gradient_accumulation_steps
    if strategy == "ddp":
        return (Collective("all_reduce", gradients, _calls(gradients, _DDP_BUCKET), overlaps=True),)
    if strategy in ("zero1", "zero2"):
        times, calls = steps if strategy == "zero2" else 1, _calls(gradients, _ZERO_BUCKET)
        return (
            Collective("reduce_scatter", gradients * times, calls * times, overlaps=False),
            Collective("all_gather", gradients, calls, overlaps=False),
        )
    weights = parameters.trainable * parameters.trainable_bytes + parameters.frozen * parameters.frozen_bytes
    beside = strategy == "fsdp2"
    return (
        Collective("all_gather", 2 * steps * weights, 2 * steps * parameters.units, overlaps=beside),
        Collective("reduce_scatter", steps * gradients, steps * parameters.units, overlaps=beside),
    )


def _calls(payload: int, bucket: int) -> int:
    return max(1, math.ceil(payload / bucket))
