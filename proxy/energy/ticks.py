"""When a counter really ticked, between the poll that did not see the change and the one that did.

Counters tick at a steady pace of their own (about 100 ms on recent GPUs). Polls see each tick late, by anything up to
the time between two polls; taken at their word they make windows of 50 and 150 ms out of a steady 100 ms. So the pace and
phase of the ticks are fitted to the last changes seen, and believed as far as the polls around each change allow.
"""

from collections import deque

import numpy as np

from proxy.energy.pending import Floats

_REMEMBERED = 64
#: With fewer changes, or when more than such a part of them fits no steady pace, polls are all we trust.
_FEWEST = 20
_MOST_MISFITS = 0.25
#: A tick may be early or late by such a part of the period.
_JITTER = 0.1
#: Between two changes in successive polls the counter may have ticked twice: many of those tell no pace.
_MOST_UNRESOLVED = 0.5
_REFIT_EVERY, _RETRY_EVERY = 8, 20
#: Paces tried about the mean gap, relative to it.
_PACES = np.linspace(0.97, 1.03, 61)
_TURNS = np.linspace(0.0, 1.0, 32, endpoint=False)


class TickClock:
    """Estimates the instants of a counter's changes, in nanoseconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[int, int, bool]] = deque(maxlen=_REMEMBERED)
        self._since_fit = 0
        self._steady = False
        self._period = self._phase = 0.0

    def changed(self, before: int, at: int, *, resolved: bool) -> int:
        """The counter changed after the poll at `before` and no later than the one at `at`: when, most likely.

        `resolved` says that the poll at `before` saw no change itself.
        """
        self._seen.append((before, at, resolved))
        self._since_fit += 1
        if len(self._seen) >= _FEWEST and self._since_fit >= (_REFIT_EVERY if self._steady else _RETRY_EVERY):
            self._since_fit = 0
            self._fit()
        if not self._steady:
            return at
        tick = self._phase + self._period * round(((before + at) / 2 - self._phase) / self._period)
        return round(min(max(tick, before), at))

    @property
    def error(self) -> float:
        """Nanoseconds by which the instants told may be off, usually."""
        if not self._seen:
            return 0.0
        before, at, resolved = self._seen[-1]
        return _JITTER * self._period if self._steady else (at - before) / (2 if resolved else 4)

    def _fit(self) -> None:
        seen = np.array(self._seen, dtype=np.float64)
        origin = seen[0, 0]
        before, at, resolved = seen[:, 0] - origin, seen[:, 1] - origin, seen[:, 2]
        if resolved.mean() < 1 - _MOST_UNRESOLVED:
            self._steady = False
            return
        middle = (before + at) / 2
        guess = (self._period, self._phase - origin) if self._steady else _likely_pace(before, at)
        period, phase = _line(middle, *guess)
        ticks = phase + period * np.round((middle - phase) / period)
        tolerance = _JITTER * period
        misfits = np.mean((ticks < before - tolerance) | (ticks > at + tolerance))
        self._steady = bool(misfits < _MOST_MISFITS)
        self._period, self._phase = period, phase + origin


def _likely_pace(before: Floats, at: Floats) -> tuple[float, float]:
    """Period and phase with which most ticks fall between their polls, of those about the mean gap.

    Gaps in which ticks were missed are left out of the mean.
    """
    gaps = np.diff((before + at) / 2)
    periods = _PACES * float(gaps[gaps < 1.7 * np.median(gaps)].mean())
    phases = _TURNS * periods.mean()
    late = (at - phases[:, None, None]) % periods[
        :, None
    ]  # (phases, periods, changes): how long after a tick it was seen
    hits = np.mean(late < at - before, axis=2)
    best = hits >= hits.max() - 1e-9
    row = int(best.sum(axis=0).argmax())  # the period that leaves the phase most room, and the middle of that room
    return float(periods[row]), _middle_of_turn(_TURNS[best[:, row]]) * float(periods.mean())


def _middle_of_turn(turns: Floats) -> float:
    return float(np.angle(np.exp(2j * np.pi * turns).mean())) / (2 * np.pi)


def _line(middle: Floats, period: float, phase: float) -> tuple[float, float]:
    """Period and phase of the line through the changes, each numbered by the nearest tick."""
    number = np.round((middle - phase) / period)
    slope, start = np.polyfit(number, middle, 1) if np.ptp(number) > 0 else (period, phase)
    return float(slope), float(start)
