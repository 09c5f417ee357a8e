"""The picture of a plan: memory over the events of a step, stacked by what it holds."""

from __future__ import annotations

from pathlib import Path

from theworld_train.config.errors import ConfigError
from theworld_train.plan.advice import GIB, Planner, Setting
from theworld_train.plan.tracker import CATEGORIES, Category

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


def draw(path: Path, planner: Planner, setting: Setting) -> None:
    """Draws the last step of a plan into a PNG file.

    Args:
        path: The file.
        planner: Plans the run.
        setting: How the run is laid out.

    Raises:
        ConfigError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'theworld-train[plot]'") from error

    run, timeline = planner.run(setting), planner.timeline(setting)
    events = run.trace.events
    inside = [index for index, event in enumerate(events) if event.step == run.steps - 1]
    first, last = inside[0], inside[-1] + 1
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot()
    rows = {category: timeline.by_category[row, first:last] / GIB for row, category in enumerate(CATEGORIES)}
    axes.stackplot(
        range(last - first),
        [rows[category] for category in _ORDER],
        labels=_ORDER,
        colors=[_COLOURS[category] for category in _ORDER],
        step="post",
        linewidth=0,
    )
    peak = timeline.peak(run.steps - 1)
    place = f"{peak.op} in {peak.module}" if peak.module else peak.op
    axes.plot([peak.event - first], [peak.total / GIB], "k.", markersize=6)
    axes.annotate(
        f"{peak.total / GIB:.2f} GiB: {place}",
        (peak.event - first, peak.total / GIB),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
    )
    starts = [index for index in inside if index == first or events[index].phase != events[index - 1].phase]
    for start, end in zip(starts, [*starts[1:], last], strict=True):
        axes.axvline(start - first, color="black", linewidth=0.5, alpha=0.4)
        if end - start > 0.03 * (last - first):
            axes.text((start + end) / 2 - first, peak.total / GIB * 1.12, events[start].phase, ha="center")
    share = "" if setting.ranks == 1 else f", {setting.strategy.name} on {setting.ranks} GPUs"
    axes.set_title(
        f"{planner.config.name}: one optimizer step, micro-batch {setting.micro_batch_size} of"
        f" {run.shape.positions:,} positions{share}"
    )
    axes.set_xlabel("allocations and releases, in their order")
    axes.set_ylabel("GiB of one GPU")
    axes.set_xlim(0, last - first)
    axes.set_ylim(0, peak.total / GIB * 1.2)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
