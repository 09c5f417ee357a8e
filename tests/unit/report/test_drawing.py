"""Protects how values become marks on a page: axes, ticks, thinned curves and their gaps, numbers as text."""

from __future__ import annotations

import math

import pytest

from theworld_train.report import drawing
from theworld_train.report.blocks import Axis, Chart, Line, Parallel, Series
from theworld_train.report.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, STRETCHES, TOP, WIDTH, draw, draw_parallel, thin
from theworld_train.report.scale import Scale, scale_for, tick_text
from theworld_train.report.words import count, duration, share, short, size


def points(values: list[float]) -> tuple[tuple[float, float], ...]:
    return tuple((float(step), value) for step, value in enumerate(values, start=1))


def test_a_spike_in_a_long_run_stays_to_be_seen() -> None:
    values = [1.0 + 0.1 * math.sin(step) for step in range(100_000)]
    values[54_321] = 9.0
    kept = thin(points(values))
    assert len(kept) <= 3 * STRETCHES
    assert max(value for _, value in kept) == 9.0
    assert min(value for _, value in kept) == min(values)
    assert [step for step, _ in kept] == sorted(step for step, _ in kept)
    assert (kept[0][0], kept[-1][0]) == (1.0, 100_000.0)


def test_a_long_run_is_drawn_as_means_over_its_extremes() -> None:
    values = [1.0 + (step % 2) for step in range(10_000)]
    values[5_001] = 50.0
    drawn = draw(Chart("c", "x", "y", (Series("s", points(values)),)))
    (curve,) = drawn.curves
    assert len(curve.path.split("L")) == STRETCHES
    heights = [float(place.split()[1]) for place in curve.path[1:].split("L")]
    means = (HEIGHT - BOTTOM) - (HEIGHT - TOP - BOTTOM) * 1.5 / 52
    assert sorted(heights)[STRETCHES // 2] == pytest.approx(means, abs=0.2)
    assert min(float(place.split()[1]) for place in curve.extremes[1:].split("L")) < TOP + 10
    assert draw(Chart("c", "x", "y", (Series("s", points(values[:100])),))).curves[0].extremes == ""


def test_a_gap_in_a_long_run_stays_a_gap() -> None:
    values = [1.0] * 10_000
    values[5_000] = math.nan
    assert sum(math.isnan(value) for _, value in thin(points(values))) == 1
    (curve,) = draw(Chart("c", "x", "y", (Series("s", points(values)),))).curves
    assert curve.path.count("M") == 2
    assert curve.gaps == 1


def test_a_short_curve_is_drawn_point_by_point() -> None:
    assert thin(points([3.0, 1.0, 2.0])) == list(points([3.0, 1.0, 2.0]))


def test_a_value_between_two_gaps_is_a_dot() -> None:
    (curve,) = draw(Chart("c", "x", "y", (Series("s", points([1.0, math.nan, 2.0, math.inf, 3.0, 4.0])),))).curves
    assert len(curve.dots) == 2  # 1 and 2; 3 and 4 are joined


def test_corners_of_a_chart_are_its_extremes() -> None:
    drawn = draw(Chart("c", "x", "y", (Series("s", ((0, 0.0), (10, 26.0))),)))
    assert drawn.curves[0].path.startswith(f"M{LEFT} {HEIGHT - BOTTOM} L{WIDTH - RIGHT} ")
    top = float(drawn.curves[0].path.split()[-1])
    assert TOP <= top < TOP + 10
    assert [tick.text for tick in drawn.x_ticks] == ["0", "2", "4", "6", "8", "10"]


def test_stages_are_not_joined() -> None:
    series = Series("s", points([1.0, 2.0, 3.0, 4.0]), breaks=(2.5,))
    assert draw(Chart("c", "x", "y", (series,))).curves[0].path.count("M") == 2


def test_trials_are_points_without_a_line() -> None:
    (curve,) = draw(Chart("c", "x", "y", (Series("s", points([1.0, 2.0]), dotted=True, joined=False),))).curves
    assert (curve.path, len(curve.dots)) == ("", 2)


def test_an_empty_chart_and_a_chart_without_finite_values_are_drawn() -> None:
    assert draw(Chart("c", "x", "y", (Series("s", ()),))).curves[0].last == "no value"
    assert draw(Chart("c", "x", "y", (Series("s", points([math.nan])),))).curves[0].gaps == 1


def test_an_axis_becomes_logarithmic_over_magnitudes_only_where_it_may() -> None:
    assert scale_for([0.01, 1.0], may_be_log=True).log
    assert not scale_for([0.01, 1.0], may_be_log=False).log
    assert not scale_for([0.5, 1.0], may_be_log=True).log
    assert not scale_for([-1.0, 0.0, 100.0], may_be_log=True).log


def test_values_lie_on_an_axis_by_their_distance_or_ratio() -> None:
    assert Scale(0, 10).place(2.5) == 0.25
    assert Scale(1e-4, 1e-2, log=True).place(1e-3) == pytest.approx(0.5)
    assert Scale(1e-4, 1e-2, log=True).place(0.0) == 0.0
    assert scale_for([5.0, 5.0], may_be_log=False).place(5.0) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("scale", "texts"),
    [
        (Scale(0, 1), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (Scale(0, 1e-3), ["0", "2e-4", "4e-4", "6e-4", "8e-4", "0.001"]),
        (Scale(0, 250_000), ["0", "50k", "100k", "150k", "200k", "250k"]),
        (Scale(1e-4, 1, log=True), ["1e-4", "0.001", "0.01", "0.1", "1"]),
        (Scale(9.7, 10.3), ["9.8", "10", "10.2"]),
    ],
)
def test_ticks_are_round(scale: Scale, texts: list[str]) -> None:
    ticks = scale.ticks()
    assert [tick_text(tick, ticks) for tick in ticks] == texts


def test_the_best_trial_is_drawn_above_the_others() -> None:
    axes = (Axis("a", ((0.0, "0"), (1.0, "1"))), Axis("b", ()))
    lines = (Line("best", (0.0, 0.0), 0.0, best=True), Line("bare", (0.5, None), None), Line("worst", (1.0, 1.0), 1.0))
    drawn = draw_parallel(Parallel("p", axes, lines))
    assert [line.name for line, _ in drawn.lines] == ["bare", "worst", "best"]
    assert drawn.lines[0][1].count("L") == 0
    assert drawn.lines[2][1] == (
        f"M{drawing.PARALLEL_SIDE} {drawing.PARALLEL_HEIGHT - drawing.PARALLEL_BOTTOM}"
        f" L{drawing.PARALLEL_SIDE + drawing.AXIS_DISTANCE} {drawing.PARALLEL_HEIGHT - drawing.PARALLEL_BOTTOM}"
    )


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (short(0.060534), "0.06053"),
        (short(1.2e-5), "1.2e-5"),
        (short(13094.4), "13,094"),
        (short(3.0), "3"),
        (short(None), "-"),
        (short(math.nan), "not finite"),
        (count(math.inf), "-"),
        (share(0.1234), "12.3%"),
        (size(0), "0"),
        (size(2048), "2.0 KiB"),
        (size(3 * 2**20), "3.0 MiB"),
        (size(2.5 * 2**30), "2.50 GiB"),
        (duration(0.333), "0.33 s"),
        (duration(59.6), "60 s"),
        (duration(725), "12 min 05 s"),
        (duration(3 * 3600 + 720), "3 h 12 min"),
        (duration(53 * 3600), "2 d 5 h"),
    ],
)
def test_numbers_are_written_as_people_read_them(written: str, text: str) -> None:
    assert written == text
