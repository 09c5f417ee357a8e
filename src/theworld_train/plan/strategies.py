"""Strategies: what one of several ranks holds, worked out from the storages of a single process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from theworld_train.config.errors import ConfigError, Problem, did_you_mean
from theworld_train.config.schema import OFFLOADING, Offload
from theworld_train.config.schema import Strategy as StrategyName
from theworld_train.memory.timeline import Peak, Span, Timeline, spans
from theworld_train.memory.tracker import OPTIMIZER, Allocation, Category
from theworld_train.plan.dry_run import DryRun, Gathering, PlannedParameter
from theworld_train.train.engine import MAX_LIVE, REDUCE_BUCKET
from theworld_train.train.groups import state_bytes

#: Bytes of fp32, in which gradients are reduced.
_FP32 = 4


@dataclass(frozen=True)
class Strategy:
    """How ranks share the work.

    Attributes:
        name: As the run config and the command line know it.
        about: What it shares.
        gathering: How weights are there when they are computed with; sharded ones are gathered.
    """

    name: StrategyName
    about: str
    gathering: Gathering = "none"


STRATEGIES: dict[StrategyName, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("ddp", "every rank holds everything"),
        Strategy("zero1", "optimizer state is sharded"),
        Strategy("zero2", "optimizer state and gradients are sharded"),
        Strategy("fsdp2", "weights are sharded too, PyTorch's way", "computed"),
        Strategy("zero3", "weights are sharded too, DeepSpeed's way", "stored"),
    )
}


def strategy_of(name: str) -> StrategyName:
    """Returns a strategy's name, once it is known to be one.

    Raises:
        ConfigError: If it is not.
    """
    for known in STRATEGIES:
        if name == known:
            return known
    raise ConfigError(
        Problem("is no strategy", key="--strategy", value=name, hint=did_you_mean(name, list(STRATEGIES)))
    )


def offload_of(name: str) -> Offload:
    """Returns what is offloaded by its name.

    Raises:
        ConfigError: If it is not known.
    """
    for known in OFFLOADING:
        if name == known:
            return known
    raise ConfigError(
        Problem("cannot be offloaded", key="--offload", value=name, hint=did_you_mean(name, list(OFFLOADING)))
    )


def rank_timeline(
    run: DryRun, strategy: Strategy, ranks: int, offload: Offload = "none", *, accumulates: bool = False
) -> Timeline:
    """Returns what one rank holds over time.

    Args:
        run: The dry run of a single process; on several ranks with the gathering of the strategy.
        strategy: How ranks share the work.
        ranks: Their number.
        offload: What is kept in the host's memory.
        accumulates: Whether a step has several micro-batches: all but the first meet the gradients of those before.
    """
    if ranks == 1 and offload == "none":
        held = list(_accumulated(run)) if accumulates else spans(run.trace)
    elif strategy.gathering != "none":
        held = list(_gathered(run, strategy, ranks, offload, accumulates))
    else:
        held = list(_replicated(run, strategy, ranks, offload, accumulates))
    return Timeline(run.trace.events, held, run.block)


def _accumulated(run: DryRun) -> Iterator[Span]:
    """A single process in its second micro-batch: gradients are there, and new ones are added to them one by one."""
    last, starts = len(run.trace.events), _step_starts(run)
    for allocation in _allocations(run):
        span = _span(allocation, last)
        if allocation.category == "gradients":
            yield _arriving(span, allocation)
            yield replace(span, start=starts[run.trace.events[allocation.born].step])
        else:
            yield span


# -- weights on every rank --------------------------------------------------------------------------------------------


def _replicated(run: DryRun, strategy: Strategy, ranks: int, offload: Offload, accumulates: bool) -> Iterator[Span]:
    """DDP, ZeRO-1 and ZeRO-2: gradients go through buckets; what the optimizer works on may be sharded."""
    last, starts = len(run.trace.events), _step_starts(run)
    trained = sum(parameter.numel for parameter in run.parameters if parameter.trains)
    shares_state, shares_gradients = strategy.name != "ddp", strategy.name == "zero2"
    on_host = offload != "none"
    for allocation in _allocations(run):
        span = _span(allocation, last)
        if allocation.category == "optimizer" or _is_update(allocation):
            if not on_host:
                yield replace(span, size=_share(span.size, ranks if shares_state else 1))
        elif allocation.category == "gradients":
            arriving = _arriving(span, allocation)
            yield arriving
            if shares_gradients and not on_host:
                start = starts[run.trace.events[allocation.born].step] if accumulates else arriving.end
                yield replace(span, size=_share(span.size, ranks), start=start)
        else:
            yield span
    if not shares_gradients and trained:
        yield Span(trained * _stored_size(run), "gradients", OPTIMIZER, 0, last)
    if shares_state and trained:
        yield Span(min(trained, REDUCE_BUCKET) * _stored_size(run), "temporaries", OPTIMIZER, 0, last)
        if not on_host:
            yield Span(_share(trained * _FP32, ranks), "masters", OPTIMIZER, 0, last)


# -- weights sharded --------------------------------------------------------------------------------------------------


def _gathered(run: DryRun, strategy: Strategy, ranks: int, offload: Offload, accumulates: bool) -> Iterator[Span]:
    """ZeRO-3 and FSDP2: a rank holds a share of everything, and whole parameters of the layers at work alone."""
    last = len(run.trace.events)
    inside = {parameter.name for parameter in run.parameters if parameter.unit is not None}
    for allocation in _allocations(run):
        if _is_update(allocation):
            if offload == "none":
                span = _span(allocation, last)
                yield replace(span, size=_share(span.size, ranks))
        elif allocation.parameter not in inside:
            yield _span(allocation, last)
    sharded = [parameter for parameter in run.parameters if parameter.unit is not None]
    for parameter in sharded:
        elements = _shard(parameter, ranks)
        if offload != "all":
            kind: Category = "masters" if parameter.trains and parameter.itemsize == _FP32 else "weights"
            yield Span(elements * parameter.itemsize, kind, parameter.component, 0, last)
        if parameter.trains and offload == "none":
            size = state_bytes(elements, parameter.itemsize, run.optimizer)
            yield Span(size, "optimizer", parameter.component, 0, last)
    yield from _Passes(run, ranks, offload, accumulates).spans()
    trained = sum(parameter.numel for parameter in sharded if parameter.trains)
    if strategy.name == "zero3" and trained:
        yield Span(min(trained, REDUCE_BUCKET) * _FP32, "temporaries", OPTIMIZER, 0, last)


class _Passes:
    """What gathering adds to the forward and backward passes of a trace, in the order in which FSDP2 does it.

    Forward, a layer's parameters are gathered into a buffer and copied out of it; the buffer stays until the next layer
    is gathered. Backward, the buffer of the next layer is filled while a layer is at work. When a layer is done, its
    gradients are copied into an fp32 buffer that is reduced, and that stays until the next layer is done.
    """

    def __init__(self, run: DryRun, ranks: int, offload: Offload, accumulates: bool) -> None:
        self._run = run
        self._accumulates = accumulates
        self._ranks = ranks
        self._offload = offload
        self._members: dict[str, list[PlannedParameter]] = {}
        for parameter in run.parameters:
            if parameter.unit is not None:
                self._members.setdefault(parameter.unit, []).append(parameter)
        self._forward = _stretches(run, "forward")
        self._backward = _stretches(run, "backward")

    def spans(self) -> Iterator[Span]:
        """Returns gathered parameters, buffers and gradients."""
        done: dict[tuple[str, int], int] = {}
        for index, (forward, backward) in enumerate(zip(self._forward, self._backward, strict=True)):
            yield from self._forward_pass(forward, backward)
            order = sorted(
                (start, unit)
                for unit, starts in self._run.trace.backward_starts.items()
                for start in starts
                if backward[0] <= start <= backward[1]
            )
            ends = [start for start, _ in order[1:]] + [backward[1]]
            filled = backward[0]
            for position, (start, unit) in enumerate(order):
                end = ends[position]
                yield from self._parameters(unit, start, end)
                yield from self._incoming(unit, filled, start)
                filled = start
                done[unit, index] = end
                yield from self._outgoing(unit, end, ends[min(position + 1, len(ends) - 1)])
            done["", index] = backward[1]
            yield from self._outgoing("", backward[1] - 1, backward[1])
        yield from self._gradients(done)

    def _forward_pass(self, forward: tuple[int, int], backward: tuple[int, int]) -> Iterator[Span]:
        calls = sorted(
            (start, end, unit)
            for unit, pairs in self._run.trace.calls.items()
            for start, end in pairs
            if forward[0] <= start < forward[1]
        )
        first = calls[0][0] if calls else forward[1]
        yield from self._parameters("", forward[0], backward[1])
        if self._run.gathering == "stored":
            yield from self._live(forward[0], backward[1])
        yield from self._incoming("", forward[0], first)
        starts = [start for start, _, _ in calls[1:]] + [forward[1]]
        for (start, end, unit), following in zip(calls, starts, strict=True):
            yield from self._parameters(unit, start, end)
            yield from self._incoming(unit, start, following)

    def _parameters(self, unit: str, start: int, end: int) -> Iterator[Span]:
        """Whole parameters of a unit."""
        if end > start:
            for parameter in self._members.get(unit, []):
                size = parameter.numel * self._run.gathered_size(parameter)
                yield Span(size, "weights", parameter.component, start, end)

    def _live(self, start: int, end: int) -> Iterator[Span]:
        """Whole layers that DeepSpeed holds besides the one at work: gathered ahead, or kept for their next use."""
        layers = [member for unit, members in self._members.items() if unit for member in members]
        elements = sum(member.numel for member in layers)
        if elements:
            size = sum(member.numel * self._run.gathered_size(member) for member in layers)
            component = max(layers, key=lambda member: member.numel).component
            yield Span(size * min(elements, MAX_LIVE) // elements, "weights", component, start, end)

    def _incoming(self, unit: str, start: int, end: int) -> Iterator[Span]:
        """The one buffer in which a unit's parameters come."""
        yield from self._buffer(self._members.get(unit, []), self._run.gathered_size, start, end)

    def _outgoing(self, unit: str, start: int, end: int) -> Iterator[Span]:
        """The one buffer in which a unit's gradients go."""
        trained = [member for member in self._members.get(unit, []) if member.trains]
        yield from self._buffer(trained, lambda _: _FP32, start, end)

    @staticmethod
    def _buffer(
        members: list[PlannedParameter], itemsize: Callable[[PlannedParameter], int], start: int, end: int
    ) -> Iterator[Span]:
        if members and end > start:
            size = sum(member.numel * itemsize(member) for member in members)
            yield Span(size, "temporaries", max(members, key=lambda member: member.numel).component, start, end)

    def _gradients(self, done: dict[tuple[str, int], int]) -> Iterator[Span]:
        """Gradients of whole parameters until their unit is done, and this rank's share of them from then on."""
        members = {parameter.name: parameter for group in self._members.values() for parameter in group}
        starts = _step_starts(self._run)
        for allocation in _allocations(self._run):
            parameter = members.get(allocation.parameter)
            if allocation.category != "gradients" or parameter is None or parameter.unit is None:
                continue
            index = next(i for i, (start, end) in enumerate(self._backward) if start <= allocation.born <= end)
            whole = max(done.get((parameter.unit, index), allocation.born), allocation.born + 1)
            span = _span(allocation, len(self._run.trace.events))
            yield replace(span, category="temporaries", end=whole)
            if self._offload == "none" and span.end > whole:
                start = starts[self._run.trace.events[allocation.born].step] if self._accumulates else whole
                yield replace(span, size=_shard(parameter, self._ranks) * parameter.itemsize, start=start)


def _stretches(run: DryRun, phase: str) -> list[tuple[int, int]]:
    """Returns the stretches of a phase as (first event, event behind the last)."""
    found: list[tuple[int, int]] = []
    for index, event in enumerate(run.trace.events):
        if event.phase != phase:
            continue
        if found and found[-1][1] == index:
            found[-1] = (found[-1][0], index + 1)
        else:
            found.append((index, index + 1))
    return found


def load_peak(run: DryRun, strategy: Strategy, ranks: int) -> Peak:
    """Returns what a rank holds when it has moved a model to its GPU whole, and has made its shards beside it."""
    parts: dict[tuple[Category, str], int] = {}
    for parameter in run.parameters:
        copies = parameter.numel * parameter.itemsize
        if strategy.gathering != "none" and ranks > 1 and parameter.unit is not None:
            copies += _shard(parameter, ranks) * parameter.itemsize
        kind: Category = "masters" if parameter.trains and parameter.itemsize == _FP32 else "weights"
        parts[kind, parameter.component] = parts.get((kind, parameter.component), 0) + copies
    largest = dict(sorted(parts.items(), key=lambda item: -item[1]))
    return Peak(sum(parts.values()), largest, phase="load", op="to", module="", event=0)


# -- what both need ---------------------------------------------------------------------------------------------------


def _allocations(run: DryRun) -> Iterator[Allocation]:
    return (event.allocation for event in run.trace.events if event.is_birth)


def _span(allocation: Allocation, last: int) -> Span:
    end = last if allocation.died is None else allocation.died
    return Span(allocation.size, allocation.category, allocation.component, allocation.born, end)


def _arriving(span: Span, allocation: Allocation) -> Span:
    """Returns a gradient as the backward pass makes it, until it is added to what is there or put into a bucket."""
    whole = allocation.born + 1 if allocation.accumulated is None else max(allocation.accumulated, allocation.born + 1)
    return replace(span, category="temporaries", end=whole)


def _step_starts(run: DryRun) -> dict[int, int]:
    """Returns the first event of each optimizer step."""
    starts: dict[int, int] = {}
    for index, event in enumerate(run.trace.events):
        starts.setdefault(event.step, index)
    return starts


def _is_update(allocation: Allocation) -> bool:
    """Whether the optimizer's step has made it for a moment, in the shapes of what it updates."""
    return allocation.phase == "optimizer" and allocation.category == "temporaries"


def _share(size: int, ranks: int) -> int:
    return -(-size // ranks)


def _shard(parameter: PlannedParameter, ranks: int) -> int:
    """Returns the elements of one rank's share, which is cut along the first dimension and padded."""
    rows = parameter.shape[0] if parameter.shape else 1
    return _share(rows, ranks) * (parameter.numel // max(1, rows))


def _stored_size(run: DryRun) -> int:
    """Returns the bytes of an element of what trains, and so of its gradient and moments."""
    return max((parameter.itemsize for parameter in run.parameters if parameter.trains), default=_FP32)
