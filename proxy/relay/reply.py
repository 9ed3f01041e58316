"""What is sent to the client: heads with our headers, bodies, errors."""

from proxy.errors import ApiError
from proxy.relay.call import Send

RawHeaders = list[tuple[bytes, bytes]]

#: Of a backend's headers these stay behind: hop by hop, ours to set, or not its to say.
_DROPPED = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade "
    b"content-length content-encoding date server set-cookie set-cookie2 x-request-id x-client-request-id link "
    b"openai-processing-ms".split()
)
_DROPPED_BEGINNINGS = (b"x-energy", b"x-carbon", b"carbon-", b"access-control-")


def passed_back(headers: tuple[tuple[bytes, bytes], ...]) -> RawHeaders:
    """A backend's headers that the client is to see, in lower case."""
    lowered = ((name.lower(), value) for name, value in headers)
    return [(name, value) for name, value in lowered if not _stays(name)]


def _stays(name: bytes) -> bool:
    return name in _DROPPED or name.startswith(_DROPPED_BEGINNINGS)


class Reply:
    """The answer under way. `status` is 0 until its head has gone out."""

    __slots__ = ("_send", "client_request_id", "id", "status")

    def __init__(self, send: Send, id_: str) -> None:
        self._send = send
        self.id = id_
        self.client_request_id: str | None = None
        self.status = 0

    async def head(self, status: int, headers: RawHeaders) -> None:
        self.status = status
        if self.id:
            headers.append((b"x-request-id", self.id.encode()))
        if self.client_request_id is not None:
            headers.append((b"x-client-request-id", self.client_request_id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def chunk(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        await self._send({"type": "http.response.body", "body": data})

    async def whole(self, status: int, headers: RawHeaders, data: bytes) -> None:
        headers.append((b"content-length", str(len(data)).encode()))
        await self.head(status, headers)
        await self.end(data)

    async def error(self, error: ApiError, headers: RawHeaders, body: bytes | None = None) -> None:
        """`body` is the error in another envelope than OpenAI's."""
        own = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        kind = (b"content-type", b"application/json")
        await self.whole(error.status, [kind, *own, *headers], error.encode() if body is None else body)
