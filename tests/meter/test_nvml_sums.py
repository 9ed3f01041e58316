"""Integrated power, and its comparison with the counter: sums over time, without hardware."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.energy.quantities import Microjoules
from proxy.meter.nvml import LONGEST_INTEGRATED_PAUSE, Comparison, Integral

SECOND = 1_000_000_000


@given(watts=st.floats(0, 1000), pauses=st.lists(st.integers(1, LONGEST_INTEGRATED_PAUSE), min_size=1, max_size=20))
def test_constant_power_integrates_to_power_times_time(watts: float, pauses: list[int]) -> None:
    integral = Integral()
    at = 5 * SECOND
    integral.add(at, watts)
    before = integral.microjoules
    for pause in pauses:
        at += pause
        assert integral.add(at, watts)
    assert integral.microjoules - before == pytest.approx(watts * sum(pauses) / 1000, rel=1e-9, abs=1e-6)


def test_changing_power_is_integrated_by_trapezoids() -> None:
    integral = Integral()
    integral.add(0, 100)
    before = integral.microjoules
    integral.add(SECOND, 300)
    assert integral.microjoules - before == pytest.approx(200e6)


@given(st.lists(st.sampled_from([SECOND // 20, LONGEST_INTEGRATED_PAUSE + 1]), min_size=1, max_size=30))
def test_a_pause_too_long_is_a_drop_below_every_reading_of_the_epoch(pauses: list[int]) -> None:
    integral = Integral()
    at = 0
    integral.add(at, 200)
    for pause in pauses:
        before = integral.microjoules
        at += pause
        continued = integral.add(at, 200)
        assert continued == (pause <= LONGEST_INTEGRATED_PAUSE)
        assert (integral.microjoules > before) == continued
        assert continued or integral.microjoules < before


def compared(gain: float, seconds: int, tick: int = SECOND // 10) -> Comparison:
    """What a comparison says of a 200 W GPU whose sensor shows `gain` times that, polled at 20 Hz."""
    comparison = Comparison()
    for at in range(0, seconds * SECOND, SECOND // 20):
        energy = Microjoules(at // tick * tick // 1000 * 200)
        comparison.add(at, energy, 200 * gain)
    return comparison


def test_nothing_is_said_before_five_seconds() -> None:
    assert compared(1.0, 4).ratio is None


@pytest.mark.parametrize(("gain", "ratio"), [(1.0, 0.0), (1.75, 0.75), (0.5, 0.5)])
@pytest.mark.parametrize("seconds", [8, 40, 100])
def test_the_disagreement_is_relative_to_the_counter(gain: float, ratio: float, seconds: int) -> None:
    assert compared(gain, seconds).ratio == pytest.approx(ratio, abs=0.03)


def test_a_counter_that_restarts_is_compared_afresh() -> None:
    comparison = compared(1.0, 10)
    for at in range(10 * SECOND, 30 * SECOND, SECOND // 20):
        comparison.add(at, Microjoules((at - 10 * SECOND) // 1000 * 200), 200.0)
    assert comparison.ratio == pytest.approx(0, abs=0.03)
