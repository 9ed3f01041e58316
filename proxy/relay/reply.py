"""What is sent to the client, as HTTP/1.1: heads with our headers, bodies, errors, in as few pieces as can be."""

from collections.abc import Collection, Iterable
from http import HTTPStatus
from typing import Protocol

from proxy.errors import ApiError

#: Header lines as they are sent, each with its line break.
Lines = bytes

#: Of a backend's headers these stay behind: hop by hop, ours to set, or not its to say.
_DROPPED = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "
    b"content-length content-encoding date server set-cookie set-cookie2 x-request-id x-client-request-id link "
    b"request-id openai-processing-ms".split()
)
_DROPPED_BEGINNINGS = (b"x-energy", b"x-carbon", b"carbon-", b"access-control-")
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %b\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
#: Answers with these have no body, nor say how long it is.
BODILESS = frozenset({204, 304})
#: Longer bodies are not copied behind their head.
_SEPARATE_BODY = 64 * 1024

JSON_LINES: Lines = b"content-type: application/json\r\n"


class Wire(Protocol):
    """The client's connection for the length of one answer. `chunked`: it knows chunks (HTTP/1.1)."""

    @property
    def chunked(self) -> bool: ...
    @property
    def preamble(self) -> Lines:
        """What every head says: the date, and whether the connection ends with this answer."""
        ...

    @property
    def left(self) -> bool:
        """Whether the client has gone."""
        ...

    def write(self, data: bytes) -> None: ...
    def done(self) -> None:
        """The answer is whole."""
        ...

    def throttle(self, source: "Source") -> None:
        """Let this source wait from now on while the client is slower than it."""
        ...

    def interrupt(self) -> None:
        """Cancel whoever answers."""
        ...

    def break_off(self) -> None:
        """Close the connection: the answer will not become whole."""
        ...


class Source(Protocol):
    """Where an answer's bytes come from."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


def status_line(status: int) -> bytes:
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def stays_behind(name: bytes) -> bool:
    """Whether the client is not to see a backend's header of this name (in lower case)."""
    return name in _DROPPED or name.startswith(_DROPPED_BEGINNINGS)


_passed_names: dict[bytes, bytes | None] = {}


def _passed_name(name: bytes) -> bytes | None:
    """The name in lower case with its colon; None if it stays behind. Backends say the same few ever again."""
    lowered = name.lower()
    passed = None if stays_behind(lowered) else lowered + b": "
    if len(_passed_names) < 1000:
        _passed_names[name] = passed
    return passed


def passed_back(headers: Iterable[tuple[bytes, bytes]], *, but: Collection[bytes] = ()) -> Lines:
    """A backend's headers that the client is to see, but for some (in lower case)."""
    lines = b""
    for name, value in headers:
        passed = _passed_names[name] if name in _passed_names else _passed_name(name)
        if passed is not None and not (but and passed[:-2] in but):
            lines += passed + value + b"\r\n"
    return lines


def processing(seconds: float) -> Lines:
    """How long it took, as OpenAI says it."""
    return b"openai-processing-ms: %d\r\n" % max(1, round(seconds * 1000))


class Reply:
    """The answer under way. `status` is 0 until its head has gone out; `extra` goes into its head as well."""

    __slots__ = ("_wire", "client_request_id", "extra", "id", "status")

    def __init__(self, wire: Wire, id_: str) -> None:
        self._wire = wire
        self.id = id_
        self.client_request_id: bytes | None = None
        self.extra: Lines = b""
        self.status = 0

    @property
    def client_left(self) -> bool:
        return self._wire.left

    def interrupt(self) -> None:
        """Cancel the task that this answer is the work of."""
        self._wire.interrupt()

    def throttle(self, source: Source) -> None:
        """Let the source of a stream wait while the client is slower."""
        self._wire.throttle(source)

    def break_off(self) -> None:
        """The client must not take what it has for the whole answer."""
        self._wire.break_off()

    def stream(self, status: int, lines: Lines) -> None:
        """The head of an answer whose length nobody knows."""
        framing = b"transfer-encoding: chunked\r\n" if self._wire.chunked else b""
        self._wire.write(self._head(status, lines, framing))

    def chunk(self, data: bytes) -> None:
        self._wire.write(b"%x\r\n%b\r\n" % (len(data), data) if self._wire.chunked else data)

    def end(self, data: bytes = b"") -> None:
        """The last bytes of a stream."""
        if self._wire.chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        self._wire.write(data)
        self._wire.done()

    def whole(self, status: int, lines: Lines, body: bytes) -> None:
        framing = b"" if status in BODILESS else b"content-length: %d\r\n" % len(body)
        head = self._head(status, lines, framing)
        if status in BODILESS:
            self._wire.write(head)
        elif len(body) <= _SEPARATE_BODY:
            self._wire.write(head + body)
        else:
            self._wire.write(head)
            self._wire.write(body)
        self._wire.done()

    def error(self, error: ApiError, lines: Lines, body: bytes) -> None:
        """`body` is the error in the envelope of the API that was called."""
        own = "".join(f"{name.lower()}: {value}\r\n" for name, value in error.headers.items()).encode("latin-1")
        self.whole(error.status, JSON_LINES + own + lines, body)

    def _head(self, status: int, lines: Lines, framing: Lines) -> bytes:
        self.status = status
        theirs = b"" if self.client_request_id is None else b"x-client-request-id: %b\r\n" % self.client_request_id
        return b"%b%b%bx-request-id: %b\r\n%b%b%b\r\n" % (
            status_line(status), self._wire.preamble, lines, self.id.encode(), theirs, self.extra, framing,
        )  # fmt: skip
