"""How far a meter's counter lags behind the power it counts, learnt from how well windows fit when they are moved.

A counter averages, and shows at its next tick what has been used before; a poll sees that later still. So the energy
that a window shows was used a little earlier. For each lag of a list, windows are compared with what the cost model
says
of the steps that ran so much earlier; the lag that fits clearly best is approached, one notch at a time.
"""

import numpy as np

from proxy.energy.pending import Floats, Ints, Steps

_MILLISECOND = 1_000_000
LAGS = _MILLISECOND * np.array(
    [-20, -10, 0, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100, 130, 160, 200, 250, 300, 350, 400, 450, 500, 550, 600]
)  # fmt: skip
_NONE = int(np.flatnonzero(LAGS == 0)[0])
_KEPT_NANOSECONDS = 3_000 * _MILLISECOND
_MANY = 64
_KEPT = 0.99
_FEWEST_WINDOWS = 40
_PATIENCE = 10
#: After so many windows every eighth will do.
_ENOUGH_WINDOWS, _SELDOM = 400, 8
#: The squared error must fall by this part before the lag moves.
_CLEARLY = 0.03


class LagEstimate:
    """`nanoseconds` is the lag to assume; 0 until the windows say otherwise."""

    def __init__(self) -> None:
        self._notch = _NONE
        self._errors: Floats = np.zeros(len(LAGS))
        self._windows = 0
        self._since_move = self._seen = 0
        self._window: tuple[int, int, float] | None = None
        self._steps: list[tuple[Ints, Ints, Floats]] = []

    @property
    def nanoseconds(self) -> int:
        return int(LAGS[self._notch])

    def ran(self, steps: Steps) -> None:
        """These steps began in the window that is about to be compared."""
        if not len(steps):
            return
        self._steps.append((steps.started.copy(), steps.ended.copy(), steps.per_step(steps.predicted)))
        if len(self._steps) > _MANY:
            self._merge()

    def compare(self, start: int, end: int, energy: float, idle_watts: float) -> None:
        """The counter rose by `energy` microjoules between these instants (not moved by any lag).

        What is compared is the window before: the steps that began a little after its end are known by now.
        """
        before, self._window = self._window, (start, end, energy)
        self._seen += 1
        if before is None or not self._steps or (self._windows > _ENOUGH_WINDOWS and self._seen % _SELDOM):
            return
        start, end, energy = before
        predicted = self._predict(start, end, idle_watts)
        off = ((energy - predicted) / energy) ** 2
        # A window in which the lag makes no difference says nothing, and one that no lag explains is an outlier.
        if np.ptp(predicted) > 0.02 * energy and off.min() < 0.25:
            self._errors = self._errors * _KEPT + np.minimum(off, 1.0)
            self._windows += 1
            self._since_move += 1
            self._move()

    def _predict(self, start: int, end: int, idle_watts: float) -> Floats:
        started, ended, joules = self._merge()
        near = (ended > start - LAGS[-1]) & (started < end - LAGS[0])
        started, ended, joules = started[near], ended[near], joules[near]
        begin, finish = (start - LAGS)[:, None], (end - LAGS)[:, None]
        overlap = np.maximum(np.minimum(ended, finish) - np.maximum(started, begin), 0)
        busy = np.minimum(overlap.sum(axis=1), end - start)
        predicted: Floats = overlap @ (joules / (ended - started)) + idle_watts * (end - start - busy) / 1e3
        return predicted

    def _merge(self) -> tuple[Ints, Ints, Floats]:
        """All steps of the last seconds in one piece."""
        started, ended, joules = (np.concatenate(column) for column in zip(*self._steps, strict=True))
        recent = ended > ended.max() - _KEPT_NANOSECONDS
        merged = started[recent], ended[recent], joules[recent]
        self._steps = [merged]
        return merged

    def _move(self) -> None:
        if self._windows < _FEWEST_WINDOWS or self._since_move < _PATIENCE:
            return
        best = int(self._errors.argmin())
        if self._errors[best] < (1 - _CLEARLY) * self._errors[self._notch]:
            self._notch += 1 if best > self._notch else -1
            self._since_move = 0
