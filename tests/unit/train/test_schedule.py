"""The rate's shape over the steps of a run, from the first to the last."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from theworld_train.config.schema import ScheduleSection
from theworld_train.train.schedule import rate_factor

KINDS = ("cosine", "linear", "constant", "wsd")
STEPS = 100


def factors(max_steps: int = STEPS, **values: object) -> list[float]:
    return [rate_factor(ScheduleSection(**values), step, max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_starts_at_its_first_share_and_ends_at_the_peak(kind: str):
    rates = factors(kind=kind, warmup_steps=10)
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0), "the peak is held for a step, wherever the decay starts"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 10, 99, 100, 150])
def test_no_step_is_taken_at_a_rate_of_zero_or_above_the_peak(kind: str, warmup: int):
    assert all(0 < rate <= 1 for rate in factors(kind=kind, warmup_steps=warmup))


@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_the_first_step_is_at_the_peak(kind: str):
    assert factors(kind=kind)[0] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_after_warmup_the_rate_never_rises(kind: str):
    rates = factors(kind=kind, warmup_steps=7, min_lr_ratio=0.1)
    assert all(later <= earlier for earlier, later in pairwise(rates[6:]))


def test_cosine_is_half_way_down_in_the_middle_and_ends_above_the_floor():
    rates = factors(kind="cosine", warmup_steps=20, min_lr_ratio=0.2)
    assert rates[60] == pytest.approx(0.6)
    assert rates[99] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 79 / 80)))
    assert rates[99] > 0.2


def test_linear_falls_by_equal_steps():
    rates = factors(kind="linear", warmup_steps=20, min_lr_ratio=0.2)
    assert rates[20:] == pytest.approx([1 - 0.8 * done / 80 for done in range(80)])


def test_constant_knows_no_floor():
    assert set(factors(kind="constant", warmup_steps=5, min_lr_ratio=0.3)[4:]) == {1.0}


def test_wsd_is_stable_and_then_decays_over_its_last_steps():
    rates = factors(kind="wsd", warmup_steps=10, decay_steps=20, min_lr_ratio=0.1)
    assert set(rates[9:81]) == {1.0}
    assert rates[80:] == pytest.approx([1 - 0.9 * done / 20 for done in range(20)])


def test_wsd_decays_over_a_tenth_of_the_run_unless_told_otherwise():
    rates = factors(kind="wsd", warmup_steps=10)
    assert rates[89] == rates[90] == 1.0
    assert rates[91] == pytest.approx(0.9)
    assert factors(max_steps=5, kind="wsd") == pytest.approx([1.0] * 5), "a short run has one step of decay"


def test_wsd_never_decays_during_warmup():
    rates = factors(kind="wsd", warmup_steps=60, decay_steps=80)
    assert rates[59] == rates[60] == 1.0
    assert rates[61] == pytest.approx(1 - 1 / 40)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_past_the_end_stay_at_the_floor(kind: str):
    schedule = ScheduleSection(kind=kind, warmup_steps=3, min_lr_ratio=0.25)
    assert rate_factor(schedule, STEPS + 50, STEPS) == pytest.approx(1.0 if kind == "constant" else 0.25)
