"""What the ledger knows of a backend: its devices, its open requests, and up to when its work is known."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from proxy.energy.events import Step
from proxy.energy.pending import Ints
from proxy.energy.quantities import Nanoseconds
from proxy.energy.registry import NEVER, Request

#: How much later than an answer, or than the time it speaks of, a report may come.
GRACE = Nanoseconds(500_000_000)
_DUPLICATES_REMEMBERED = 64
#: A backend that finished so many requests without a report is not waited for any more.
_SILENT = 3


@dataclass(slots=True)
class Backend:
    """`reported` is the end of its latest step; `relayed` says that the relay observes its requests one by one."""

    name: str
    index: int
    devices: dict[str, None] = field(default_factory=dict)  # in the order they became known
    open: dict[str, Request] = field(default_factory=dict)
    reports: int = 0
    reports_lost: int = 0
    reported: int = NEVER
    relayed: bool = False
    requests: Sequence[str] = ()  # of its latest batch, with their slots: a batch changes seldom
    slots: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    slots_version: int = -1
    _silent: Request | None = None
    _last_finish: int = NEVER
    _unheard: int = 0
    _recent: OrderedDict[tuple[int, int], Step] = field(default_factory=OrderedDict)

    def opens(self, request: Request) -> None:
        self.open[request.request] = request
        request.reports_before = (self.reports, self.reports_lost)

    def closes(self, request: Request) -> None:
        """The request is finished, settled, or another backend's."""
        if self.open.pop(request.request, None) is not None and not self.reports:
            self._unheard += 1
        if request.finished is not None:
            self._last_finish = max(self._last_finish, request.finished)

    def hears(self, step: Step) -> None:
        """A step report came in."""
        self.reports += 1
        self.reported = max(self.reported, step.ended)
        if step.source == "relay":
            self.relayed = True
            for name in step.requests:
                request = self.open.get(name)
                if request is not None and request.reported < step.ended:
                    request.reported = step.ended

    def has_heard(self, step: Step) -> bool:
        """Whether this very step was reported lately; from now on it was."""
        key = (step.started, step.ended)
        if self._recent.get(key) == step:
            return True
        self._recent[key] = step
        if len(self._recent) > _DUPLICATES_REMEMBERED:
            self._recent.popitem(last=False)
        return False

    @property
    def may_surprise(self) -> bool:
        """It is at work, and nobody knows yet where, nor whether it will ever tell."""
        return bool(self.open) and not self.devices and self._unheard < _SILENT

    def lost_ratio(self, request: Request) -> float:
        """Of the reports that were sent while a request was open, the part that was lost."""
        received, lost = self.reports - request.reports_before[0], self.reports_lost - request.reports_before[1]
        return lost / (lost + received) if lost else 0.0

    def knows_all_until(self, end: int, now: int) -> bool:
        """Whether its work is known up to the end of a window, where requests are announced."""
        working = next(iter(self.open.values()), None)
        if working is not None and working.started < end:
            return not self._is_one_silent(end) if self.relayed else self.reported >= end
        return self.reported >= end or (now >= self._last_finish + GRACE and now - GRACE >= end)

    def _is_one_silent(self, end: int) -> bool:
        """Whether an open request that began before `end` has not been observed up to it; mostly the same as before."""
        if (known := self._silent) is not None and self.open.get(known.request) is known and _is_silent(known, end):
            return True
        self._silent = next((request for request in self.open.values() if _is_silent(request, end)), None)
        return self._silent is not None


def _is_silent(request: Request, end: int) -> bool:
    return request.started < end and request.reported < end
