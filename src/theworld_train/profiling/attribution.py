"""From the profiler's events to the time of each part of a step, in each of its passes.

Every moment of a step belongs to the innermost event that covers it, and every event to a part: an operator to the
range that it runs in; a node of the backward pass to the part whose operator has made it, as autograd numbers both
alike; what runs under autograd inside of such a node, to the recomputation of its part. The parts add up to the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch.autograd.profiler_util import FunctionEvent

from theworld_train.config.components import Component
from theworld_train.memory.tracker import LOSS, OPTIMIZER, SEQUENCE
from theworld_train.profiling.ranges import BACKWARD, DATA, PREFIX, STEP

Pass = Literal["forward", "recompute", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "recompute", "backward")
#: What has no part of its own.
OTHER = "other"
#: The parts of a step, in the order of tables.
PARTS = (*(component.value for component in Component), SEQUENCE, LOSS, OPTIMIZER, DATA, OTHER)

_NODE = "autograd::engine::evaluate_function: "
_US = 1e-6


@dataclass(frozen=True)
class Owner:
    """What an event belongs to.

    Attributes:
        part: One of `PARTS`.
        kind: The pass.
        in_node: Whether it runs inside of a node of a backward pass.
    """

    part: str = OTHER
    kind: Pass = "forward"
    in_node: bool = False


@dataclass(frozen=True)
class Operation:
    """All calls of one operator.

    Attributes:
        name: The operator.
        calls: Calls in a step, on average.
        seconds: Its own time in a step, without that of the operators that it calls.
    """

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True)
class StepBreakdown:
    """Where the time of a step goes, averaged over steps.

    Attributes:
        seconds: The whole step, waiting for data included.
        by_part: Seconds of each part and pass that has any; they add up to `seconds`.
        operations: Operators with their own time, longest first.
    """

    seconds: float
    by_part: dict[tuple[str, Pass], float]
    operations: tuple[Operation, ...]


def break_down(events: Sequence[FunctionEvent], *, on_gpu: bool) -> StepBreakdown:
    """Attributes the events of a trace.

    On a CPU an event's time is what the main thread spends in it and in none of its children. On a GPU it is that of
    the kernels that it has launched, and what the GPU waits is `other`.

    Args:
        events: Of `torch.profiler.profile`, with the ranges of `Ranges`.
        on_gpu: Whether the steps have run on a GPU.
    """
    roots = sorted(
        (event for event in events if event.cpu_parent is None and event.device_type.name == "CPU"),
        key=lambda event: event.time_range.start,
    )
    steps = [event for event in _descend(roots) if event.name == PREFIX + STEP]
    assert steps, "the trace holds no step"
    owners = _Owners(steps)
    # The backward pass of a GPU has a thread of its own.
    nodes = [event for event in roots if on_gpu and event.name.startswith(_NODE)]
    seconds: defaultdict[tuple[str, Pass], float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    own_time: defaultdict[str, float] = defaultdict(float)
    for event, owner in (*owners.walk(steps), *owners.walk(nodes)):
        own = _kernel_seconds(event) if on_gpu else _own_seconds(event)
        seconds[owner.part, owner.kind] += own / len(steps)
        if not event.is_user_annotation:
            calls[event.name] += 1
            own_time[event.name] += own
    total = sum(event.time_range.elapsed_us() for event in steps) * _US / len(steps)
    if on_gpu:
        seconds[OTHER, "forward"] += total - sum(seconds.values())
    operations = (Operation(name, calls[name] / len(steps), own / len(steps)) for name, own in own_time.items())
    return StepBreakdown(
        seconds=total,
        by_part={key: value for key, value in seconds.items() if value},
        operations=tuple(sorted(operations, key=lambda operation: -operation.seconds)),
    )


class _Owners:
    """Knows whom each event belongs to."""

    def __init__(self, steps: Iterable[FunctionEvent]) -> None:
        """Notes which part has made each node of the backward passes."""
        self._makers: dict[int, str] = {}
        for event, owner in self.walk(steps):
            # Of all operators with the number, the last one has made the node; others have only seen it come.
            if event.sequence_nr >= 0 and not owner.in_node:
                self._makers[event.sequence_nr] = owner.part

    def walk(self, roots: Iterable[FunctionEvent], owner: Owner | None = None) -> Iterator[tuple[FunctionEvent, Owner]]:
        """Yields events with their owners, parents before their children and all in the order of time."""
        owner = before = owner or Owner()
        for event in sorted(roots, key=lambda event: event.time_range.start):
            own = before = self._owner(event, owner, before)
            yield event, own
            yield from self.walk(event.cpu_children, own)

    def _owner(self, event: FunctionEvent, parent: Owner, before: Owner) -> Owner:
        """Returns whom an event belongs to, given the owners of its parent and of its elder sibling."""
        if event.name.startswith(PREFIX):
            part = event.name.removeprefix(PREFIX)
            if part == BACKWARD:
                return Owner(OTHER, "backward")
            return Owner(OTHER if part == STEP else part, "recompute" if parent.in_node else "forward", parent.in_node)
        if event.name.startswith(_NODE):
            if event.sequence_nr < 0:  # a gradient is accumulated as soon as its node is done
                return before if before.in_node else Owner(parent.part, "backward", in_node=True)
            return Owner(self._makers.get(event.sequence_nr, parent.part), "backward", in_node=True)
        if parent.in_node and parent.kind == "backward" and event.sequence_nr >= 0 and event.scope == 0:
            return Owner(parent.part, "recompute", in_node=True)
        return parent


def _descend(events: Iterable[FunctionEvent]) -> Iterator[FunctionEvent]:
    for event in events:
        yield event
        yield from _descend(event.cpu_children)


def _own_seconds(event: FunctionEvent) -> float:
    children = sum(child.time_range.elapsed_us() for child in event.cpu_children)
    return float(event.time_range.elapsed_us() - children) * _US


def _kernel_seconds(event: FunctionEvent) -> float:
    # A range is on the GPU too, under its own name, and is no kernel.
    return float(sum(kernel.duration for kernel in event.kernels if kernel.name != event.name)) * _US
