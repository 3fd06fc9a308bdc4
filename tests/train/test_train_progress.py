"""Progress: rates over the last seconds, a bar on a terminal, lines elsewhere."""

import io
import json

import pytest

from headrace_train.reporting.bars import BarReporter
from headrace_train.reporting.progress import Meter, Throttle, Tick
from headrace_train.reporting.reporters import JsonReporter, LineReporter, describe, new_reporter

TICK = Tick(
    phase="training",
    done=250,
    total=1000,
    rows_per_s=125.0,
    eta_s=66.0,
    wait=0.25,
    figures={"loss": 12.3456, "l0": 32.0},
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_rates_are_those_of_the_last_seconds():
    clock = Clock()
    meter = Meter(clock)
    for second in range(1, 11):
        clock.now = 100.0 + second
        rows = second * 10 if second <= 4 else 40 + (second - 4) * 100
        tick = meter.tick("training", rows, 1000, wait_s=0.5 * second)

    assert tick.rows_per_s == pytest.approx(100, rel=0.2)
    assert tick.wait == pytest.approx(0.5)
    assert tick.eta_s == pytest.approx((1000 - 640) / tick.rows_per_s)


def test_nothing_is_promised_before_anything_was_done():
    tick = Meter().tick("training", 0, 1000)

    assert (tick.eta_s, tick.wait, tick.percent) == (None, None, 0)


def test_an_unknown_total_has_no_percent():
    assert Tick(phase="waiting", done=5, total=0).percent is None


def test_the_throttle_lets_one_through_a_period():
    clock = Clock()
    throttle = Throttle(1.0, clock)
    first, again = throttle.due(), throttle.due()
    clock.now += 1

    assert (first, again, throttle.due()) == (True, False, True)


def test_a_line_tells_rows_rates_and_figures():
    assert describe(TICK) == "250/1,000 rows  125 rows/s  ETA 1:06  loss 12.3  L0 32.0  waits 25%"


def test_the_reporter_is_chosen_by_the_output():
    assert isinstance(new_reporter(io.StringIO(), as_json=False), LineReporter)
    assert isinstance(new_reporter(Terminal(), as_json=False), BarReporter)
    assert isinstance(new_reporter(Terminal(), as_json=True), JsonReporter)


def test_lines_come_at_intervals_and_at_the_end():
    out = io.StringIO()
    with LineReporter(out, every_s=3600) as reporter:
        for _ in range(5):
            reporter.tick(TICK)
        reporter.tick(TICK, last=True)

    assert out.getvalue().splitlines() == [f"training    25%  {describe(TICK)}"] * 2


def test_a_terminal_gets_a_bar_and_the_results_below_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with BarReporter(out, every_s=0) as reporter:
        reporter.note("layer [14] of a model")
        reporter.tick(TICK)
        reporter.finished({"explained variance": "0.8"}, {})

    text = out.getvalue()
    assert "layer [14] of a model" in text
    assert "training" in text
    assert "━" in text
    assert "25% 250/1,000 rows  125 rows/s  ETA 1:06" in text
    assert "loss 12.3  L0 32.0  waits 25%" in text
    assert text.rstrip().endswith("explained variance  0.8")


def test_numbers_that_json_has_no_word_for_are_null():
    out = io.StringIO()
    JsonReporter(out).tick(Tick(phase="training", done=1, total=2, figures={"loss": float("nan")}))

    assert json.loads(out.getvalue())["loss"] is None
