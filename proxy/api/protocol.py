"""HTTP/1.1 as uvicorn speaks it over httptools, with what it leaves open: bounded heads, and clients that pipeline.

A head may have so many bytes and take so many seconds; uvicorn bounds neither. And where a client has sent its next
request already, uvicorn tells only that one of the client's leaving: the request under way would work for nobody.
"""

import asyncio
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from proxy.errors import ApiError, InvalidRequest

HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
#: With more requests in advance than these, a connection is not read from until they are answered.
_PIPELINED = 8

_REASONS = {408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class Protocol(HttpToolsProtocol):
    """One connection."""

    head_seconds = HEAD_SECONDS

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._under_way: deque[RequestResponseCycle] = deque()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as its base does
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._in_head:
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES:
            self._refuse(InvalidRequest(f"The head of a request may have {HEAD_BYTES} bytes.", status=431))
        elif self._head_timer is None:
            self._start_timer()

    def on_message_begin(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()
        while self._under_way and self._under_way[0].response_complete:
            self._under_way.popleft()
        self._under_way.append(self.cycle)
        if 0 < len(self.pipeline) <= _PIPELINED:
            self.flow.resume_reading()  # else nobody would see the client leave

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        for cycle in self._under_way:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._too_slow)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._refuse(InvalidRequest(f"No request's head arrived within {self.head_seconds:g} s.", status=408))

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless an answer to an earlier request is under way, and hang up."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            body = error.encode()
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
                % (error.status, _REASONS[error.status], len(body), body)
            )
        self.transport.close()
