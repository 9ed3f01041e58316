"""The one seam to the HTTP client of the data path (aiohttp: the reason, with figures, is in docs/decisions.md)."""

from collections.abc import AsyncIterator, Mapping
from typing import Final

import aiohttp
from yarl import URL

from proxy.errors import JoulegateError

#: Less than servers wait (uvicorn, so vLLM too: 5 s), so that none closes a connection just as it is used again.
_KEEP_ALIVE_SECONDS: Final = 4.0
_MAX_ANSWER_BYTES: Final = 512 * 1024 * 1024


class Unreachable(JoulegateError):
    """No answer began: the backend refused the connection, or (`lost`) closed it before a status line."""

    def __init__(self, reason: str, *, lost: bool) -> None:
        super().__init__(reason)
        self.lost = lost


class BrokeOff(JoulegateError):
    """An answer began and did not end as announced."""


class Answer:
    """An answer whose head has arrived. `chunks()` or `whole()` once; `abort()` ends it at any time."""

    __slots__ = ("_response", "content_type", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status
        self.content_type = response.headers.get("Content-Type", "")

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        return self._response.raw_headers

    def header(self, name: str) -> str | None:
        return self._response.headers.get(name)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Bytes as they come; raises BrokeOff."""
        content = self._response.content
        try:
            while data := await content.readany():
                yield data
        except (aiohttp.ClientError, OSError) as error:
            raise BrokeOff(str(error) or type(error).__name__) from error

    async def whole(self) -> bytes:
        """The whole body; raises BrokeOff."""
        parts: list[bytes] = []
        size = 0
        async for data in self.chunks():
            size += len(data)
            if size > _MAX_ANSWER_BYTES:
                self.abort()
                raise BrokeOff(f"the answer is longer than {_MAX_ANSWER_BYTES} bytes")
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def abort(self) -> None:
        """Done with it: a connection not read to its end is closed, which tells the backend to stop."""
        self._response.close()


class Upstream:
    """Connections to backends, kept alive and shared."""

    def __init__(self, *, connect_seconds: float = 5.0) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            headers={"Accept-Encoding": "identity"},  # what it says must be read and added to
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_seconds),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept"),
            read_bufsize=256 * 1024,
        )

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Answer:
        """Send a request and wait for the answer's head; raises Unreachable."""
        return await self.request("POST", url, headers, body)

    async def request(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None = None) -> Answer:
        """As `post`, with any method."""
        target = URL(url, encoded=True)
        try:
            return Answer(
                await self._session.request(method, target, data=body, headers=headers, allow_redirects=False)
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            lost = not isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError))
            raise Unreachable(str(error) or type(error).__name__, lost=lost) from error

    async def close(self) -> None:
        await self._session.close()
