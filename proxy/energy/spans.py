"""What else happened on a device, by spans of time: other processes' use of it, and backends that were loading."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from proxy.energy.registry import FOREVER


@dataclass(frozen=True, slots=True)
class Use:
    """Parts of a device's use: `foreign` was not ours; `backends` (may be empty) were each of our backends'."""

    foreign: float
    backends: Mapping[str, float]


NO_FOREIGN_USE = Use(0.0, {})


class UseSpans:
    """Processes events as spans, each from the event before it."""

    def __init__(self) -> None:
        self._spans: deque[tuple[int, int, Use]] = deque()
        self.known_until: int | None = None

    def add(self, at: int, use: Use) -> None:
        since = self.known_until if self.known_until is not None else at - 1
        if at > since:
            self._spans.append((since, at, use))
            self.known_until = at

    def during(self, start: int, end: int) -> Use:
        """The time-weighted mean of the spans that overlap; the last known one where none does."""
        parts = [(min(end, e) - max(start, s), use) for s, e, use in self._spans if s < end and e > start]
        if not parts:
            return self._spans[-1][2] if self._spans else NO_FOREIGN_USE
        if len(parts) == 1:
            return parts[0][1]
        total = sum(length for length, _ in parts)
        names = {name for _, use in parts for name in use.backends}
        shares = {n: sum(length * use.backends.get(n, 0.0) for length, use in parts) / total for n in names}
        return Use(sum(length * use.foreign for length, use in parts) / total, shares)

    def drop_until(self, time: int) -> None:
        """Forget spans that ended by `time`, but for the last one."""
        while len(self._spans) > 1 and self._spans[0][1] <= time:
            self._spans.popleft()


class LoadingSpans:
    """When at least one backend was loading."""

    def __init__(self) -> None:
        self._since: dict[str, int] = {}
        self._ended: deque[tuple[int, int]] = deque()

    def set(self, backend: str, at: int, *, loading: bool) -> None:
        if loading:
            self._since.setdefault(backend, at)
        elif (since := self._since.pop(backend, None)) is not None and at > since:
            self._ended.append((since, at))

    def columns(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Starts and ends; a backend that is still loading has no end yet."""
        spans = [*self._ended, *((since, FOREVER) for since in self._since.values())]
        array = np.array(spans, dtype=np.int64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def drop_until(self, time: int) -> None:
        self._ended = deque(span for span in self._ended if span[1] > time)

    def __bool__(self) -> bool:
        return bool(self._since or self._ended)


def covered(starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], start: int, end: int) -> int:
    """Nanoseconds between `start` and `end` that lie in at least one of the given spans."""
    if not len(starts):
        return 0
    begin, finish = np.minimum(np.maximum(starts, start), end), np.minimum(np.maximum(ends, start), end)
    if len(begin) == 1 or (begin[1:] >= finish[:-1]).all():  # one after the other, as an engine's steps are
        return int((finish - begin).sum())
    order = np.argsort(begin, kind="stable")
    begin, finish = begin[order], np.maximum.accumulate(finish[order])
    gaps = np.maximum(begin[1:] - finish[:-1], 0)
    return int(finish[-1] - begin[0] - gaps.sum())
