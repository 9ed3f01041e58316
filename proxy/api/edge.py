"""The edge: what every request passes first. Pure ASGI, around the model endpoints and the FastAPI application.

It refuses names a browser could be tricked into using (DNS rebinding), foreign origins and unknown keys, sends model
endpoints straight to the relay, and turns whatever goes wrong unforeseen into a well-formed error.
"""

import ipaddress
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import unquote, urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.api.auth import Authenticator
from proxy.errors import ApiError, Forbidden, InvalidRequest
from proxy.relay.relay import Relay
from proxy.relay.reply import Reply

log = logging.getLogger("joulegate.api")

_HUB = "/models/"
#: What a probe or a scraper may read without a key; `/metrics` has a switch of its own.
_OPEN_PATHS = frozenset({"/health", "/ready", "/metrics"})


class Edge:
    """Dispatches by exact path: the relay's endpoints first, everything else to `pages`."""

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
        self._authenticator = authenticator
        self._hosts = frozenset(name.lower() for name in ("localhost", socket.gethostname(), *allowed_hosts))
        self._origins = frozenset(origins)
        self._pipeline_of = pipeline_of
        self._known_hosts: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._pages(scope, receive, send)
            return
        # As it was sent: an encoded slash is none, and no other spelling of a path reaches a backend.
        path = scope["raw_path"].decode("ascii")
        relay = self._relays.get(path) or self._pipeline(path, scope)
        try:
            self._admit(scope)
            if relay is not None and scope["method"] != "POST":
                raise InvalidRequest("Use POST for this path.", status=405, headers={"Allow": "POST"})
        except ApiError as error:
            await _refuse(error, relay, send)
            return
        await self._serve(relay, scope, receive, send)

    def _pipeline(self, path: str, scope: Scope) -> Relay | None:
        """The Hub's paths, which hold the model's name: `/models/{model}` and `/models/{model}/pipeline/{task}`."""
        if not path.startswith(_HUB):
            return None
        model, named, task = path.removeprefix(_HUB).rpartition("/pipeline/")
        scope["joulegate.model"] = model = unquote(model if named else task)
        return self._relays.get(f"{_HUB}{{model}}/pipeline/{task}") if named else self._pipeline_of(model)

    async def _serve(self, relay: Relay | None, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await (relay(scope, receive, watched) if relay else self._pages(_as_get(scope), receive, watched))
        except Exception:
            log.exception("an error of our own on %r", scope["path"])
            if started:
                raise
            await _refuse(ApiError("The proxy failed. Its log says more.", code="internal_error"), relay, send)

    def _admit(self, scope: Scope) -> None:
        host = origin = authorization = api_key = None
        for name, value in scope["headers"]:
            if name == b"host":
                if host is not None:
                    raise InvalidRequest("A request has one Host header.")
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"authorization":
                authorization = value
            elif name == b"x-api-key":
                api_key = value
        if host is None and scope["http_version"] == "1.1":
            raise InvalidRequest("A request of HTTP/1.1 has a Host header.")
        self._check_host(host)
        if origin is not None:
            self._check_origin(origin, host)
        if scope["path"] not in _OPEN_PATHS:
            caller = self._authenticator.identify(authorization, api_key)
            scope["joulegate.key"], scope["joulegate.admin"] = caller.name, caller.admin

    def _check_host(self, host: bytes | None) -> None:
        if host is None or host in self._known_hosts:
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


def _as_get(scope: Scope) -> Scope:
    """HEAD asks what GET would answer; the server leaves out the body."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


async def _refuse(error: ApiError, relay: Relay | None, send: Send) -> None:
    """In the envelope of the path's API."""
    await Reply(send, "").error(error, [], relay.envelope(error) if relay is not None else error.encode())


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
