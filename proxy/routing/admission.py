"""How many requests of a model run at once, how many wait, and whom it is whose turn.

`Admission` decides, purely; `Gate` lets requests wait for what it decides.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Literal, TypeVar

from proxy.errors import Overloaded

Decision = Literal["go", "wait", "full"]
Who = TypeVar("Who", bound=Hashable)

_LONGEST_RETRY_SECONDS = 60


class Admission(Generic[Who]):
    """First come, first served. No `max_in_flight`: everybody may go at once."""

    def __init__(self, max_in_flight: int | None, max_queue: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_queue = max_queue
        self._waiting: OrderedDict[Who, None] = OrderedDict()
        self._mean_seconds = 1.0
        self.in_flight = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def places(self) -> int | None:
        """How many can be in at a time, those who wait among them; None for any number."""
        return None if self._max_in_flight is None else self._max_in_flight + self._max_queue

    @property
    def has_room(self) -> bool:
        return self._max_in_flight is None or self.in_flight < self._max_in_flight

    def arrive(self, who: Who) -> Decision:
        """One that may `go` is in flight, one that is to `wait` stands in the queue, one for whom it is `full` left."""
        if self.has_room:
            self.in_flight += 1
            return "go"
        if len(self._waiting) >= self._max_queue:
            return "full"
        self._waiting[who] = None
        return "wait"

    def leave(self, seconds: float) -> Who | None:
        """One is done, after so many seconds in flight; the one that takes its place, if somebody waits."""
        self._mean_seconds += 0.1 * (seconds - self._mean_seconds)
        self.in_flight -= 1
        return self._next()

    def limit(self, max_in_flight: int | None, max_queue: int) -> list[Who]:
        """Other limits from now on; those who need not wait any longer. Nobody is sent away who is in already."""
        self._max_in_flight, self._max_queue = max_in_flight, max_queue
        return list(iter(self._next, None))

    def _next(self) -> Who | None:
        """The first who waits, if there is room."""
        if not self._waiting or not self.has_room:
            return None
        self.in_flight += 1
        return self._waiting.popitem(last=False)[0]

    def give_up(self, who: Who) -> None:
        """One does not wait any longer."""
        self._waiting.pop(who, None)

    @property
    def retry_after(self) -> int:
        """Whole seconds in which the queue will have been served, by the time requests took lately."""
        seconds = self._mean_seconds * (len(self._waiting) + 1) / (self._max_in_flight or 1)
        return max(1, min(_LONGEST_RETRY_SECONDS, math.ceil(seconds)))


class Gate:
    """The way in to one model: `enter`, then `leave` once with what `enter` returned."""

    def __init__(self, model: str, max_in_flight: int | None, max_queue: int) -> None:
        self._model = model
        self._admission: Admission[asyncio.Future[None]] = Admission(max_in_flight, max_queue)

    @property
    def waiting(self) -> int:
        return self._admission.waiting

    @property
    def inside(self) -> int:
        """Those in flight and those who wait."""
        return self._admission.in_flight + self._admission.waiting

    def rates(self) -> dict[str, str]:
        """OpenAI's rate limit headers, for a model that takes so many requests at a time and lets so many wait."""
        places = self._admission.places
        if places is None:
            return {}
        left = max(0, places - self.inside)
        return {
            "x-ratelimit-limit-requests": str(places),
            "x-ratelimit-remaining-requests": str(left),
            "x-ratelimit-reset-requests": f"{0 if left else self._admission.retry_after}s",
        }

    def limit(self, max_in_flight: int | None, max_queue: int) -> None:
        """Other limits, for those who wait as well."""
        for turn in self._admission.limit(max_in_flight, max_queue):
            turn.set_result(None)

    def enter_at_once(self) -> float | None:
        """The time of entry, if one need not wait."""
        if not self._admission.has_room:
            return None
        self._admission.in_flight += 1
        return time.monotonic()

    async def enter(self) -> float:
        """Wait for one's turn; raises Overloaded at once when the queue is full. Returns the time of entry."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        decision = self._admission.arrive(turn)
        if decision == "full":
            raise Overloaded(self._model, self._admission.retry_after, self.rates())
        if decision == "wait":
            await self._wait(turn)
        return time.monotonic()

    def leave(self, entered: float) -> None:
        following = self._admission.leave(time.monotonic() - entered)
        if following is not None:
            following.set_result(None)

    async def _wait(self, turn: "asyncio.Future[None]") -> None:
        try:
            await asyncio.shield(turn)  # cancelled by nobody but us: its turn may come in the very same moment
        except asyncio.CancelledError:
            if turn.done():
                self.leave(time.monotonic())
            self._admission.give_up(turn)
            raise
