"""The simulated energy counter: what a poll of the device would have read.

It moves only at its ticks, lags the truth by its averaging, errs by its noise, and is polled at instants of its own.
"""

from dataclasses import dataclass

import numpy as np

from bench.attribution.gpu import Floats
from bench.attribution.scenarios import Meter
from bench.attribution.simulation import Curve

#: The power reading is an average over the last second on recent GPUs.
POWER_AVERAGE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Readings:
    """What polls read, and (which nobody is told) when the counter moved and to what."""

    seconds: Floats
    joules: Floats
    watts: Floats
    tick_seconds: Floats
    tick_joules: Floats


def read(curve: Curve, meter: Meter, rng: np.random.Generator) -> Readings:
    """Poll the counter from the beginning to the end; the first poll reads 0."""
    until, period = curve.seconds[-1], meter.tick_seconds * (1 + meter.tick_drift)
    seconds = _instants(until, 1 / meter.poll_hertz, meter.poll_jitter_seconds, rng)
    ticks = _instants(until, period, meter.tick_jitter_seconds, rng)
    ticks[1:] += rng.uniform(-period, 0) / 2  # nobody knows the counter's phase
    rises = np.diff(lagging(curve, ticks, meter.averaging_seconds))
    rises *= np.maximum(rng.normal(1.0, meter.noise, len(rises)), 0.0)
    counter = np.round(np.cumsum(np.append(0.0, rises)) / meter.resolution_joules) * meter.resolution_joules
    used = lagging(curve, seconds, 0.0) - lagging(curve, seconds - POWER_AVERAGE_SECONDS, 0.0)
    watts = used / POWER_AVERAGE_SECONDS * rng.normal(1.0, meter.noise, len(used))
    return Readings(seconds, counter[np.searchsorted(ticks, seconds, side="right") - 1], watts, ticks, counter)


def lagging(curve: Curve, seconds: Floats, averaging: float) -> Floats:
    """True cumulative joules at these times, averaged over the `averaging` seconds before each."""
    times, joules = np.array(curve.seconds), np.array(curve.joules)
    if averaging <= 0:
        return np.asarray(np.interp(seconds, times, joules))
    integral = np.append(0.0, np.cumsum((joules[1:] + joules[:-1]) / 2 * np.diff(times)))
    now = _integrated(seconds, times, joules, integral)
    return np.asarray((now - _integrated(seconds - averaging, times, joules, integral)) / averaging)


def _integrated(seconds: Floats, times: Floats, joules: Floats, integral: Floats) -> Floats:
    """The integral of cumulative joules from the beginning (nothing was used before it)."""
    inside = np.clip(seconds, times[0], times[-1])
    knot = np.clip(np.searchsorted(times, inside, side="right") - 1, 0, len(times) - 2)
    here = np.interp(inside, times, joules)
    return np.asarray(integral[knot] + (joules[knot] + here) / 2 * (inside - times[knot]))


def _instants(until: float, period: float, jitter: float, rng: np.random.Generator) -> Floats:
    nominal = np.arange(0.0, until, period)
    shift = np.clip(rng.normal(0.0, jitter, len(nominal)), -0.4 * period, 0.4 * period)
    return np.append(0.0, (nominal + shift)[1:])
