"""Runs a scenario: engines take turns on the GPU, a meter watches, and the truth is written down beside.

Engines (and a foreign process) that are busy together share the GPU in time slices, as CUDA contexts do: each runs at
its part of the speed and the power is the mean of theirs. So a step's own energy E(S) does not depend on its
neighbours, and the truth adds up: shares of requests + foreign + loading + gaps (idle) = the energy of the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from bench.attribution.engine import Batch, Engine, draw
from bench.attribution.gpu import Floats, Ints, StepPhysics
from bench.attribution.scenarios import Backend, Foreign, Scenario
from bench.attribution.shapley import shapley

#: Between two steps of a busy engine the GPU waits for the next launch; now and then the scheduler is late.
GAP_SECONDS = 30e-6
BUBBLE_PROBABILITY = 0.02
BUBBLE_SECONDS = 1.5e-3
#: From a request's arrival at the engine's door to its place in the queue.
ADMISSION_SECONDS = 1e-3
LOADING_WATTS = 160.0
#: Power is held constant for at most so long.
SLICE_SECONDS = 0.25
TAIL_SECONDS = 1.0


@dataclass(slots=True)
class Execution:
    """One step as it happened on the GPU. `joules` is what it used, `fair` what each sequence should bear of it."""

    backend: str
    batch: Batch
    requests: Ints
    started: float
    ended: float
    joules: float
    fair: Floats


@dataclass(slots=True)
class Curve:
    """Cumulative energy of the device over time, and who had used its time: all piecewise linear."""

    seconds: list[float] = field(default_factory=lambda: [0.0])
    joules: list[float] = field(default_factory=lambda: [0.0])
    our_seconds: list[float] = field(default_factory=lambda: [0.0])
    foreign_seconds: list[float] = field(default_factory=lambda: [0.0])

    def extend(self, until: float, watts: float, ours: float = 0.0, foreign: float = 0.0) -> None:
        """Go on to `until` at so much power, with these parts of the time used."""
        passed = until - self.seconds[-1]
        self.joules.append(self.joules[-1] + watts * passed)
        self.our_seconds.append(self.our_seconds[-1] + ours * passed)
        self.foreign_seconds.append(self.foreign_seconds[-1] + foreign * passed)
        self.seconds.append(until)


@dataclass(slots=True)
class Truth:
    """Joules by account. `requests` by backend and request number."""

    requests: dict[str, Floats]
    idle: float = 0.0
    foreign: float = 0.0
    unattributed: float = 0.0

    @property
    def total(self) -> float:
        return sum(float(r.sum()) for r in self.requests.values()) + self.idle + self.foreign + self.unattributed


@dataclass(frozen=True, slots=True)
class World:
    """All that happened. `answered` (seconds, by backend and request) is when a client had all it would take."""

    scenario: Scenario
    executions: list[Execution]
    curve: Curve
    truth: Truth
    engines: dict[str, Engine]
    answered: dict[str, Floats]

    @property
    def ended(self) -> float:
        return self.curve.seconds[-1]


class _Seat:
    """A backend's place on the GPU: at most one step at a time."""

    def __init__(self, backend: Backend, scenario: Scenario, rng: np.random.Generator) -> None:
        sequences = draw(backend.traffic, scenario.opens_at, scenario.seconds, rng)
        sequences.arrived[:] += ADMISSION_SECONDS
        self.name = backend.name
        self.engine = Engine(sequences)
        self.physics = StepPhysics(backend.llm, scenario.gpu, scenario.roofline)
        self.noise = scenario.step_noise
        self.rng = rng
        self.answered = np.zeros(int(sequences.request[-1]) + 1)
        self.fair = np.zeros(len(self.answered))
        self.free_at = scenario.opens_at
        self.step: Execution | None = None
        self.remaining = 0.0
        self.watts = 0.0

    def starts_at(self, now: float) -> float:
        return self.engine.ready_at(max(now, self.free_at))

    def start(self, now: float, warmth: float) -> None:
        batch = self.engine.schedule(now)
        work = self.physics.llm.work(batch.tokens, batch.contexts, batch.sampled)
        seconds, joules = (float(x) for x in self.physics.cost(work.sum(axis=0), warmth))
        slower, hotter = np.clip(self.rng.normal(1.0, self.noise, 2), 0.5, 1.5)
        fair = shapley(work, lambda sums: self.physics.joules(sums, warmth), self.rng) * (slower * hotter)
        requests = self.engine.sequences.request[batch.sequences]
        joules *= slower * hotter
        self.remaining, self.watts = seconds * slower, joules / (seconds * slower)
        self.step = Execution(self.name, batch, requests, now, now, joules, fair)

    def finish(self, now: float) -> Execution:
        step = self.step
        assert step is not None
        step.ended = now
        self.fair += np.bincount(step.requests, weights=step.fair, minlength=len(self.fair))
        answered = self.engine.sequences.request[self.engine.answered(step.batch)]
        self.answered[answered] = now
        self.engine.complete(step.batch)
        late = self.rng.random() < BUBBLE_PROBABILITY
        self.free_at = now + GAP_SECONDS + (self.rng.exponential(BUBBLE_SECONDS) if late else 0.0)
        self.step = None
        return step


def simulate(scenario: Scenario) -> World:
    """Runs the scenario to its last request's end, and a second more."""
    seeds = np.random.SeedSequence(scenario.seed).spawn(len(scenario.backends))
    seats = [_Seat(b, scenario, np.random.default_rng(s)) for b, s in zip(scenario.backends, seeds, strict=True)]
    truth = Truth({})
    curve = _load(scenario, truth)
    executions = list(_serve(scenario, seats, curve, truth))
    truth.requests = {seat.name: seat.fair for seat in seats}
    engines, answered = {s.name: s.engine for s in seats}, {s.name: s.answered for s in seats}
    return World(scenario, executions, curve, truth, engines, answered)


def _load(scenario: Scenario, truth: Truth) -> Curve:
    curve = Curve()
    if scenario.loading_seconds:
        curve.extend(scenario.loading_seconds, LOADING_WATTS)
        truth.unattributed = curve.joules[-1]
    return curve


def _serve(scenario: Scenario, seats: list[_Seat], curve: Curve, truth: Truth) -> Iterator[Execution]:
    now = curve.seconds[-1]
    while not all(seat.engine.finished for seat in seats):
        warmth = scenario.gpu.warmth(now)
        for seat in seats:
            if seat.step is None and seat.starts_at(now) <= now:
                seat.start(now, warmth)
        busy = [seat for seat in seats if seat.step is not None]
        foreign, until = _foreign_share(scenario.foreign, now)
        speed = (1.0 - foreign) / max(len(busy), 1)
        ends = [now + seat.remaining / speed for seat in busy]
        until = min(until, now + SLICE_SECONDS, *ends, *(s.starts_at(now) for s in seats if s.step is None))
        _draw_power(scenario, busy, foreign, warmth, until, curve, truth)
        for seat, end in zip(busy, ends, strict=True):
            seat.remaining -= (until - now) * speed
            if end <= until:
                yield seat.finish(until)
        now = until
    tail = scenario.gpu.idle_watts * scenario.gpu.warmth(now)
    truth.idle += tail * TAIL_SECONDS
    curve.extend(now + TAIL_SECONDS, tail)


def _draw_power(
    scenario: Scenario, busy: list[_Seat], foreign: float, warmth: float, until: float, curve: Curve, truth: Truth
) -> None:
    """One slice of constant power; what no step draws is idle's or the foreign process's."""
    seconds = until - curve.seconds[-1]
    idle = scenario.gpu.idle_watts * warmth
    ours = sum(seat.watts for seat in busy) / len(busy) if busy else idle
    theirs = scenario.foreign.watts if scenario.foreign else 0.0
    truth.foreign += foreign * theirs * seconds
    if not busy:
        truth.idle += (1 - foreign) * idle * seconds
    watts = foreign * theirs + (1 - foreign) * ours
    curve.extend(until, watts, (1 - foreign) if busy else 0.0, foreign)


def _foreign_share(foreign: Foreign | None, now: float) -> tuple[float, float]:
    """The foreign process's part of the GPU's time now, and until when that holds."""
    if foreign is None:
        return 0.0, np.inf
    phase = now % foreign.period_seconds
    begins = foreign.period_seconds - foreign.present_seconds
    cycle = now - phase
    # A rounding error must not leave an instant that never ends.
    if phase < begins - 1e-9:
        return 0.0, cycle + begins
    return foreign.time_share, cycle + foreign.period_seconds + 1e-9
