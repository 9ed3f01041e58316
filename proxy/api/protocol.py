"""HTTP/1.1 as uvicorn speaks it over httptools, with what it leaves open, and the relay's way past ASGI.

What is added: requests of models go to the relay without an ASGI scope, its messages and the task that would wait for
the client to leave. And for clients that are not as they should be:

- Heads and bodies are bounded in bytes and seconds, and so are what is no body after a head (chunk extensions,
  trailers) and what a client goes on to send after its answer.
- Trailers are dropped: uvicorn adds them to the headers, where they would speak for the request.
- A target is a path: absolute URLs name hosts that nobody has checked.
- An `Upgrade` is declined, and the request answered. uvicorn loses its body: Java's client asks for HTTP/2 so.
- Where a client has sent its next request already, uvicorn tells only that one of the client's leaving: the request
  under way would work for nobody.
"""

import asyncio
import time
from collections import deque
from typing import Any, Final

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from proxy.api.edge import Edge
from proxy.errors import ApiError, BodyTooLarge, InvalidRequest
from proxy.relay.call import Headers, Inbound, read_headers
from proxy.relay.relay import Relay
from proxy.relay.reply import JSON_LINES, Lines, Reply, Source, status_line

HEAD_BYTES = 64 * 1024
HEAD_SECONDS = 30.0
BODY_SECONDS = 60.0
#: How long a client may go on sending a body whose request is answered already; then it has seen the answer.
LINGER_SECONDS = 10.0
#: How long a client may not read what is left of its last answer. A slow one's system takes it in large pieces.
UNREAD_SECONDS = 300.0
#: With more requests in advance than these, a connection is not read from until they are answered.
_PIPELINED = 8
#: A body in more pieces than these is put together now and then: small pieces take far more memory than what they hold.
_PIECES = 1024
#: So much of a body that is not wanted any more is read and thrown away, for the client to see the answer.
_DISCARDED = 1024 * 1024
_VERSIONS = frozenset({"1.0", "1.1"})
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


class _Nowhere(list[tuple[bytes, bytes]]):
    """Where trailers go."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        return None


_NOWHERE: Final = _Nowhere()


class Protocol(HttpToolsProtocol):
    """One connection."""

    cycle: Any  # uvicorn's or ours: the request that came last
    pipeline: deque[Any]
    head_seconds = HEAD_SECONDS
    body_seconds = BODY_SECONDS
    linger_seconds = LINGER_SECONDS
    unread_seconds = UNREAD_SECONDS

    def __init__(self, *args: Any, edge: Edge, **options: Any) -> None:
        super().__init__(*args, **options)
        self._edge = edge
        self._in_head = True
        self._in_body = False
        self._loose_bytes = 0  # since the last piece of a body: heads, trailers, chunk extensions
        self._head: list[tuple[bytes, bytes]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._under_way: deque[RequestResponseCycle | RelayCycle] = deque()
        self._idle_since: float | None = None
        self._unread = 0  # bytes that the client had not taken
        self._unread_since = 0.0

    def close_if_idle(self, now: float) -> None:
        """Hang up if no request has come for too long (monotonic seconds), or the client does not read.

        In place of a timer for each answer.
        """
        since = None if self._in_head or self._in_body else self._idle_since
        unread = self.transport.get_write_buffer_size()
        if unread:
            self._look_at_unread(unread, now)
        elif since is not None and now - since >= self.timeout_keep_alive:
            self.timeout_keep_alive_handler()

    def _look_at_unread(self, unread: int, now: float) -> None:
        """Break off where all has been answered and the client takes nothing of it: to close is to wait for it."""
        if unread != self._unread or not (self.transport.is_closing() or self._has_answered()):
            self._unread, self._unread_since = unread, now
        elif now - self._unread_since >= self.unread_seconds:
            self.transport.abort()

    def _has_answered(self) -> bool:
        """Whether nothing is under way but requests that wait for the client to read."""
        waiting = [cycle for cycle, _ in self.pipeline]
        return all(cycle.response_complete or cycle in waiting for cycle in self._under_way)

    def on_response_complete(self) -> None:
        """As uvicorn's, but for its timer."""
        self.server_state.total_requests += 1
        if not self.pipeline:
            self._idle_since = time.monotonic()
        if self.transport.is_closing():
            return
        if self.pipeline:
            self.loop.call_soon(self._start_next)  # not within: refusals of many would be one within the other
        else:
            self._read_on()
        if self._in_body and self.cycle.response_complete:
            self._start_timer(self.linger_seconds, self.transport.close)

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as its base does
        super().connection_made(transport)
        self._start_timer(self.head_seconds, self._too_slow)

    def data_received(self, data: bytes) -> None:
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
        elif self._in_head:
            if self._timer is None:
                self._start_timer(self.head_seconds, self._too_slow)
        elif self._timer is None and isinstance(self.cycle, RelayCycle) and self.cycle.more_body:
            self._start_timer(self.body_seconds, self._body_too_slow)

    # the parser's callbacks

    def on_message_begin(self) -> None:
        """As uvicorn's, but for the scope, which only the pages need."""
        self._in_head = True
        self._loose_bytes = 0
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._idle_since = None
        self._unread = 0
        self._stop_timer()
        if not self.url.startswith(b"/") or self.parser.get_http_version() not in _VERSIONS:
            raise _no_request()
        self._in_body = True
        self._head = self.headers
        found = self._edge.find(self.url) if self.parser.get_method() == b"POST" else None
        if found is None:
            self._begin_page()
        else:
            self._begin_relay(*found)
        self.headers = _NOWHERE
        under_way = self._under_way
        while under_way and under_way[0].response_complete:
            under_way.popleft()
        under_way.append(self.cycle)
        if self.flow.write_paused:
            self.flow.pause_reading()  # it does not read the answers that it has
        elif 0 < len(self.pipeline) <= _PIPELINED:
            self.flow.resume_reading()  # else nobody would see the client leave

    def on_body(self, body: bytes) -> None:
        self._loose_bytes = 0
        cycle = self.cycle
        if isinstance(cycle, RelayCycle):
            cycle.body_came(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # so the parser believes
        self._in_body = False
        self._stop_timer()
        cycle = self.cycle
        if cycle.response_complete:
            self._idle_since = time.monotonic()
        if isinstance(cycle, RelayCycle):
            cycle.body_ended()
        else:
            super().on_message_complete()

    # asyncio's callbacks

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        for cycle in self._under_way:
            if not cycle.response_complete:
                cycle.disconnected = True
                if cycle is not self.cycle:  # uvicorn tells that one
                    cycle.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        for cycle in self._under_way:
            if isinstance(cycle, RelayCycle):
                cycle.pause()

    def resume_writing(self) -> None:
        super().resume_writing()
        for cycle in self._under_way:
            if isinstance(cycle, RelayCycle):
                cycle.resume()
        self._read_on()
        self._start_next()

    # within

    def _begin_page(self) -> None:
        """Hand a request to uvicorn, with what its own `on_message_begin` would have prepared."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)
        super().on_headers_complete()

    def _begin_relay(self, relay: Relay, model: str | None) -> None:
        """As uvicorn's `on_headers_complete`."""
        before = self.cycle
        cycle = self.cycle = RelayCycle(self, self._edge, relay, model)
        if self.transport.is_closing():
            return  # an earlier one was the last: this is nobody's
        if before is None or before.response_complete:
            cycle.start()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _read_on(self) -> None:
        """Read what the client sends, unless it has sent enough or does not read itself."""
        if len(self.pipeline) <= _PIPELINED and not self.flow.write_paused:
            self.flow.resume_reading()

    def _start_next(self) -> None:
        """Start the request that waits, if it is its turn and the client reads."""
        if not self.pipeline or self.flow.write_paused or self.transport.is_closing():
            return
        cycle, app = self.pipeline[-1]
        if next((due for due in self._under_way if not due.response_complete), None) is cycle:
            self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            self._read_on()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, RelayCycle):
            cycle.start()
        else:
            super()._start_asgi_task(cycle, app)

    def _decline_upgrade(self, rest: bytes) -> None:
        """Go on in HTTP/1.1 to this request's end: its body follows, though the parser will not read it."""
        self.cycle.keep_alive = False
        framing = [b"%b: %b\r\n" % field for field in self._head if field[0] in _FRAMING]
        self.parser = httptools.HttpRequestParser(_Rest(self))
        self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing))
        try:
            self.parser.feed_data(rest)
        except httptools.HttpParserUpgrade:
            return  # of a later request: this one is the last that is heard
        except httptools.HttpParserError:
            self._refuse(_no_request())

    def _start_timer(self, seconds: float, ring: Any) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, ring)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._refuse(InvalidRequest(f"No request's head arrived within {self.head_seconds:g} s.", status=408))

    def _body_too_slow(self) -> None:
        if isinstance(self.cycle, RelayCycle) and self._has_turn() and not self.cycle.response_complete:
            message = f"The request body did not arrive within {self.body_seconds:.0f} s."
            self.cycle.refuse(InvalidRequest(message, status=408, code="request_timeout"))
        self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless an answer to this or an earlier request is under way, and hang up."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        if self._may_answer():
            body = error.encode()
            length = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
            self.transport.write(status_line(error.status) + JSON_LINES + length + body)
        self.transport.close()

    def _has_turn(self) -> bool:
        """Whether all requests before the last one are answered."""
        return all(earlier.response_complete for earlier in self._under_way if earlier is not self.cycle)

    def _may_answer(self) -> bool:
        """Whether it is the client's turn to hear of the request that is coming in."""
        cycle = self.cycle
        if not self._has_turn():
            return False
        if cycle is None or cycle.response_complete:
            return True
        if not self._in_body or cycle.response_started:
            return False
        cycle.disconnected = True  # nobody else answers it
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


class RelayCycle:
    """A request for the relay and its answer: what uvicorn's `RequestResponseCycle` is to a page, and the relay's wire.

    It starts when it is its turn on the connection, and is handed to the relay once its body has come.
    """

    __slots__ = (
        "_body", "_edge", "_expects", "_headers", "_key", "_model", "_protocol", "_raw", "_relay", "_reply", "_size",
        "_source", "_started", "_task", "chunked", "disconnected", "keep_alive", "more_body", "response_complete",
    )  # fmt: skip

    def __init__(self, protocol: Protocol, edge: Edge, relay: Relay, model: str | None) -> None:
        parser = protocol.parser
        self._protocol = protocol
        self._edge = edge
        self._relay = relay
        self._model = model
        self._raw = protocol.headers
        self._expects = protocol.expect_100_continue
        self._headers: Headers | None = None
        self._key: str | None = None
        self._body: list[bytes | bytearray] = []
        self._size = 0
        self._started = False
        self._source: Source | None = None
        self._task: asyncio.Task[None] | None = None
        self._reply: Reply | None = relay.reply(self)
        """Let go of when it has been given: each holds the other, which only the garbage collector would undo."""
        self.chunked = parser.get_http_version() != "1.0"
        self.keep_alive = self.chunked and parser.should_keep_alive() and not parser.should_upgrade()
        self.more_body = True
        # what uvicorn asks of a cycle
        self.response_complete = False
        self.disconnected = False

    @property
    def response_started(self) -> bool:
        """Whether anything of an answer has gone out."""
        return self._reply is None or self._reply.status != 0

    # what uvicorn and the connection tell

    @property
    def message_event(self) -> "RelayCycle":
        """Uvicorn sets a cycle's event when the client has left."""
        return self

    def set(self) -> None:
        if not self.disconnected or self.response_complete:
            return
        if self._task is not None:
            self._task.cancel()
        elif self._started:
            self._relay.gone()

    def start(self) -> None:
        """Its turn has come: admit it, and ask for its body if the client waits to be asked."""
        self._started = True
        try:
            self._admit()
        except ApiError as error:
            self.refuse(error)
            return
        if not self.more_body:
            self._run()
        elif self._expects:
            self._expects = False
            self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def body_came(self, data: bytes) -> None:
        self._size += len(data)
        limit = self._relay.max_body_bytes
        if self.response_complete:
            if self._size > limit + _DISCARDED:
                self._protocol.transport.close()
        elif self._size <= limit:
            self._body.append(data)
            if len(self._body) > _PIECES:
                self._put_together()
        elif self._started:
            self.refuse(BodyTooLarge(limit))

    def body_ended(self) -> None:
        self.more_body = False
        if self._started and not self.response_complete:
            self._run()

    def pause(self) -> None:
        if self._source is not None:
            self._source.pause()

    def resume(self) -> None:
        if self._source is not None:
            self._source.resume()

    # what the relay asks of a wire

    @property
    def left(self) -> bool:
        return self.disconnected

    @property
    def preamble(self) -> Lines:
        lines = b"".join(b"%b: %b\r\n" % header for header in self._protocol.server_state.default_headers)
        return lines if self.keep_alive else lines + b"connection: close\r\n"

    def write(self, data: bytes) -> None:
        if not self.disconnected:
            self._protocol.transport.write(data)

    def done(self) -> None:
        self.response_complete = True
        self._source = self._reply = None
        if not self.keep_alive:
            self._protocol.transport.close()
        self._protocol.on_response_complete()

    def throttle(self, source: Source) -> None:
        self._source = source
        if self._protocol.flow.write_paused:
            source.pause()

    def interrupt(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def break_off(self) -> None:
        self.response_complete = True
        self._protocol.transport.abort()

    # within

    def refuse(self, error: ApiError) -> None:
        """Answer with an error; what may still come of the body is not wanted."""
        self._body.clear()
        if self._expects:
            self.keep_alive = False  # nobody knows whether the client will send its body now
        assert self._reply is not None
        self._relay.refuse(self._reply, error)

    def _admit(self) -> None:
        """Raises ApiError."""
        reply = self._reply
        assert reply is not None
        headers = self._headers = read_headers(self._raw)
        reply.client_request_id = headers.client_request_id
        reply.extra += self._edge.cors_lines(headers)
        self._key = self._edge.admit(headers, "1.1" if self.chunked else "1.0").name
        self._relay.check(headers)
        if self._size > self._relay.max_body_bytes:
            raise BodyTooLarge(self._relay.max_body_bytes)

    def _put_together(self) -> None:
        first, *others = self._body
        whole = first if isinstance(first, bytearray) else bytearray(first)
        whole += b"".join(others)
        self._body = [whole]

    def _run(self) -> None:
        assert self._headers is not None
        assert self._reply is not None
        only = self._body[0] if len(self._body) == 1 else None
        body = only if isinstance(only, bytes) else b"".join(self._body)
        self._body = []
        asked = Inbound(self._headers, body, self._key, self._model)
        task = self._task = self._protocol.loop.create_task(self._relay.serve(asked, self._reply))
        task.add_done_callback(self._served)  # not within the task: what is cancelled before it begins has no end
        self._protocol.tasks.add(task)  # uvicorn waits for these when it ends

    def _served(self, task: asyncio.Task[None]) -> None:
        self._protocol.tasks.discard(task)
        self._task = self._reply = None
        if self.disconnected and task.cancelled():
            self._relay.gone()  # before its task had begun: the relay has heard nothing of it
        elif not self.response_complete and not self.disconnected:
            self.break_off()
