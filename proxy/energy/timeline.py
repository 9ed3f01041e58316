"""A device's counter as a sequence of windows: the spans between two *changes* of its reading.

A poll that sees no change extends the open span, so sampling faster than the counter ticks makes no windows of 0 J. The
change happened somewhere between the last poll that did not see it and the one that did: that is the window's `slack`.
"""

from dataclasses import dataclass

from proxy.energy.errors import EventError
from proxy.energy.events import Sample
from proxy.energy.quantities import Microjoules, Nanoseconds, Watts

#: Beyond this a reading is not a plausible energy or time (and would not fit 64 bits when added up).
LIMIT = 1 << 61


@dataclass(frozen=True, slots=True)
class Window:
    """`energy` was used between `start` and `end`, whose instants are known to within the slacks before them.

    A `hole` is a span whose energy no one knows (the counter was reset in it): its energy is 0, and it teaches nothing.
    """

    start: Nanoseconds
    end: Nanoseconds
    energy: Microjoules
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
        self.stale_samples = 0
        self._energy = Microjoules(0)
        self._changed_at = Nanoseconds(0)
        self._slack = 0

    @property
    def started(self) -> bool:
        return self.last_sample_at is not None

    @property
    def changed_at(self) -> Nanoseconds:
        """The end of the last window, where the open tail begins."""
        return self._changed_at

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
        slack = sample.at - self.last_sample_at
        self.last_sample_at = sample.at
        self.power = sample.power
        return None if sample.energy == self._energy else self._close(sample, slack)

    def _begin(self, sample: Sample) -> None:
        self._energy, self._changed_at = sample.energy, sample.at
        self.last_sample_at, self.power = sample.at, sample.power

    def _close(self, sample: Sample, slack: int) -> Window:
        rise = Microjoules(max(sample.energy - self._energy, 0))  # a drop is a new epoch: nobody knows what it hid
        hole = sample.energy < self._energy
        # A poll that follows another change directly says nothing of when, between the two, the counter moved.
        window = Window(self._changed_at, sample.at, rise, self._slack, slack, hole)
        self.counter = Microjoules(self.counter + rise)
        self._energy, self._changed_at, self._slack = sample.energy, sample.at, slack
        return window
