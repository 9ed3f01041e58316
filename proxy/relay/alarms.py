"""Time-outs that cost next to nothing: all of one length, so that the one set first is due first."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable


class Alarms:
    """Rings whoever has not been cleared `seconds` after it was set. One timer of the loop serves them all.

    A timer of its own for each request, set and cancelled, would be dearer than reading its head.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._due: OrderedDict[object, tuple[float, Callable[[], None]]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def set(self, whose: object, ring: Callable[[], None]) -> None:
        """Call `ring` in time, unless `whose` alarm is cleared or set again before."""
        loop = asyncio.get_running_loop()
        self._due.pop(whose, None)
        self._due[whose] = (loop.time() + self.seconds, ring)
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._ring)

    def clear(self, whose: object) -> None:
        self._due.pop(whose, None)

    def due(self, whose: object) -> float | None:
        """When (in the loop's time) an alarm will ring; None if it is not set."""
        found = self._due.get(whose)
        return None if found is None else found[0]

    def _ring(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._due:
            whose, (due, ring) = next(iter(self._due.items()))
            if due > loop.time():
                self._timer = loop.call_at(due, self._ring)
                return
            del self._due[whose]
            ring()
