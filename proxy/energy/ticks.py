"""When a counter really ticked, between the poll that did not see the change and the one that did.

Counters tick at a steady pace of their own (about 100 ms on recent GPUs). Polls see each tick late, by anything up to
the time between two polls; taken at their word they make windows of 50 and 150 ms of a steady 100 ms. So the pace and
phase of the ticks are fitted to the last changes seen, and believed as far as the polls around each change allow.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from proxy.energy.pending import Floats

_REMEMBERED = 96
#: With fewer changes, or when more than such a part of them fits no steady pace, polls are all we trust.
_FEWEST = 24
_MOST_MISFITS = 0.15
#: A tick may be early or late by such a part of the period.
_JITTER = 0.1
#: Between two changes in successive polls the counter may have ticked twice: many of those tell no pace.
_MOST_UNRESOLVED = 0.5
_REFIT_EVERY, _RETRY_EVERY = 8, 20
#: Paces tried, relative to the mean gap, and phases in turns; then those tried about the best.
_PACES, _TURNS = np.linspace(0.97, 1.03, 61), np.linspace(0.0, 1.0, 24, endpoint=False)
_NEAR_PACES, _NEAR_TURNS = np.linspace(-0.001, 0.001, 7), np.linspace(-0.2, 0.2, 21)
#: Costs that differ by less than this part of a period are as good.
_AS_GOOD = 0.001


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
        if seen[:, 2].mean() < 1 - _MOST_UNRESOLVED:
            self._steady = False
            return
        # Counted from the middle, period and phase do not pull at each other.
        origin = seen[len(seen) // 2, 0]
        changes = _Changes(seen[:, 0] - origin, seen[:, 1] - origin)
        period, phase = changes.refined(self._period, self._phase - origin) if self._steady else (0.0, 0.0)
        if not self._steady or changes.misfits(period, phase) > _MOST_MISFITS:
            period, phase = changes.refined(*changes.likely_pace())
        self._steady = changes.misfits(period, phase) < _MOST_MISFITS
        self._period, self._phase = period, phase + origin


class _Changes(NamedTuple):
    """Spans of time in each of which the counter changed."""

    before: Floats
    at: Floats

    def outside(self, period: Floats | float, phase: Floats | float) -> Floats:
        """How far from each span the nearest tick of this pace lies; of many paces, in further dimensions before.

        Where two changes would be one tick, or a tick would be missing between them, that counts for half a period.
        """
        period, phase = np.asarray(period)[..., None], np.asarray(phase)[..., None]
        number = np.round(((self.before + self.at) / 2 - phase) / period)
        ticks = phase + period * number
        distance: Floats = np.maximum(np.maximum(self.before - ticks, ticks - self.at), 0.0)
        distance[..., 1:] += 0.5 * period * (number[..., 1:] - number[..., :-1] != 1)
        return distance

    def misfits(self, period: float, phase: float) -> float:
        """The part of the changes that this pace does not explain."""
        return float(np.mean(self.outside(period, phase) > _JITTER * period))

    def likely_pace(self) -> tuple[float, float]:
        """The best of many periods about the mean gap (gaps with missed ticks left out) and of many phases."""
        gaps = np.diff((self.before + self.at) / 2)
        periods = float(gaps[gaps < 1.7 * np.median(gaps)].mean()) * _PACES
        return self._best(periods[:, None], periods[:, None] * _TURNS)

    def refined(self, period: float, phase: float) -> tuple[float, float]:
        return self._best(period * (1 + _NEAR_PACES)[:, None], phase + period * _NEAR_TURNS)

    def _best(self, period: Floats, phase: Floats) -> tuple[float, float]:
        """The middle of those paces that fit (nearly) best."""
        cost = self.outside(period, phase).mean(axis=-1)
        best = cost <= cost.min() + _AS_GOOD * float(period.mean())
        period, phase = np.broadcast_arrays(period, phase)
        if not _is_small(phase[best], period):  # on both sides of a turn
            return float(period.flat[cost.argmin()]), float(phase.flat[cost.argmin()])
        return float(period[best].mean()), float(phase[best].mean())


def _is_small(phases: Floats, period: Floats) -> bool:
    return float(np.ptp(phases)) < 0.7 * float(period.mean())
