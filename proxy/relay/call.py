"""Reading a request: its body within bounds, and of its JSON only what the proxy needs."""

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec

from proxy.errors import BodyTooLarge, InvalidRequest
from proxy.relay import splice
from proxy.relay.dialects import OPENAI, RESPONSES
from proxy.relay.endpoints import Endpoint
from proxy.relay.forms import Form, is_form, read_form, with_model
from proxy.relay.heads import Head

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_BODY_SECONDS = 60.0
_STREAM_OPTIONS = b'"stream_options":{"include_usage":true}'


class ClientGone(Exception):
    """The client closed the connection before its request was complete."""


@dataclass(frozen=True, slots=True)
class Headers:
    """A request's headers that the proxy heeds; everything else about the client stays with the proxy."""

    content_length: int | None
    content_type: bytes
    client_request_id: str | None
    energy_body: bool
    forwarded: dict[str, str]


@dataclass(frozen=True, slots=True)
class Call:
    """A request as the relay needs it. `client_wants_usage`: the stream's usage chunk is the client's to see.

    `form` is set where the body is a multipart form.
    """

    endpoint: Endpoint
    body: bytes
    head: Head
    headers: Headers
    client_wants_usage: bool
    form: Form | None = None

    @property
    def content_type(self) -> str:
        """The body's, for the backend."""
        return "application/json" if self.form is None else self.headers.content_type.decode("latin-1")

    @property
    def streamed(self) -> bool:
        return bool(self.head.stream)


_FORWARDED = {b"traceparent": "traceparent", b"tracestate": "tracestate", b"accept-language": "Accept-Language"}


def read_headers(scope: Scope) -> Headers:
    """Sort a request's headers; raises InvalidRequest for a Content-Length that is no number."""
    length: int | None = None
    content_type = b""
    client_id: str | None = None
    energy_body = True
    forwarded: dict[str, str] = {}
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = _length(value)
        elif name == b"content-type":
            content_type = value
        elif name == b"x-request-id":
            client_id = value.decode("ascii") if _SANE_ID.fullmatch(value) else None
        elif name == b"x-energy-body":
            energy_body = value.strip().lower() != b"off"
        elif name in _FORWARDED:
            forwarded[_FORWARDED[name]] = value.decode("latin-1")
    return Headers(length, content_type, client_id, energy_body, forwarded)


def _length(value: bytes) -> int:
    if not value.isdigit():
        raise InvalidRequest("The Content-Length header is not a number.")
    return int(value)


async def read_call(headers: Headers, endpoint: Endpoint, receive: Receive, limit: int) -> Call:
    """Read and check a request; raises InvalidRequest, BodyTooLarge or ClientGone."""
    as_form = endpoint.body != "json" and is_form(headers.content_type)
    if not as_form and (endpoint.body == "form" or not is_json(headers.content_type)):
        message = f"The Content-Type of this request must be {_CONTENT_TYPES[endpoint.body]}."
        raise InvalidRequest(message, code="invalid_content_type")
    body = await read_body(headers, receive, limit)
    if as_form:
        form = read_form(headers.content_type, body)
        return Call(endpoint, body, form.head, headers, client_wants_usage=True, form=form)
    head = decode_head(endpoint, body)
    asked = head.stream_options is not None and head.stream_options.include_usage is True
    return Call(endpoint, body, head, headers, asked or endpoint.dialect is not OPENAI)


_CONTENT_TYPES = {
    "json": "application/json",
    "form": "multipart/form-data",
    "either": "multipart/form-data or application/json",
}


def is_json(content_type: bytes) -> bool:
    kind = content_type.split(b";", 1)[0].strip().lower()
    return kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))


async def read_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """The whole body, `limit` bytes at most, within a minute."""
    if headers.content_length is not None and headers.content_length > limit:
        raise BodyTooLarge(limit)
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            return await _collect(receive, limit)
    except TimeoutError as error:
        message = f"The request body did not arrive within {_BODY_SECONDS:.0f} s."
        raise InvalidRequest(message, status=408, code="request_timeout") from error


async def _collect(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLarge(limit)
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def decode_head(endpoint: Endpoint, body: bytes) -> Head:
    try:
        if not body.isascii():
            body.decode()  # what is not read here is for the backend, which must be able to
        return endpoint.decode(body)
    except msgspec.ValidationError as error:
        message, param = _explain(str(error))
        raise InvalidRequest(message, param=param) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}", code="invalid_json") from error
    except RecursionError as error:
        raise InvalidRequest("The request body is nested too deeply.", code="invalid_json") from error


_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_AT = re.compile(r"(.*?)(?: - at `\$\.?([^`]*)`)?", re.DOTALL)


def _explain(reason: str) -> tuple[str, str | None]:
    """msgspec's words as OpenAI's message and param."""
    matched = _AT.fullmatch(reason)
    text, path = (matched.group(1), matched.group(2) or None) if matched else (reason, None)
    missing = _MISSING.match(text)
    if missing:
        name = f"{path}.{missing.group(1)}" if path else missing.group(1)
        return f"Missing required parameter: '{name}'.", name
    if path is None:
        return f"The request body must be a JSON object: {text.lower()}.", None
    return f"Invalid type for '{path}': {text[0].lower() + text[1:]}.", path


def upstream_body(call: Call, model: str | None, response_id: str | None = None) -> bytes:
    """The body for the backend: usage asked for on OpenAI's streams, the backend's own name of the model, and our id
    for a response where the backend would otherwise make one up that its steps are reported under.
    """
    if call.endpoint.translation is not None:
        return call.endpoint.translation.request(call.head, model or call.head.model or "")
    if call.form is not None:
        return call.body if model is None else with_model(call.form, call.body, model)
    members: dict[str, bytes] = {}
    if model is not None:
        members["model"] = msgspec.json.encode(model)
    if response_id is not None and call.endpoint.dialect is RESPONSES:
        members["request_id"] = msgspec.json.encode(f"resp_{response_id}")
    wants_usage = call.streamed and call.endpoint.dialect is OPENAI
    if wants_usage and not call.client_wants_usage:
        if call.head.stream_options is None and not members and b'"stream_options"' not in call.body:
            return _prepend(call.body, _STREAM_OPTIONS)
        given = splice.nested(call.body, "stream_options")
        options = given if given and splice.is_object(given) else b"{}"
        members["stream_options"] = splice.replace_members(options, {"include_usage": b"true"})
    return splice.replace_members(call.body, members) if members else call.body


def _prepend(body: bytes, member: bytes) -> bytes:
    """Put a first member into a JSON object that has others."""
    begin = body.index(b"{") + 1
    return body[:begin] + member + b"," + body[begin:]
