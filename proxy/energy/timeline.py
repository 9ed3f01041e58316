"""A device's counter as a sequence of windows: the spans between two *changes* of its reading.

A poll that sees no change extends the open span, so sampling faster than the counter ticks makes no windows of 0 J. The
change happened somewhere between the last poll that did not see it and the one that did: that is the window's `slack`.
"""

from dataclasses import dataclass

from proxy.energy.errors import EventError
from proxy.energy.events import Sample
from proxy.energy.quantities import Microjoules, Nanoseconds, Watts
from proxy.energy.registry import FOREVER
from proxy.energy.ticks import TickClock

#: Beyond this a reading is not a plausible energy or time (and would not fit 64 bits when added up).
LIMIT = 1 << 61


@dataclass(frozen=True, slots=True)
class Window:
    """`energy` was used between `start` and `end`, whose instants are known to within the slacks before them.

    The counter showed it between `ticked_start` and `ticked_end`, which is later by the meter's lag.

    A `hole` is a span whose energy no one knows (the counter was reset in it): its energy is 0, and it teaches nothing.
    """

    start: Nanoseconds
    end: Nanoseconds
    energy: Microjoules
    ticked_start: Nanoseconds
    ticked_end: Nanoseconds
    start_slack: int = 0
    end_slack: int = 0
    hole: bool = False

    @property
    def length(self) -> int:
        return self.end - self.start


class Timeline:
    """Turns samples into windows. Stale samples (not after the last one) are ignored and counted."""

    def __init__(self) -> None:
        self.counter = Microjoules(0)
        self.power: Watts | None = None
        self.last_sample_at: Nanoseconds | None = None
        self.began_at: int = FOREVER
        self.stale_samples = 0
        self._energy = Microjoules(0)
        self._changed_at = Nanoseconds(0)
        self._ticked_at = Nanoseconds(0)
        self._slack = 0
        self.lag = 0
        self._seen_unchanged = False
        self._clock = TickClock()

    @property
    def started(self) -> bool:
        return self.last_sample_at is not None

    @property
    def changed_at(self) -> Nanoseconds:
        """The end of the last window, where the open tail begins."""
        return self._changed_at

    @property
    def instant_error(self) -> float:
        """Nanoseconds by which the end of a window may be off."""
        return self._clock.error

    def add(self, sample: Sample) -> Window | None:
        """The window that this sample closes, if it does. Raises EventError for a reading that cannot be."""
        if not 0 <= sample.energy < LIMIT:
            raise EventError(f"energy of {sample.device} is out of range: {sample.energy} µJ")
        if self.last_sample_at is None:
            self._begin(sample)
            return None
        if sample.at <= self.last_sample_at:
            self.stale_samples += 1
            return None
        before, self.last_sample_at = self.last_sample_at, sample.at
        self.power = sample.power
        if sample.energy == self._energy:
            self._seen_unchanged = True
            return None
        return self._close(sample, before)

    def _begin(self, sample: Sample) -> None:
        self._energy, self._changed_at, self._ticked_at = sample.energy, sample.at, sample.at
        self.last_sample_at, self.power, self.began_at = sample.at, sample.power, sample.at

    def _close(self, sample: Sample, before: Nanoseconds) -> Window:
        ticked = Nanoseconds(self._clock.changed(before, sample.at, resolved=self._seen_unchanged))
        end, slack = max(Nanoseconds(ticked - self.lag), Nanoseconds(self._changed_at + 1)), sample.at - before
        rise = Microjoules(max(sample.energy - self._energy, 0))  # a drop is a new epoch: nobody knows what it hid
        hole = sample.energy < self._energy
        window = Window(self._changed_at, end, rise, self._ticked_at, ticked, self._slack, slack, hole)
        self._ticked_at = ticked
        self.counter = Microjoules(self.counter + rise)
        self._energy, self._changed_at, self._slack = sample.energy, end, slack
        self._seen_unchanged = False
        return window
