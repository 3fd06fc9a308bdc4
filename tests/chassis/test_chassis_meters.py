"""The rate meter of both servers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace_chassis.meters import SPAN_S, Meter


def test_one_reading_has_no_rate():
    assert Meter().at(100, 7.0) == 0.0


def test_the_rate_is_the_mean_since_the_first_reading_while_the_meter_is_young():
    meter = Meter()
    meter.at(0, 0.0)

    assert meter.at(100, 1.0) == 100.0
    assert meter.at(100, 2.0) == 50.0


def test_readings_older_than_the_span_do_not_count():
    meter = Meter()
    for second in range(11):
        meter.at(1000 * second, float(second))
    rates = [meter.at(10_000, 10.0 + second) for second in range(1, 6)]

    assert rates == [800.0, 600.0, 400.0, 200.0, 0.0]


def test_readings_further_apart_than_the_span_are_compared_with_the_one_before():
    meter = Meter()
    meter.at(0, 0.0)
    meter.at(10, 100.0)

    assert meter.at(70, 130.0) == 2.0


def test_a_count_that_falls_has_the_rate_zero():
    meter = Meter()
    meter.at(100, 0.0)

    assert meter.at(40, 1.0) == 0.0


def test_two_readings_at_one_moment_have_no_rate():
    meter = Meter()
    meter.at(0, 1.0)

    assert meter.at(50, 1.0) == 0.0


def test_a_cleared_meter_starts_anew():
    meter = Meter()
    meter.at(0, 0.0)
    meter.at(1000, 1.0)
    meter.clear()

    assert meter.at(1000, 60.0) == 0.0
    assert meter.at(1010, 61.0) == 10.0


def test_many_readings_a_second_cost_no_memory_and_keep_the_whole_span():
    meter = Meter()
    for millisecond in range(20_000):
        rate = meter.at(1 if millisecond < 16_000 else 401, millisecond / 1000)

    assert rate == pytest.approx(400 / SPAN_S, rel=0.02)
    assert len(meter._readings) <= 103


@given(st.lists(st.tuples(st.floats(0.001, 3), st.integers(0, 1000)), min_size=2, max_size=300))
def test_the_rate_is_between_the_slowest_and_the_fastest_step(steps):
    meter, now, count, rates = Meter(), 0.0, 0, []
    meter.at(0, 0.0)
    for seconds, n_more in steps:
        now, count = now + seconds, count + n_more
        rates.append(n_more / seconds)
        rate = meter.at(count, now)

        assert min(rates) * (1 - 1e-6) <= rate <= max(rates) * (1 + 1e-6)
