"""A stream on its way: whole events go out as they come in, and what they say of the request's work is noted."""

import time
from collections.abc import Callable

from proxy.accounting import now
from proxy.relay import sse
from proxy.relay.observe import Observation
from proxy.relay.reply import Reply
from proxy.relay.sift import Sifter


class Forwarding:
    """Takes a backend's bytes as they are read. `last` is when something was last sent on (monotonic seconds).

    `on_first` is called once, at the first event that carries data, and says who observes the stream, if anybody does.
    """

    __slots__ = ("_cutter", "_heard", "_observation", "_on_first", "_reply", "_sifter", "last")

    def __init__(self, reply: Reply, sifter: Sifter, on_first: Callable[[], Observation | None]) -> None:
        self._reply = reply
        self._sifter = sifter
        self._on_first: Callable[[], Observation | None] | None = on_first
        self._observation: Observation | None = None
        self._cutter = sse.EventCutter()
        self.last = self._heard = time.monotonic()

    def take(self, data: bytes) -> None:
        """Raises ValueError for an event that does not end."""
        at = now()
        self._heard = at / 1e9
        run = self._cutter.feed(data)
        if not run:
            return
        count = sse.count_data(run)
        if self._on_first is not None and count:
            on_first, self._on_first = self._on_first, None
            self._observation = on_first()
        if self._observation is not None:
            self._observation.events(count, at)
        self._send(self._sifter.sift(run))

    def ended_by(self, instant: float) -> bool:
        """Whether the backend had said by then (monotonic seconds) that it is done, and has said nothing since."""
        return self._heard <= instant and self._sifter.has_ended and not self._cutter.is_amid

    def finish(self) -> None:
        """The backend's last byte has come."""
        self._on_first = None
        self._send(self._sifter.sift(self._cutter.rest()))

    def keep_alive(self) -> None:
        """Show the client that the stream lives: between events, as everything is sent."""
        self._send(sse.comment(b"keep-alive"))

    def _send(self, out: bytes) -> None:
        if out:
            self.last = time.monotonic()
            self._reply.chunk(out)
