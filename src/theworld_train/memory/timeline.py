"""Memory over time: what is alive at each event of a step, by category and component, and where it peaks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from theworld_train.memory.tracker import CATEGORIES, Category, Event, Trace

#: Where in a step memory is taken: phase, module and operator.
Place = tuple[str, str, str]
#: CUDA's caching allocator hands out multiples of this many bytes.
CUDA_BLOCK = 512


@dataclass(frozen=True)
class Span:
    """Memory that one rank holds from one event of a trace to another.

    Attributes:
        size: Bytes.
        category: What it holds.
        component: Whose it is.
        start: Event at which it comes.
        end: Event at which it goes.
    """

    size: int
    category: Category
    component: str
    start: int
    end: int


def spans(trace: Trace) -> list[Span]:
    """Returns what a single process holds, storage by storage."""
    last = len(trace.events)
    return [
        Span(a.size, a.category, a.component, a.born, last if a.died is None else a.died)
        for a in (event.allocation for event in trace.events if event.is_birth)
    ]


@dataclass(frozen=True)
class Peak:
    """The moment of most memory.

    Attributes:
        total: Bytes.
        parts: Bytes by category and component, largest first.
        phase: Phase of the step.
        op: Operator that made the last storage before it.
        module: Module that it ran in; empty outside of any.
        event: The event.
    """

    total: int
    parts: dict[tuple[Category, str], int]
    phase: str
    op: str
    module: str
    event: int

    def by_category(self) -> dict[str, int]:
        """Returns bytes by category, in the order of `CATEGORIES`."""
        sums: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        for (category, _), size in self.parts.items():
            sums[category] += size
        return sums

    def by_component(self) -> dict[str, int]:
        """Returns bytes by component, largest first."""
        sums: dict[str, int] = {}
        for (_, component), size in self.parts.items():
            sums[component] = sums.get(component, 0) + size
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


class Timeline:
    """Bytes alive after each event of a trace."""

    def __init__(self, events: Sequence[Event], held: Iterable[Span], block: int = 1) -> None:
        """Sums the spans.

        Args:
            events: Events of the trace.
            held: What is held, and when.
            block: Sizes are rounded up to its multiples.
        """
        self.events = events
        self.held = tuple(held)
        self._sizes = [(span, -(-span.size // block) * block) for span in self.held]
        changes = np.zeros((len(CATEGORIES), len(events) + 1), dtype=np.int64)
        rows = {category: row for row, category in enumerate(CATEGORIES)}
        for span, size in self._sizes:
            changes[rows[span.category], span.start] += size
            changes[rows[span.category], span.end] -= size
        self.by_category: npt.NDArray[np.int64] = changes.cumsum(axis=1)[:, :-1]
        self.total: npt.NDArray[np.int64] = self.by_category.sum(axis=0)

    def phase_peaks(self, step: int) -> dict[str, int]:
        """Returns the most memory in each phase of one optimizer step."""
        peaks: dict[str, int] = {}
        for event, total in zip(self.events, self.total.tolist(), strict=True):
            if event.step == step:
                peaks[event.phase] = max(peaks.get(event.phase, 0), total)
        return peaks

    def peaks_by_place(self, step: int) -> dict[Place, int]:
        """Returns the most memory at each place of one optimizer step."""
        peaks: dict[Place, int] = {}
        for event, total in zip(self.events, self.total.tolist(), strict=True):
            if event.step == step and event.is_birth:
                place = (event.phase, event.allocation.module, event.allocation.op)
                peaks[place] = max(peaks.get(place, 0), total)
        return peaks

    def peak(self, step: int | None = None) -> Peak:
        """Returns the moment of most memory in one optimizer step, or in all of the trace."""
        inside = [step is None or event.step == step for event in self.events]
        index = int(np.where(inside, self.total, -1).argmax())
        parts: dict[tuple[Category, str], int] = {}
        for span, size in self._sizes:
            if span.start <= index < span.end:
                key = (span.category, span.component)
                parts[key] = parts.get(key, 0) + size
        last = next(event for event in reversed(self.events[: index + 1]) if event.is_birth)
        return Peak(
            total=int(self.total[index]),
            parts=dict(sorted(parts.items(), key=lambda item: -item[1])),
            phase=self.events[index].phase,
            op=last.allocation.op,
            module=last.allocation.module,
            event=index,
        )
