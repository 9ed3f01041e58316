"""A backend's own error as the client is to see it: OpenAI's envelope with all four keys, whatever it was."""

import re
from typing import Any

import msgspec

from proxy.errors import ApiError, InvalidRequest, NotFound, Unavailable, UpstreamFailed

_KNOWN_TYPES = frozenset(
    {"invalid_request_error", "server_error", "rate_limit_error", "not_found_error", "image_generation_user_error"}
)


#: What may stand in a header: seconds or a date.
_PLAIN = re.compile(r"[ -~]{1,64}")


def translate(status: int, body: bytes, retry_after: str | None) -> ApiError:
    """Build the error for an answer of 400 and above. A 422 becomes a 400; an `int` code (vLLM's) becomes null."""
    detail = _detail(body)
    message = str(detail.get("message") or f"The backend answered with status {status}.")
    error = _of_status(status, message)
    param, code, type_ = detail.get("param"), detail.get("code"), detail.get("type")
    if status in (401, 403):
        return error
    error.param = param if isinstance(param, str) else None
    error.code = code if isinstance(code, str) else error.code
    error.type = type_ if type_ in _KNOWN_TYPES else error.type
    if retry_after is not None and _PLAIN.fullmatch(retry_after):
        error.headers["Retry-After"] = retry_after
    return error


def of_event(data: bytes) -> ApiError:
    """The error for one that a backend tells within a stream; its status is the error's code, if that is one."""
    code = _detail(data).get("code")
    return translate(code if isinstance(code, int) and 400 <= code < 600 else 500, data, None)


def _of_status(status: int, message: str) -> ApiError:
    if status == 404:
        return NotFound(message)
    if status in (401, 403):  # about the proxy's own key, of which the client need not know more
        return UpstreamFailed("The backend does not accept this proxy's key.", code="backend_refused_key")
    if status in (503, 529):
        return Unavailable(message)
    if status == 429:
        return InvalidRequest(message, status=429, type="rate_limit_error", code="rate_limit_exceeded")
    if status >= 500:
        return UpstreamFailed(message, status=status)
    return InvalidRequest(message, status=400 if status == 422 else status)


def _detail(body: bytes) -> dict[str, Any]:
    """The error's parts: under `error` (OpenAI), at the top (older vLLM), or `detail` (FastAPI)."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    error = document.get("error", document)
    if isinstance(error, str):
        return {"message": error}
    if isinstance(error, dict):
        return error if "message" in error else {"message": error.get("detail")}
    return {}
