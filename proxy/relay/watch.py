"""Time-outs that cost a request next to nothing: whoever is under way is looked at a few times a second.

A timer of its own for each request, set and cancelled, would be dearer than reading its head.
"""

import asyncio
import logging
import time
from typing import Protocol

log = logging.getLogger("joulegate.relay")

_MOST_SECONDS = 0.25
_LEAST_SECONDS = 0.01


class Watched(Protocol):
    def look(self, now: float) -> None:
        """See whether something is overdue. `now` is monotonic seconds."""
        ...


class Watch:
    """Looks at those under way."""

    def __init__(self) -> None:
        self._every = _MOST_SECONDS
        self.under_way: set[Watched] = set()

    def keep_to(self, shortest: float) -> None:
        """From now on look so often that the `shortest` time-out is kept to a twentieth (or a quarter second)."""
        self._every = min(max(shortest / 20, _LEAST_SECONDS), _MOST_SECONDS)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            now = time.monotonic()
            for watched in list(self.under_way):
                try:
                    watched.look(now)
                except Exception:  # a defect that concerns one request must not leave the others without time-outs
                    log.exception("an error of our own in looking at a request")
