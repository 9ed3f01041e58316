"""The edge: what every request passes first, be it for the relay or for a page.

It refuses names a browser could be tricked into using (DNS rebinding), foreign origins and unknown keys, and knows
which requests are for the relay. As an ASGI application it stands around the pages and turns whatever goes wrong
unforeseen into a well-formed error.
"""

import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import unquote, urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.api.auth import Authenticator, Caller
from proxy.errors import ApiError, Forbidden, InvalidRequest
from proxy.relay.call import Headers, read_headers
from proxy.relay.ids import new_id
from proxy.relay.relay import Relay

log = logging.getLogger("joulegate.api")

_HUB = "/models/"
#: What a probe or a scraper may read without a key; `/metrics` has a switch of its own.
_OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})

#: Headers of ours that a page of another origin may read, where such pages are allowed at all.
EXPOSED = [
    "X-Request-Id", "X-Client-Request-Id", "X-Energy-Joules", "X-Energy-Interval-Joules", "X-Energy-Method",
    "X-Energy-Meter", "X-Energy-Boundary", "X-Energy-Status", "X-Carbon-Grams", "X-Carbon-Intensity",
    "Carbon-Emissions-Scope-2", "Link", "openai-processing-ms",
]  # fmt: skip
_CORS_LINES = (
    b"access-control-allow-origin: %b\r\naccess-control-expose-headers: "
    + ", ".join(EXPOSED).encode()
    + b"\r\nvary: Origin\r\n"
)


class Edge:
    """Knows the relay's endpoints by exact path; everything else is for `pages`."""

    def __init__(
        self,
        pages: ASGIApp,
        relays: Mapping[str, Relay],
        authenticator: Authenticator,
        allowed_hosts: Sequence[str],
        origins: Sequence[str],
        pipeline_of: Callable[[str], Relay | None],
    ) -> None:
        """`pipeline_of` is what answers `/models/{model}` for a model of this name."""
        self._pages = pages
        self._relays = relays
        self._pipeline_of = pipeline_of
        self.go_by(authenticator, allowed_hosts, origins)

    def go_by(self, authenticator: Authenticator, allowed_hosts: Sequence[str], origins: Sequence[str]) -> None:
        """Admit requests by these from now on, on connections that are there already too."""
        self._authenticator = authenticator
        self._hosts = frozenset(name.lower() for name in ("localhost", socket.gethostname(), *allowed_hosts))
        self._origins = frozenset(origins)
        self._known_hosts: set[bytes] = set()

    def find(self, url: bytes) -> tuple[Relay, str | None] | None:
        """What serves a request's target, and the model that its path names, if it does; None for the pages.

        The path must stand there as it is: one that only decoding makes an endpoint's is none.
        """
        path = url.partition(b"?")[0].decode("latin-1")
        relay = self._relays.get(path)
        if relay is not None:
            return relay, None
        return self._pipeline(path) if path.startswith(_HUB) else None

    def admit(self, headers: Headers, version: str) -> Caller:
        """Whose request it is; `version` is HTTP's. Raises Forbidden, or InvalidRequest without a host."""
        self._check_host(headers.host, version)
        if headers.origin is not None:
            self._check_origin(headers.origin, headers.host)
        return self._authenticator.identify(headers.authorization, headers.api_key)

    def cors_lines(self, headers: Headers) -> bytes:
        """What lets a page of an allowed origin read an answer."""
        origin = headers.origin
        return _CORS_LINES % origin if origin is not None and origin.decode("latin-1") in self._origins else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._pages(scope, receive, send)
            return
        found, send = self.find(scope["raw_path"]), _with_id(send)
        try:
            headers = read_headers(scope["headers"])
            if scope["path"] not in _OPEN_PATHS:
                caller = self.admit(headers, scope["http_version"])
                scope["joulegate.key"], scope["joulegate.admin"] = caller.name, caller.admin
            else:
                self._check_host(headers.host, scope["http_version"])
            if found is not None:
                raise InvalidRequest("Use POST for this path.", status=405, headers={"Allow": "POST"})
        except ApiError as error:
            await _refuse(error, found[0] if found else None, scope, receive, send)
            return
        await self._page(scope, receive, send)

    def _pipeline(self, path: str) -> tuple[Relay, str] | None:
        """The Hub's paths, which hold the model's name: `/models/{model}` and `/models/{model}/pipeline/{task}`."""
        model, named, task = path.removeprefix(_HUB).rpartition("/pipeline/")
        model = unquote(model if named else task)
        relay = self._relays.get(f"{_HUB}{{model}}/pipeline/{task}") if named else self._pipeline_of(model)
        return None if relay is None else (relay, model)

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._pages(_as_get(scope), receive, watched)
        except Exception:
            log.exception("an error of our own on %r", scope["path"])
            if started:
                raise
            await _refuse(
                ApiError("The proxy failed. Its log says more.", code="internal_error"), None, scope, receive, send
            )

    def _check_host(self, host: bytes | None, version: str) -> None:
        if host in self._known_hosts:
            return
        if host is None:
            if version != "1.0":
                raise InvalidRequest("A request of HTTP/1.1 has a Host header.")
            return
        name = _host_name(host)
        if name not in self._hosts and not _is_address(name):
            message = f"The Host '{name[:100]}' is not one of this proxy's; add it to server.allowed_hosts."
            raise Forbidden(message, code="host_not_allowed", status=403)
        if len(self._known_hosts) < 1_000:
            self._known_hosts.add(host)

    def _check_origin(self, origin: bytes, host: bytes | None) -> None:
        text = origin.decode("latin-1")
        same = host is not None and _authority(text) == host.decode("latin-1").lower()
        if not same and text not in self._origins:
            message = "Requests from this origin are not allowed; add it to server.cors_origins."
            raise Forbidden(message, code="origin_not_allowed")


def _with_id(send: Send) -> Send:
    """What OpenAI's API says on every answer. This id keys nothing: a page has no receipt."""
    began = time.perf_counter()

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            milliseconds = max(1, round((time.perf_counter() - began) * 1000))
            own = [(b"x-request-id", new_id().encode()), (b"openai-processing-ms", str(milliseconds).encode())]
            message["headers"] = [*message.get("headers", ()), *own]
        await send(message)

    return sending


def _as_get(scope: Scope) -> Scope:
    """HEAD asks what GET would answer; the server leaves out the body."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


async def _refuse(error: ApiError, relay: Relay | None, scope: Scope, receive: Receive, send: Send) -> None:
    """In the envelope of the path's API."""
    body = relay.envelope(error) if relay is not None else error.encode()
    await Response(body, error.status, error.headers, media_type="application/json")(scope, receive, send)


def _authority(origin: str) -> str:
    """`host:port` of an origin; "" where it is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _host_name(host: bytes) -> str:
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if text.count(":") == 1 else text


def _is_address(name: str) -> bool:
    """A literal address cannot be rebound by anyone's DNS."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
