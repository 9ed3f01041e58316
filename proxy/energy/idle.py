"""Idle power, from windows in which provably nothing ran; and how idle the last hour was."""

from collections import deque

_FORGET_SECONDS = 120.0
_MINUTE = 60_000_000_000
_HOUR_MINUTES = 60
_LEAST_BUSY_SECONDS = 60.0
_RATIO_EVERY = 1_000_000_000


class IdlePower:
    """The mean power of idle windows, the older ones forgotten. None until there was one: never "the minimum seen"."""

    def __init__(self) -> None:
        self.watts: float | None = None
        self._seconds = 0.0

    def expect(self, watts: float) -> None:
        """Begin with this; the first idle windows outweigh it."""
        if self.watts is None:
            self.watts, self._seconds = watts, 0.5

    def learn(self, energy: float, length: int) -> None:
        """An idle window used `energy` microjoules in `length` nanoseconds."""
        self._seconds = min(self._seconds + length / 1e9, _FORGET_SECONDS)
        watts = energy / length * 1000
        old = watts if self.watts is None else self.watts
        self.watts = old + (watts - old) * min(1.0, length / 1e9 / self._seconds)


class LastHour:
    """Idle against active energy of the last hour, by the minute."""

    def __init__(self) -> None:
        self._minutes: deque[list[float]] = deque()  # minute, idle µJ, active µJ, busy seconds
        self._ratio: float | None = None
        self._ratio_at = -(1 << 62)

    def add(self, at: int, idle: float, active: float, busy: int) -> None:
        minute = at // _MINUTE
        if not self._minutes or self._minutes[-1][0] != minute:
            self._minutes.append([minute, 0.0, 0.0, 0.0])
        while self._minutes[0][0] <= minute - _HOUR_MINUTES:
            self._minutes.popleft()
        last = self._minutes[-1]
        last[1] += idle
        last[2] += active
        last[3] += busy / 1e9

        if at - self._ratio_at >= _RATIO_EVERY:
            self._ratio, self._ratio_at = self._current_ratio(), at

    def idle_ratio(self) -> float | None:
        """Idle energy over active energy, not older than a second; None below 60 s of busy time."""
        return self._ratio

    def _current_ratio(self) -> float | None:
        _, idle, active, busy = (sum(column) for column in zip(*self._minutes, strict=True))
        return idle / active if busy >= _LEAST_BUSY_SECONDS and active > 0 else None
