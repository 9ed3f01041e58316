"""The requests that are open or wait to be settled, and the small integers ("slots") by which the arrays know them."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from proxy.energy.events import Outcome
from proxy.energy.quantities import Nanoseconds

#: The slot of work that belongs to no known request.
UNATTRIBUTED = 0
#: Times before all times and after all times.
NEVER, FOREVER = -(1 << 62), 1 << 62
_REMEMBERED = 10_000
#: The proxy itself is a backend: its work on the host, in steps that name all requests in flight. Its index is 0.
PROXY_BACKEND, PROXY_INDEX = "proxy", 0


class Columns(Protocol):
    """Something with an entry for each slot."""

    def grow(self, capacity: int) -> None: ...


class Request(msgspec.Struct, eq=False):
    """A request (or attempt) between its opening and its settlement. `rank` is the worst of its sources so far.

    `reported` is the end of its latest step, where the relay observes it.
    """

    request: str
    backend: str
    backend_index: int
    slot: int
    started: Nanoseconds
    announced: bool
    finished: Nanoseconds | None = None
    outcome: Outcome = "unfinished"
    rank: int = 0
    reported: int = NEVER
    reports_before: tuple[int, int] = (0, 0)  # of its backend when it began: received, lost


class Registry:
    """Opens and closes requests; slots are used again. Requests settled lately are remembered, a bounded number."""

    def __init__(self) -> None:
        self.open: dict[str, Request] = {}
        self.slots: dict[str, int] = {"": UNATTRIBUTED}
        self.version = 0
        """Changes when a slot does."""
        self._followers: list[Columns] = []
        self._free: list[int] = []
        self._settled: OrderedDict[str, None] = OrderedDict()
        self.capacity = 64
        self.used = 1
        self.started = np.full(self.capacity, FOREVER, dtype=np.int64)
        self.ended = np.full(self.capacity, FOREVER, dtype=np.int64)
        self.backend = np.zeros(self.capacity, dtype=np.int64)

    def settled_lately(self, request: str) -> bool:
        return request in self._settled

    def begin(self, request: str, backend: str, index: int, at: Nanoseconds, *, announced: bool) -> Request:
        slot = self._free.pop() if self._free else self._next_slot()
        opened = Request(request, backend, index, slot, at, announced)
        self.open[request], self.slots[request] = opened, slot
        self.version += 1
        self.started[slot], self.ended[slot], self.backend[slot] = at, FOREVER, index
        return opened

    def adopt(self, request: Request, backend: str, index: int) -> None:
        """The request is this backend's."""
        request.backend, request.backend_index = backend, index
        self.backend[request.slot] = index

    def finish(self, request: Request, at: Nanoseconds, outcome: Outcome) -> None:
        request.finished, request.outcome = at, outcome
        self.ended[request.slot] = at

    def forget(self, requests: Iterable[Request]) -> None:
        """The requests have settled: their slots are free, their ids remembered for a while."""
        for request in requests:
            del self.open[request.request], self.slots[request.request]
            self.started[request.slot] = FOREVER
            self._free.append(request.slot)
            self._settled[request.request] = None
            if len(self._settled) > _REMEMBERED:
                self._settled.popitem(last=False)
        self.version += 1

    def presence(self, start: int, end: int) -> npt.NDArray[np.float64]:
        """The part of the span from `start` to `end` in which each slot's request was open."""
        used = self.used
        overlap = np.minimum(self.ended[:used], end) - np.maximum(self.started[:used], start)
        present: npt.NDArray[np.float64] = np.maximum(overlap, 0) / (end - start)
        return present

    def _next_slot(self) -> int:
        slot = self.used
        self.used += 1
        if slot == self.capacity:
            self.capacity *= 2
            self.started = grown(self.started, self.capacity, FOREVER)
            self.ended = grown(self.ended, self.capacity, FOREVER)
            self.backend = grown(self.backend, self.capacity, 0)
            for columns in self._followers:
                columns.grow(self.capacity)
        return slot

    def follow(self, columns: Columns) -> None:
        """These columns, by slot, are to grow with the registry."""
        self._followers.append(columns)


def grown(column: npt.NDArray[np.int64], capacity: int, fill: int) -> npt.NDArray[np.int64]:
    longer = np.full(capacity, fill, dtype=np.int64)
    longer[: len(column)] = column
    return longer
