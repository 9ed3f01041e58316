"""The OpenAPI document's part for the model endpoints, which bypass FastAPI."""

import re
from dataclasses import replace
from typing import Any

from proxy.relay.dialects import ANTHROPIC
from proxy.relay.endpoints import ENDPOINTS, PIPELINES, Endpoint

_MESSAGES = {"messages": {"type": "array", "items": {"type": "object"}}}
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]}
_REQUIRED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _MESSAGES,
    "/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": _MESSAGES,
    "/v1/completions": {"prompt": {"type": "string"}},
    "/v1/images/generations": {"prompt": {"type": "string"}},
    "/v1/images/edits": {"prompt": {"type": "string"}},
    "/v1/audio/speech": {"input": {"type": "string"}},
    "/v1/moderations": {"input": _TEXTS},
    "/predict": {"inputs": {"type": "string"}},
    "/models/{model}": {"inputs": {"type": "string"}},
    "/models/{model}/pipeline/text-classification": {"inputs": _TEXTS},
    "/models/{model}/pipeline/text-to-image": {"inputs": {"type": "string"}},
}
_FILES = {
    "/v1/images/edits": "image",
    "/v1/audio/transcriptions": "file",
    "/v1/audio/translations": "file",
}
_ERRORS = {
    "400": "Invalid request",
    "401": "No valid key",
    "403": "Host or origin not allowed",
    "404": "No such model, or its backend has no such endpoint",
    "405": "Use POST",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "429": "Too many requests",
    "500": "The backend or the proxy failed",
    "502": "The backend broke off",
    "503": "The backend is down or starting",
}
_ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
#: Anthropic's, on its own paths.
_ANTHROPIC_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_HEADERS = {
    "X-Request-Id": "our id: the receipt's",
    "X-Energy-Joules": "joules of the receipt",
    "X-Energy-Interval-Joules": "low-high",
    "X-Energy-Method": "how the shares were found",
    "X-Energy-Meter": "what measured",
    "X-Energy-Boundary": "gpu, node or facility",
    "X-Energy-Status": "provisional, settled, pending or unavailable",
    "X-Carbon-Grams": "grams CO2e",
    "X-Carbon-Intensity": "g/kWh; zone; source; as_of",
    "Carbon-Emissions-Scope-2": "grams CO2e, operational only",
    "Link": "the receipt's address",
    "openai-processing-ms": "milliseconds until the answer's head",
}


#: The answer of a backend that is passed on.
FORWARDED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The backend's answer", "content": {"application/json": {}, "text/event-stream": {}}}
}
_ANY: dict[str, Any] = {"*/*": {"schema": {}}}


def model_paths() -> dict[str, Any]:
    first = next(iter(PIPELINES.values()))
    either = replace(first, path="/models/{model}", task="pipeline")
    endpoints = [*ENDPOINTS.values(), either, *PIPELINES.values()]
    return {endpoint.path: {"post": _operation(endpoint)} for endpoint in endpoints}


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()}
    answer = {"description": "The backend's answer", "headers": headers, "content": _ANY}
    schema = _ANTHROPIC_SCHEMA if endpoint.dialect is ANTHROPIC else _ERROR_SCHEMA
    names = re.findall(r"{(\w+)}", endpoint.path)
    return {
        "tags": ["models' answers"],
        "summary": f"{endpoint.task.capitalize()}, answered by a backend",
        "operationId": re.sub(r"[^a-z0-9]+", "_", endpoint.path).strip("_"),
        "parameters": [{"name": name, "in": "path", "required": True, "schema": _NAME} for name in names],
        "requestBody": {"required": True, "content": _request(endpoint)},
        "responses": {"200": answer} | {code: error_response(text, schema) for code, text in _ERRORS.items()},
    }


_NAME = {"type": "string", "minLength": 1, "pattern": "^[A-Za-z0-9][A-Za-z0-9._:-]*$"}


def _request(endpoint: Endpoint) -> dict[str, Any]:
    required = _REQUIRED.get(endpoint.path, {})
    common = {"model": {"type": "string"}, "stream": {"type": ["boolean", "null"]}, **required}
    schema = {"type": "object", "required": list(required), "properties": common, "additionalProperties": True}
    content: dict[str, Any] = {"application/json": {"schema": schema}} if endpoint.body != "form" else {}
    if endpoint.body != "json":
        file = _FILES[endpoint.path]
        parts = {**required, "model": {"type": "string"}, file: {"type": "string", "format": "binary"}}
        content["multipart/form-data"] = {"schema": {"type": "object", "required": [file], "properties": parts}}
    return content


def error_response(description: str, schema: dict[str, Any] = _ERROR_SCHEMA) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


#: For pages of FastAPI's: what they may refuse, and what only a forwarding one may.
PAGE_ERRORS: dict[int | str, dict[str, Any]] = {
    int(code): error_response(_ERRORS[code]) for code in ("400", "401", "403", "500", "503")
}
PAGE_ERRORS[404] = error_response("There is no such thing")
BACKEND_ERRORS: dict[int | str, dict[str, Any]] = {int(code): error_response(text) for code, text in _ERRORS.items()}
