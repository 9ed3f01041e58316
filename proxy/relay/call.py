"""Reading a request: its body within bounds, and of its JSON only what the proxy needs."""

import re
from collections.abc import Sequence

import msgspec

from proxy.errors import BodyTooLarge, InvalidRequest
from proxy.relay import splice
from proxy.relay.dialects import OPENAI, RESPONSES
from proxy.relay.endpoints import Endpoint
from proxy.relay.forms import Form, is_form, read_form, with_model
from proxy.relay.heads import Head

_SANE_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_STREAM_OPTIONS = b'"stream_options":{"include_usage":true}'


RawHeaders = Sequence[tuple[bytes, bytes]]


class Headers(msgspec.Struct):
    """A request's headers that the proxy heeds; everything else about the client stays with the proxy.

    `forwarded` are lines for the backend, `raw` are all of them as they came.
    """

    raw: RawHeaders
    host: bytes | None = None
    origin: bytes | None = None
    authorization: bytes | None = None
    api_key: bytes | None = None
    content_length: int | None = None
    content_type: bytes = b""
    client_request_id: bytes | None = None
    energy_body: bool = True
    forwarded: bytes = b""


class Inbound(msgspec.Struct):
    """A request that has arrived whole. `key` names the caller's, `model` is the one its path names, if it does."""

    headers: Headers
    body: bytes
    key: str | None
    model: str | None


class Call(msgspec.Struct):
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
    def content_type(self) -> bytes:
        """The body's, for the backend."""
        return b"application/json" if self.form is None else self.headers.content_type

    @property
    def streamed(self) -> bool:
        return bool(self.head.stream)

    @property
    def streams_events(self) -> bool:
        """Whether the client waits for server-sent events."""
        return self.streamed and self.form is None and self.endpoint.translation is None


_HEEDED = frozenset(
    b"host origin authorization x-api-key content-length content-type x-request-id x-energy-body traceparent "
    b"tracestate accept-language".split()
)


def read_headers(raw: RawHeaders) -> Headers:
    """Sort a request's headers, whose names are in lower case; raises InvalidRequest for two hosts or a bad length."""
    headers = Headers(raw)
    for name, value in raw:
        if name not in _HEEDED:
            continue
        if name == b"host":
            if headers.host is not None:
                raise InvalidRequest("The request names two hosts.")
            headers.host = value
        elif name == b"content-type":
            headers.content_type = value
        elif name == b"content-length":
            headers.content_length = _length(value)
        elif name == b"authorization":
            headers.authorization = value
        elif name == b"x-api-key":
            headers.api_key = value
        elif name == b"origin":
            headers.origin = value
        elif name == b"x-request-id":
            headers.client_request_id = value if _SANE_ID.fullmatch(value) else None
        elif name == b"x-energy-body":
            headers.energy_body = value.strip().lower() != b"off"
        else:
            headers.forwarded += b"%b: %b\r\n" % (name, value)
    return headers


def _length(value: bytes) -> int:
    if not value.isdigit() or len(value) > 18:
        raise InvalidRequest("The Content-Length header is not a number.")
    return int(value)


def check_headers(headers: Headers, endpoint: Endpoint, limit: int) -> None:
    """What can be refused before the body has come; raises InvalidRequest or BodyTooLarge."""
    if headers.content_length is not None and headers.content_length > limit:
        raise BodyTooLarge(limit)
    as_form = endpoint.body != "json" and is_form(headers.content_type)
    if not as_form and (endpoint.body == "form" or not is_json(headers.content_type)):
        message = f"The Content-Type of this request must be {_CONTENT_TYPES[endpoint.body]}."
        raise InvalidRequest(message, code="invalid_content_type")


def read_call(asked: Inbound, endpoint: Endpoint) -> Call:
    """Read a request whose headers have been checked; raises InvalidRequest."""
    headers, body = asked.headers, asked.body
    if endpoint.body != "json" and is_form(headers.content_type):
        form = read_form(headers.content_type, body)
        return Call(endpoint, body, form.head, headers, client_wants_usage=True, form=form)
    head = decode_head(endpoint, body)
    wanted = head.stream_options is not None and head.stream_options.include_usage is True
    return Call(endpoint, body, head, headers, wanted or endpoint.dialect is not OPENAI)


_CONTENT_TYPES = {
    "json": "application/json",
    "form": "multipart/form-data",
    "either": "multipart/form-data or application/json",
}


def is_json(content_type: bytes) -> bool:
    if content_type == b"application/json":
        return True
    kind = content_type.split(b";", 1)[0].strip().lower()
    return kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))


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
