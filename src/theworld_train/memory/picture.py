"""The picture of memory: bytes over the events of a step, stacked by what they hold."""

from __future__ import annotations

from pathlib import Path

from theworld_train.memory.timeline import Timeline
from theworld_train.memory.tracker import CATEGORIES, Category

GIB, MIB = 2**30, 2**20
_COLOURS = {
    "weights": "#4c72b0",
    "masters": "#8da9d4",
    "optimizer": "#937860",
    "gradients": "#c44e52",
    "activations": "#55a868",
    "temporaries": "#dd8452",
}
#: From the bottom up: what stays lies below what comes and goes.
_ORDER: tuple[Category, ...] = ("weights", "masters", "optimizer", "gradients", "activations", "temporaries")


def draw(path: Path, timeline: Timeline, step: int, title: str, where: str) -> None:
    """Draws one optimizer step into a PNG file.

    Args:
        path: The file.
        timeline: What is held over time.
        step: The optimizer step.
        title: Stands above the picture.
        where: Whose memory it is, such as `one GPU`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    events = timeline.events
    inside = [index for index, event in enumerate(events) if event.step == step]
    first, last = inside[0], inside[-1] + 1
    peak = timeline.peak(step)
    unit, name = (GIB, "GiB") if peak.total >= GIB else (MIB, "MiB")
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot()
    rows = {category: timeline.by_category[row, first:last] / unit for row, category in enumerate(CATEGORIES)}
    axes.stackplot(
        range(last - first),
        [rows[category] for category in _ORDER],
        labels=_ORDER,
        colors=[_COLOURS[category] for category in _ORDER],
        step="post",
        linewidth=0,
    )
    top = peak.total / unit
    place = f"{peak.op} in {peak.module}" if peak.module else peak.op
    along = (peak.event - first) / (last - first)
    axes.plot([peak.event - first], [top], "k.", markersize=6)
    axes.annotate(
        f"{top:.2f} {name}: {place}",
        (peak.event - first, top),
        xytext=(0, 6),
        textcoords="offset points",
        ha="left" if along < 1 / 3 else "right" if along > 2 / 3 else "center",
    )
    starts = [index for index in inside if index == first or events[index].phase != events[index - 1].phase]
    for start, end in zip(starts, [*starts[1:], last], strict=True):
        axes.axvline(start - first, color="black", linewidth=0.5, alpha=0.4)
        if end - start > 0.03 * (last - first):
            axes.text((start + end) / 2 - first, top * 1.12, events[start].phase, ha="center")
    axes.set_title(title)
    axes.set_xlabel("allocations and releases, in their order")
    axes.set_ylabel(f"{name} of {where}")
    axes.set_xlim(0, last - first)
    axes.set_ylim(0, top * 1.2)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
