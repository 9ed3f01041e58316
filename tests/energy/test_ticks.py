"""A counter's ticks, told from polls that see them late."""

from itertools import pairwise

import numpy as np
import pytest

from proxy.energy.ticks import TickClock

MILLISECOND = 1_000_000


def polled(
    tick: float, poll: float, phase: float, seconds: float = 30.0, jitter: float = 2.0
) -> list[tuple[float, int]]:
    """The true and the estimated instants of the changes (milliseconds, nanoseconds)."""
    rng = np.random.default_rng(1)
    ticks = phase + np.arange(0.0, seconds * 1000, tick)
    polls = np.arange(0.0, seconds * 1000, poll)
    ticks += rng.normal(0, jitter, len(ticks))
    polls += rng.normal(0, jitter, len(polls))
    clock, seen, resolved, told = TickClock(), 0, False, []
    for before, at in pairwise(polls.tolist()):
        count = int(np.searchsorted(ticks, at, side="right"))
        if count > seen:
            instant = clock.changed(round(before * MILLISECOND), round(at * MILLISECOND), resolved=resolved)
            told.append((float(ticks[count - 1]), instant))
        resolved, seen = count == seen, count
    return told


@pytest.mark.parametrize("phase", [0.0, 1.0, 13.0, 25.0, 37.0, 49.0])
@pytest.mark.parametrize(("tick", "poll"), [(100.0, 50.0), (100.0, 47.0), (20.0, 7.0), (1000.0, 50.0)])
def test_steady_ticks_are_told_better_than_polls_tell_them(tick: float, poll: float, phase: float) -> None:
    later = polled(tick, poll, phase, seconds=0.4 * tick)[25:]
    errors = np.array([told / MILLISECOND - true for true, told in later])
    assert np.abs(errors - errors.mean()).mean() < 4.0 + 0.05 * poll  # the scatter; a steady lag is learnt elsewhere
    assert np.abs(errors).mean() < 0.55 * poll


def test_ticks_faster_than_polls_are_left_where_polls_saw_them() -> None:
    clock = TickClock()
    assert [clock.changed(i * 50, i * 50 + 50, resolved=False) for i in range(100)] == [i * 50 + 50 for i in range(100)]


def test_irregular_changes_are_left_where_polls_saw_them() -> None:
    rng = np.random.default_rng(2)
    clock, at, exact = TickClock(), 0, 0
    for _ in range(200):
        at += int(rng.integers(2, 60))
        exact += clock.changed(at - 1, at, resolved=True) == at
    assert exact > 190


def test_an_instant_never_leaves_the_polls_around_it() -> None:
    rng = np.random.default_rng(3)
    clock = TickClock()
    for i in range(300):
        at = i * 100 + int(rng.integers(0, 90))
        before = at - int(rng.integers(1, 60))
        assert before <= clock.changed(before, at, resolved=True) <= at
