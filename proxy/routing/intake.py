"""Whether the node takes requests, and how many are under way: what a drain waits for."""

import asyncio

from proxy.errors import Unavailable

_RETRY_SECONDS = 5


class Intake:
    """Every request of a model endpoint enters and leaves."""

    def __init__(self) -> None:
        self.draining = False
        self.under_way = 0
        self._empty = asyncio.Event()
        self._empty.set()

    def enter(self) -> None:
        """Raises Unavailable once the node is draining."""
        if self.draining:
            raise Unavailable("This proxy is shutting down.", code="draining", retry_after=_RETRY_SECONDS)
        self.under_way += 1
        self._empty.clear()

    def leave(self) -> None:
        self.under_way -= 1
        if not self.under_way:
            self._empty.set()

    async def drain(self, within: float) -> int:
        """Take no more, and wait until those under way are done, `within` seconds at most; how many are left."""
        self.draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), within)
        except TimeoutError:
            return self.under_way
        return 0
