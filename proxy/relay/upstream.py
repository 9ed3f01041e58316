"""The HTTP/1.1 client of the data path: httptools on asyncio's transports, one protocol per connection, no task.

Our own, because here is most of what a proxy costs (docs/performance.md has the clients that were tried): what is read
in one go is handed on in one go, an answer that is there is not waited for, and nothing is decoded.
"""

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

from proxy.errors import JoulegateError

#: Less than servers wait (uvicorn, so vLLM too: 5 s), so that none closes a connection just as it is used again.
_KEEP_ALIVE_SECONDS: Final = 4.0
_MAX_ANSWER_BYTES: Final = 512 * 1024 * 1024
_MAX_HEAD_BYTES: Final = 256 * 1024
#: With so many origins known, those without an idle connection are forgotten (a connection in use keeps its pool).
_POOLS: Final = 64
#: Bodies longer than this are not copied behind their head.
_SEPARATE_BODY: Final = 64 * 1024
#: What waits unread for a reader of pieces before the backend is made to wait.
_READ_AHEAD: Final = 256 * 1024

RawHeader = tuple[bytes, bytes]
#: Of the names of the headers that are heeded: content-type, content-length, content-encoding, transfer-encoding.
_TELLING_LENGTHS: Final = frozenset({12, 14, 16, 17})


class Unreachable(JoulegateError):
    """No answer began: the backend refused the connection, or (`lost`) closed it before a status line."""

    def __init__(self, reason: str, *, lost: bool) -> None:
        super().__init__(reason)
        self.lost = lost


class BrokeOff(JoulegateError):
    """An answer began and did not end as announced."""


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where connections lead; those to one origin are shared."""

    host: str
    port: int
    secure: bool


@dataclass(frozen=True, slots=True)
class _Target:
    """A URL taken apart: its origin, and what a request's head says of it."""

    origin: _Origin
    path: bytes
    host: bytes


@lru_cache(maxsize=1024)
def _target(url: str) -> _Target:
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    default = 443 if secure else 80
    path = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    origin = _Origin(parts.hostname or "", parts.port or default, secure)
    return _Target(origin, path.encode("ascii"), parts.netloc.rpartition("@")[2].encode("ascii"))


class Answer:
    """An answer whose head has arrived. `pump()`, `chunks()` or `whole()` once; `abort()` ends it at any time."""

    __slots__ = ("_connection", "content_encoding", "content_type", "framed", "headers", "status")

    def __init__(self, connection: "_Connection", status: int, headers: list[RawHeader]) -> None:
        self._connection = connection
        self.status = status
        self.headers = headers
        self.content_type = self.content_encoding = b""
        self.framed = False
        """Whether the head says where the body ends."""
        for name, value in headers:
            if len(name) in _TELLING_LENGTHS:
                self._note(name.lower(), value)

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"content-type":
            self.content_type = value
        elif name == b"content-encoding":
            self.content_encoding = value
        elif name in {b"content-length", b"transfer-encoding"}:
            self.framed = True

    def header(self, name: str) -> str | None:
        """`name` is in lower case."""
        wanted = name.encode()
        for key, value in self.headers:
            if len(key) == len(wanted) and key.lower() == wanted:
                return value.decode("latin-1")
        return None

    async def pump(self, take: Callable[[bytes], None]) -> None:
        """Call `take` with the body's bytes as they come, to the end; raises BrokeOff, and whatever `take` raises."""
        await self._connection.pump(take)

    @property
    def paused(self) -> bool:
        """Whether whoever takes the bytes has had enough for now."""
        return self._connection.paused

    def pause(self) -> None:
        """Read no more for now: whoever takes the bytes has enough."""
        self._connection.pause()

    def resume(self) -> None:
        self._connection.resume()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Bytes as they come, for a reader that takes its time; raises BrokeOff."""
        pieces: asyncio.Queue[bytes | None] = asyncio.Queue()
        ahead = 0

        def take(data: bytes) -> None:
            nonlocal ahead
            ahead += len(data)
            if ahead > _READ_AHEAD:
                self.pause()
            pieces.put_nowait(data)

        pumping = asyncio.ensure_future(self.pump(take))
        pumping.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                ahead -= len(piece)
                if ahead <= _READ_AHEAD:
                    self.resume()
                yield piece
            await pumping
        finally:
            pumping.cancel()
            self.abort()

    async def whole(self) -> bytes:
        """The whole body; raises BrokeOff."""
        return await self._connection.whole()

    def end(self) -> None:
        """Take what has come for all of it."""
        self._connection.end(self)

    def abort(self) -> None:
        """Done with it: a connection not read to its end is closed, which tells the backend to stop."""
        self._connection.let_go(self)


class _Connection(asyncio.Protocol):
    """One connection to a backend and the exchange under way on it, if there is one.

    httptools calls back for each part of an answer while it is fed what was read; what comes of it is handed on once
    everything read in one go has been seen.
    """

    def __init__(self, pool: "_Pool") -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[RawHeader] = []
        self._head_bytes = 0
        self.paused = False
        self._closed = False
        self._reset()
        self.idle_since = 0.0

    def _reset(self) -> None:
        self._busy = False
        self._head_seen = False
        self._complete = False
        self._lives_on = False
        self._failure: Exception | None = None
        self._answer: Answer | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._take: Callable[[bytes], None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    # what the pool and the answers ask

    @property
    def usable(self) -> bool:
        return not self._closed and self._transport is not None and not self._transport.is_closing()

    async def request(self, head: bytes, body: bytes | None) -> Answer:
        """Send a request and wait for the answer's head; raises Unreachable."""
        if self._transport is None or not self.usable:
            raise Unreachable("the backend closed the connection at once", lost=False)
        self._busy = True
        if body is None:
            self._transport.write(head)
        elif len(body) <= _SEPARATE_BODY:
            self._transport.write(head + body)
        else:
            self._transport.writelines([head, body])
        try:
            while self._answer is None:
                if self._failure is not None:
                    raise Unreachable(str(self._failure), lost=True) from self._failure
                await self._news()
        except BaseException:
            self.close()
            raise
        return self._answer

    async def whole(self) -> bytes:
        while not self._complete:
            self._check()
            await self._news()
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def pump(self, take: Callable[[bytes], None]) -> None:
        if self._parts:
            take(self._collected())
        self._take = take
        while not self._complete:
            self._check()
            await self._news()
        if self._parts:  # they came with bytes too many, or amid the parser's error over those
            take(self._collected())

    def pause(self) -> None:
        if not self.paused and self._transport is not None and not self._complete:
            self.paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self.paused and self._transport is not None:
            self.paused = False
            if not self._transport.is_closing():
                self._transport.resume_reading()

    def end(self, answer: Answer) -> None:
        """No more is wanted of an answer, if it is the one under way."""
        if self._answer is answer:
            self._complete = True
            self._wake()

    def let_go(self, answer: Answer) -> None:
        """The answer is done with: the connection is kept if its end was seen and it may be, else closed.

        It may not be where the answer came before all of the request had been sent: the rest might never be read.
        """
        if self._answer is not answer or self._transport is None:
            return
        self.resume()
        keep = self._complete and self.usable and self._lives_on and not self._transport.get_write_buffer_size()
        self._reset()
        if keep:
            self._pool.give_back(self)
        else:
            self.close()

    def close(self) -> None:
        self._closed = True
        if self._transport is not None:
            self._transport.abort()

    # asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not descend from it

    def data_received(self, data: bytes) -> None:
        if not self._busy:  # nothing was asked
            self.close()
            return
        try:
            self._parser.feed_data(data)
            if not self._head_seen:
                self._head_bytes += len(data)
                if self._head_bytes > _MAX_HEAD_BYTES:
                    raise BrokeOff(f"the head of the answer is longer than {_MAX_HEAD_BYTES} bytes")
        except Exception as error:  # of the parser: this is no HTTP
            self._fail(error)
            return
        if self._take is not None and self._parts:
            self._hand_on(self._take)
        if self._complete or self._take is None:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._pool.forget(self)
        if self._busy and not self._complete and self._failure is None:  # else it is we who closed it
            if exc is None and self._answer is not None and not self._answer.framed:
                self._complete = True  # neither a length nor chunks: the end of the connection is the end of the body
                self._wake()
            else:
                self._fail(exc or ConnectionResetError("the backend closed the connection"))

    # the parser's callbacks

    def on_message_begin(self) -> None:
        if self._complete:
            raise BrokeOff("the backend answered twice")
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._head_seen:  # else it is a trailer, which nobody asked for
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # 100 Continue and the like announce another head
            return
        self._head_seen = True
        self._head_bytes = 0
        self._answer = Answer(self, status, self._headers)

    def on_body(self, data: bytes) -> None:
        self._size += len(data)
        if self._take is None and self._size > _MAX_ANSWER_BYTES:
            raise BrokeOff(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes")
        self._parts.append(data)

    def on_message_complete(self) -> None:
        if self._head_seen:
            self._complete = True
            self._lives_on = self._parser.should_keep_alive()  # it knows only now

    # within

    def _hand_on(self, take: Callable[[bytes], None]) -> None:
        try:
            take(self._collected())
        except Exception as error:
            self._complete = False  # the last bytes or not: its taker does not have them
            self._fail(error)

    def _collected(self) -> bytes:
        parts = self._parts
        self._parts = []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _news(self) -> None:
        """Wait until something has changed."""
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            await waiter
        finally:
            if self._waiter is waiter:  # else another exchange has begun
                self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check(self) -> None:
        if self._failure is None:
            return
        known = isinstance(self._failure, (OSError, httptools.HttpParserError, BrokeOff))
        raise BrokeOff(str(self._failure) or type(self._failure).__name__) if known else self._failure

    def _fail(self, error: Exception) -> None:
        # httptools wraps what a callback raises
        cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
        self._failure = cause if isinstance(cause, Exception) else error
        self.close()
        self._wake()


class _Pool:
    """The idle connections to one origin; the one used last is used first."""

    def __init__(self, origin: _Origin, connect_seconds: float) -> None:
        self._origin = origin
        self._connect_seconds = connect_seconds
        self._ssl = ssl.create_default_context() if origin.secure else None
        self._idle: deque[_Connection] = deque()
        self._loop = asyncio.get_running_loop()
        self._sweep: asyncio.TimerHandle | None = None

    async def get(self) -> _Connection:
        """A connection; raises Unreachable if there is none to be had."""
        oldest = self._loop.time() - _KEEP_ALIVE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since >= oldest:
                return connection
            connection.close()
        return await self._connect()

    async def _connect(self) -> _Connection:
        where = self._origin
        try:
            async with asyncio.timeout(self._connect_seconds):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self), where.host, where.port, ssl=self._ssl
                )
        except TimeoutError as error:
            reason = f"{where.host}:{where.port} took no connection within {self._connect_seconds:g} s"
            raise Unreachable(reason, lost=False) from error
        except (OSError, UnicodeError) as error:
            raise Unreachable(f"{where.host}:{where.port}: {error}", lost=False) from error
        return connection

    def give_back(self, connection: _Connection) -> None:
        connection.idle_since = self._loop.time()
        self._idle.append(connection)
        if self._sweep is None:
            self._sweep = self._loop.call_later(_KEEP_ALIVE_SECONDS, self._close_the_old)

    def _close_the_old(self) -> None:
        self._sweep = None
        oldest = self._loop.time() - _KEEP_ALIVE_SECONDS
        while self._idle and self._idle[0].idle_since <= oldest:
            self._idle.popleft().close()
        if self._idle:
            self._sweep = self._loop.call_at(self._idle[0].idle_since + _KEEP_ALIVE_SECONDS, self._close_the_old)

    @property
    def holds_any(self) -> bool:
        return bool(self._idle)

    def forget(self, connection: _Connection) -> None:
        """The backend has closed it."""
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for connection in list(self._idle):
            connection.close()
        self._idle.clear()


class Upstream:
    """Connections to backends, kept alive and shared."""

    def __init__(self, *, connect_seconds: float = 5.0) -> None:
        self._connect_seconds = connect_seconds
        self._pools: dict[_Origin, _Pool] = {}

    async def post(self, url: str, body: bytes, head: bytes) -> Answer:
        """Send a request and wait for the answer's head; raises Unreachable. `head` are the header lines of it."""
        return await self._ask(_target(url), b"POST", head, body)

    async def request(self, method: str, url: str, headers: Mapping[str, str]) -> Answer:
        """A request without a body, with any method; raises Unreachable."""
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
        return await self._ask(_target(url), method.encode(), head, None)

    async def _ask(self, target: _Target, method: bytes, head: bytes, body: bytes | None) -> Answer:
        pool = self._pools.get(target.origin) or self._new_pool(target.origin)
        length = b"" if body is None else b"Content-Length: %d\r\n" % len(body)
        # Identity: what the answer says must be read, and added to.
        lines = b"%b %b HTTP/1.1\r\nHost: %b\r\nAccept-Encoding: identity\r\n%b%b\r\n" % (
            method, target.path, target.host, length, head,
        )  # fmt: skip
        connection = await pool.get()
        return await connection.request(lines, body)

    def _new_pool(self, origin: _Origin) -> _Pool:
        if len(self._pools) >= _POOLS:  # backends that were started again have left theirs behind
            self._pools = {known: pool for known, pool in self._pools.items() if pool.holds_any}
        pool = self._pools[origin] = _Pool(origin, self._connect_seconds)
        return pool

    async def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()
