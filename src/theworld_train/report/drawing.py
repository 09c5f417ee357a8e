"""Where the lines of a chart go: from curves to paths, ticks and marks in the units of an SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from theworld_train.report.blocks import Chart, Line, Parallel, Series
from theworld_train.report.scale import Scale, scale_for, tick_text
from theworld_train.report.words import short

WIDTH, HEIGHT = 440, 256
LEFT, RIGHT, TOP, BOTTOM = 60, 14, 24, 40
#: Stretches that a long curve is thinned to, each with its mean, its smallest and its largest value.
STRETCHES = 300
#: Places of the horizontal axis that say their values when they are pointed at.
READINGS = 48
#: Different colours and dashes of curves; further ones begin again.
STYLES = 8


Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in units of the SVG, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A series as drawn.

    Attributes:
        name: Its name.
        style: Number of its colour and dashes.
        path: Its line; of a long curve, the mean of each stretch.
        extremes: Of a long curve, the line through the smallest and largest values, which is drawn faintly; else empty.
        dots: Its points, if they are drawn.
        joined: Whether there is a line.
        last: Its last finite value, written out.
        gaps: Number of its values that are not finite.
    """

    name: str
    style: int
    path: str
    extremes: str
    dots: tuple[tuple[float, float], ...]
    joined: bool
    last: str
    gaps: int


@dataclass(frozen=True)
class Reading:
    """A strip of the chart that says its values when it is pointed at."""

    x: float
    width: float
    text: str


@dataclass(frozen=True)
class Drawing:
    """A chart as drawn, in units of an SVG of WIDTH by HEIGHT."""

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Tick, ...]
    levels: tuple[Tick, ...]
    readings: tuple[Reading, ...]


def draw(chart: Chart) -> Drawing:
    """Returns where everything in a chart goes."""
    points = [point for series in chart.series for point in series.points]
    levels = [(level, name) for level, name in chart.levels if math.isfinite(level)]
    values = [y for _, y in points if math.isfinite(y)] + [level for level, _ in levels]
    y = scale_for(values, may_be_log=chart.may_be_log)
    x = _horizontal(chart, [place for place, _ in points])
    y_ticks = y.ticks()
    title = f"{chart.y}, logarithmic" if y.log else chart.y
    return Drawing(
        title=chart.title,
        x=chart.x,
        y=title,
        curves=tuple(_curve(series, index, x, y) for index, series in enumerate(chart.series)),
        x_ticks=_x_ticks(chart, x),
        y_ticks=tuple(Tick(_down(y, tick), tick_text(tick, y_ticks)) for tick in y_ticks),
        marks=tuple(Tick(_across(x, place), name) for place, name in chart.marks),
        levels=tuple(Tick(_down(y, level), name) for level, name in levels),
        readings=_readings(chart, x),
    )


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the smallest and the largest value of each stretch of a long curve, its first and its last point.

    What is not finite counts as neither, and a stretch that holds some begins with a gap.
    """
    if not _is_long(points):
        return list(points)
    kept: list[tuple[float, float]] = [points[0]]
    for finite, gap in _stretches(points):
        kept += gap
        if finite:
            kept += sorted({min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])})
    return [*kept, points[-1]] if kept[-1] != points[-1] else kept


def average(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns the mean of each stretch of a long curve, in its middle, with the gaps of `thin`."""
    kept: list[tuple[float, float]] = []
    for finite, gap in _stretches(points):
        kept += gap
        if finite:
            kept.append((finite[len(finite) // 2][0], math.fsum(value for _, value in finite) / len(finite)))
    return kept


def _is_long(points: Sequence[tuple[float, float]]) -> bool:
    return len(points) > 2 * STRETCHES


def _stretches(points: Sequence[tuple[float, float]]) -> Iterator[tuple[Points, Points]]:
    """Yields the finite points of each stretch, and a gap where some are not."""
    width = len(points) / STRETCHES
    for index in range(STRETCHES):
        stretch = points[round(index * width) : round((index + 1) * width)]
        finite = [point for point in stretch if math.isfinite(point[1])]
        yield finite, [] if len(finite) == len(stretch) else [(stretch[0][0], math.nan)]


def _horizontal(chart: Chart, places: Sequence[float]) -> Scale:
    if chart.ticks:
        return Scale(-0.3, len(chart.ticks) - 0.7) if len(chart.ticks) > 1 else Scale(-0.5, 0.5)
    low, high = min(places, default=0.0), max(places, default=1.0)
    low = 0.0 if 0 < low < 0.5 * high else low
    return Scale(low, high) if high > low else Scale(low - 1, high + 1)


def _x_ticks(chart: Chart, x: Scale) -> tuple[Tick, ...]:
    if chart.ticks:
        every = math.ceil(len(chart.ticks) / 5)
        return tuple(
            Tick(_across(x, index), _cut(name)) for index, name in enumerate(chart.ticks) if index % every == 0
        )
    ticks = [tick for tick in x.ticks() if tick == int(tick)]
    return tuple(Tick(_across(x, tick), tick_text(tick, ticks)) for tick in ticks)


def _cut(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:13]}…"


def _across(x: Scale, value: float) -> float:
    return round(LEFT + x.place(value) * (WIDTH - LEFT - RIGHT), 1)


def _down(y: Scale, value: float) -> float:
    return round(HEIGHT - BOTTOM - y.place(value) * (HEIGHT - TOP - BOTTOM), 1)


def _curve(series: Series, index: int, x: Scale, y: Scale) -> Curve:
    finite = [(place, value) for place, value in series.points if math.isfinite(value)]
    is_long = _is_long(series.points)
    line = average(series.points) if is_long else series.points
    # A value between two gaps has no line; a point shows it.
    alone = [
        point
        for left, point, right in zip(
            [(0.0, math.nan), *series.points], series.points, [*series.points[1:], (0.0, math.nan)], strict=False
        )
        if math.isfinite(point[1]) and not math.isfinite(left[1]) and not math.isfinite(right[1])
    ]
    shown = finite if series.dotted else alone
    return Curve(
        name=series.name,
        style=index % STYLES,
        path=_path(line, series.breaks, x, y) if series.joined else "",
        extremes=_path(thin(series.points), series.breaks, x, y) if series.joined and is_long else "",
        joined=series.joined,
        dots=tuple((_across(x, place), _down(y, value)) for place, value in shown[:STRETCHES]),
        last=short(finite[-1][1]) if finite else "no value",
        gaps=len(series.points) - len(finite),
    )


def _path(points: Sequence[tuple[float, float]], breaks: Sequence[float], x: Scale, y: Scale) -> str:
    path, pen_up, before = [], True, -math.inf
    for place, value in points:
        pen_up |= any(before < each <= place for each in breaks)
        before = place
        if not math.isfinite(value):
            pen_up = True
            continue
        path.append(f"{'M' if pen_up else 'L'}{_across(x, place):g} {_down(y, value):g}")
        pen_up = False
    return " ".join(path)


def _readings(chart: Chart, x: Scale) -> tuple[Reading, ...]:
    """Returns strips with the values of all curves at the point that is nearest to the middle of each."""
    places = sorted({place for series in chart.series for place, _ in series.points})
    if not places:
        return ()
    if len(places) > READINGS:
        places = [places[round(index * (len(places) - 1) / (READINGS - 1))] for index in range(READINGS)]
    across = [_across(x, place) for place in places]
    edges = [float(LEFT), *((left + right) / 2 for left, right in pairwise(across)), float(WIDTH - RIGHT)]
    found = [(series.name, dict(series.points)) for series in chart.series]
    readings = []
    for place, (left, right) in zip(places, pairwise(edges), strict=True):
        head = chart.ticks[int(place)] if chart.ticks else f"{chart.x} {place:,.0f}"
        said = [f"{name}: {short(values[place])}" for name, values in found if place in values]
        readings.append(Reading(round(left, 1), round(right - left, 1), "\n".join([head, *said])))
    return tuple(readings)


# -- parallel axes ----------------------------------------------------------------------------------------------------

PARALLEL_HEIGHT = 300
AXIS_DISTANCE = 180
PARALLEL_TOP, PARALLEL_BOTTOM = 44, 14
PARALLEL_SIDE = 96


@dataclass(frozen=True)
class ParallelDrawing:
    """Parallel axes as drawn."""

    title: str
    width: int
    axes: tuple[tuple[float, str, tuple[Tick, ...]], ...]
    lines: tuple[tuple[Line, str], ...]


def draw_parallel(parallel: Parallel) -> ParallelDrawing:
    """Returns where axes and lines go; the best line comes last, above the others."""
    width = 2 * PARALLEL_SIDE + AXIS_DISTANCE * (len(parallel.axes) - 1)
    across = [PARALLEL_SIDE + AXIS_DISTANCE * index for index in range(len(parallel.axes))]

    def down(place: float) -> float:
        return round(PARALLEL_HEIGHT - PARALLEL_BOTTOM - place * (PARALLEL_HEIGHT - PARALLEL_TOP - PARALLEL_BOTTOM), 1)

    axes = tuple(
        (float(x), _cut_axis(axis.name), tuple(Tick(down(place), _cut(text)) for place, text in axis.ticks))
        for x, axis in zip(across, parallel.axes, strict=True)
    )
    lines = []
    for line in sorted(parallel.lines, key=lambda line: (line.best, -1 if line.shade is None else 1 - line.shade)):
        path, pen_up = [], True
        for x, place in zip(across, line.places, strict=True):
            if place is None:
                pen_up = True
                continue
            path.append(f"{'M' if pen_up else 'L'}{x:g} {down(place):g}")
            pen_up = False
        lines.append((line, " ".join(path)))
    return ParallelDrawing(parallel.title, width, axes, tuple(lines))


def _cut_axis(name: str) -> str:
    """Keeps the end of a dotted key, which says most."""
    return name if len(name) <= 28 else f"…{name[-27:]}"
