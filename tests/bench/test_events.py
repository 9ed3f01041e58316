"""What the simulator tells of a run: a counter that ticks and is polled, and events in a realistic order."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from bench.attribution.emission import Arrival, emit, poll
from bench.attribution.meter import lagging, read
from bench.attribution.scenarios import Meter, Scenario, load, stresses
from bench.attribution.simulation import Curve, World, simulate
from proxy.energy.events import Finish, Processes, Sample, Start, Step

EXACT = Meter(tick_jitter_seconds=0, averaging_seconds=0, noise=0, poll_jitter_seconds=0, resolution_joules=1e-6)


@pytest.fixture(scope="module")
def world() -> World:
    return simulate(load(4.0, 4.0))


@pytest.fixture(scope="module")
def arrivals(world: World) -> list[Arrival]:
    return emit(world, poll(world))


def steady(watts: float, seconds: float) -> Curve:
    curve = Curve()
    curve.extend(seconds, watts)
    return curve


def test_the_counter_reads_the_truth_as_of_its_last_tick(world: World) -> None:
    readings = read(world.curve, EXACT, np.random.default_rng(0))
    truth = np.interp(readings.tick_seconds, world.curve.seconds, world.curve.joules)
    assert readings.tick_joules == pytest.approx(truth, abs=1e-5)
    age = (
        readings.seconds - readings.tick_seconds[np.searchsorted(readings.tick_seconds, readings.seconds, "right") - 1]
    )
    assert (age >= 0).all()
    assert age.max() <= EXACT.tick_seconds * 1.01


def test_polls_between_two_ticks_see_no_change() -> None:
    readings = read(steady(300.0, 20.0), EXACT, np.random.default_rng(0))
    unchanged = np.mean(np.diff(readings.joules) == 0)
    assert 0.4 < unchanged < 0.6  # 20 Hz polls of a 100 ms tick


def test_averaging_delays_the_counter_and_loses_nothing() -> None:
    curve = Curve()
    curve.extend(5.0, 0.0)
    curve.extend(6.0, 400.0)
    curve.extend(12.0, 0.0)
    at = np.array([5.0, 5.5, 6.0, 7.0, 11.0])
    assert lagging(curve, at, 0.0) == pytest.approx([0, 200, 400, 400, 400])
    assert lagging(curve, at, 1.0) == pytest.approx([0, 50, 200, 400, 400])


def test_noise_is_of_the_size_asked_for() -> None:
    readings = read(steady(300.0, 400.0), replace(EXACT, noise=0.02), np.random.default_rng(0))
    rises = np.diff(readings.tick_joules)[1:]
    assert rises.std() / rises.mean() == pytest.approx(0.02, rel=0.15)
    assert (np.diff(readings.joules) >= 0).all()


def test_events_come_in_order_of_arrival_and_never_before_they_happened(arrivals: list[Arrival]) -> None:
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    for at, event in arrivals:
        happened = event.ended if isinstance(event, Step) else getattr(event, "at", 0)
        assert at >= happened / 1e9


def test_some_steps_arrive_after_a_sample_that_covers_them(arrivals: list[Arrival]) -> None:
    sampled, late = 0, 0
    for _, event in arrivals:
        if isinstance(event, Sample):
            sampled = event.at
        elif isinstance(event, Step):
            late += event.ended < sampled
    assert late > 0


def test_every_request_starts_and_finishes_once(world: World, arrivals: list[Arrival]) -> None:
    starts = [a.event.request for a in arrivals if isinstance(a.event, Start)]
    finishes = [a.event.request for a in arrivals if isinstance(a.event, Finish)]
    assert sorted(starts) == sorted(finishes)
    assert len(set(starts)) == len(starts) == len(world.truth.requests["chat"])


def test_reported_steps_do_not_overlap(arrivals: list[Arrival]) -> None:
    steps = [a.event for a in arrivals if isinstance(a.event, Step)]
    assert all(a.ended <= b.started <= b.ended for a, b in pairwise(steps))


def named(name: str) -> Scenario:
    return next(s for s in stresses(3.0) if s.name == name)


def test_processes_tell_of_foreign_load() -> None:
    world = simulate(named("foreign load"))
    shares = [a.event.foreign_share for a in emit(world, poll(world)) if isinstance(a.event, Processes)]
    assert 0 < max(shares) <= 1
    assert min(shares) == 0


def test_without_step_reports_a_relay_tells_of_each_request_alone() -> None:
    world = simulate(named("no step reports"))
    steps = [a.event for a in emit(world, poll(world)) if isinstance(a.event, Step)]
    assert {step.source for step in steps} == {"relay"}
    assert all(len(step.requests) == 1 for step in steps)
    assert {step.requests[0] for step in steps} == {f"chat-{n}" for n in range(len(world.truth.requests["chat"]))}
