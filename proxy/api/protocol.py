"""HTTP/1.1 as uvicorn speaks it over httptools, with what it leaves open.

- A head may have so many bytes and take so many seconds, and so may what is no body after it (chunk extensions,
  trailers) and what a client goes on to send after its answer; uvicorn bounds none of them.
- Trailers are dropped: uvicorn adds them to the headers, where they would speak for the request.
- A target is a path: absolute URLs name hosts that nobody has checked.
- An `Upgrade` is declined, and the request answered. uvicorn loses its body: Java's client asks for HTTP/2 so.
- Where a client has sent its next request already, uvicorn tells only that one of the client's leaving: the request
  under way would work for nobody.
"""

import asyncio
from collections import deque
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from proxy.errors import ApiError, InvalidRequest

HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
#: How long a client may go on sending a body whose request is answered already; then it has seen the answer.
LINGER_SECONDS = 10.0
#: With more requests in advance than these, a connection is not read from until they are answered.
_PIPELINED = 8

_REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}
_VERSIONS = frozenset({"1.0", "1.1"})
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class _Nowhere(list[tuple[bytes, bytes]]):
    """Where trailers go."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        return None


_NOWHERE: Final = _Nowhere()


class Protocol(HttpToolsProtocol):
    """One connection."""

    head_seconds = HEAD_SECONDS
    linger_seconds = LINGER_SECONDS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = True
        self._in_body = False
        self._loose_bytes = 0  # since the last piece of a body: heads, trailers, chunk extensions
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._under_way: deque[RequestResponseCycle] = deque()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as its base does
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._loose_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(_no_request())
            return
        if self._loose_bytes > HEAD_BYTES:
            self._refuse(InvalidRequest(f"The head of a request may have {HEAD_BYTES} bytes.", status=431))
        elif self._in_head and self._head_timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._loose_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if not self.url.startswith(b"/") or self.parser.get_http_version() not in _VERSIONS:
            raise _no_request()
        super().on_headers_complete()
        self.headers = _NOWHERE
        self._in_body = True
        while self._under_way and self._under_way[0].response_complete:
            self._under_way.popleft()
        self._under_way.append(self.cycle)
        if 0 < len(self.pipeline) <= _PIPELINED:
            self.flow.resume_reading()  # else nobody would see the client leave

    def on_body(self, body: bytes) -> None:
        self._loose_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # so the parser believes
        self._in_body = False
        self._stop_lingering()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and self.cycle.response_complete and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(self.linger_seconds, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._stop_lingering()
        for cycle in self._under_way:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on in HTTP/1.1 to this request's end: its body follows, though the parser will not read it."""
        cycle = self.cycle
        cycle.keep_alive = False
        framing = [b"%b: %b\r\n" % field for field in cycle.scope["headers"] if field[0] in _FRAMING]
        self.parser = httptools.HttpRequestParser(_Rest(self))
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing))
        try:
            self.parser.feed_data(rest)
        except httptools.HttpParserError:
            self._refuse(_no_request())

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_lingering(self) -> None:
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _too_slow(self) -> None:
        self._refuse(InvalidRequest(f"No request's head arrived within {self.head_seconds:g} s.", status=408))

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless an answer to this or an earlier request is under way, and hang up."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self._may_answer():
            body = error.encode()
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
                % (error.status, _REASONS[error.status], len(body), body)
            )
        self.transport.close()

    def _may_answer(self) -> bool:
        """Whether it is the client's turn to hear of the request that is coming in."""
        if not all(cycle.response_complete for cycle in self._under_way if cycle is not self.cycle):
            return False
        if self.cycle is None or self.cycle.response_complete:
            return True
        if not self._in_body or self.cycle.response_started:
            return False
        self.cycle.disconnected = True  # nobody else answers it
        return True


class _Rest:
    """Hears the rest of a request whose upgrade was declined: its body, and nothing after it."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol: Protocol | None = protocol

    def on_body(self, body: bytes) -> None:
        if self._protocol is not None:
            self._protocol.on_body(body)

    def on_message_complete(self) -> None:
        if self._protocol is not None:
            self._protocol.on_message_complete()
        self._protocol = None


def _no_request() -> InvalidRequest:
    return InvalidRequest("This is not a valid HTTP/1.1 request.")
