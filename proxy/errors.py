"""The error tree.

JoulegateError
├── ConfigError            a configuration that cannot be used (CLI: exit 2)
└── ApiError               what a client is told, in the envelope of its dialect
    ├── InvalidRequest     400
    ├── Forbidden          401, 403
    ├── NotFound           404
    ├── BodyTooLarge       413
    ├── Overloaded         429 with Retry-After: the model's queue is full
    ├── Unavailable        503 with Retry-After: the backend is down or starting
    └── UpstreamFailed     502: the backend broke off, or answered what is no answer
        └── TimedOut       504: the backend took longer than the configured time

Foreign errors are translated once, where they are caught, with `raise … from`.
"""

from collections.abc import Mapping
from typing import Any

import msgspec


class JoulegateError(Exception):
    """Whatever we raise on purpose."""


class ConfigError(JoulegateError):
    """`str()` is one line: the field's path and what it should be."""


class ApiError(JoulegateError):
    """An error a client is told. `type`, `param` and `code` are OpenAI's; `headers` go out with it."""

    status = 500
    type = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status or self.status
        self.type = type or self.type
        self.headers = dict(headers or {})

    def envelope(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encode(self) -> bytes:
        return msgspec.json.encode(self.envelope())

    def encode_anthropic(self) -> bytes:
        """The same in Anthropic's envelope."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": self.message}})


_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class Forbidden(ApiError):
    status = 403
    type = "invalid_request_error"


class NotFound(ApiError):
    status = 404
    type = "invalid_request_error"


class BodyTooLarge(ApiError):
    status = 413
    type = "invalid_request_error"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The request body is larger than the limit of {limit} bytes.", code="body_too_large")


class Unavailable(ApiError):
    status = 503
    type = "service_unavailable"

    def __init__(self, message: str, *, code: str = "backend_unavailable", retry_after: int = 5) -> None:
        super().__init__(message, code=code, headers={"Retry-After": str(retry_after)})


class Overloaded(ApiError):
    status = 429
    type = "rate_limit_error"

    def __init__(self, model: str, retry_after: int, rates: Mapping[str, str]) -> None:
        message = f"The queue of model '{model}' is full. Try again in {retry_after} s."
        super().__init__(message, code="queue_full", headers={"Retry-After": str(retry_after), **rates})


class UpstreamFailed(ApiError):
    status = 502
    type = "upstream_error"

    def __init__(self, message: str, *, code: str = "backend_failed", status: int | None = None) -> None:
        super().__init__(message, code=code, status=status)


class TimedOut(UpstreamFailed):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="timeout", status=504)
