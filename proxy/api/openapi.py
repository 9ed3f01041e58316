"""The OpenAPI document's part for the model endpoints, which bypass FastAPI."""

from typing import Any

from proxy.relay.endpoints import ENDPOINTS, Endpoint

_MESSAGES = {"messages": {"type": "array", "items": {"type": "object"}}}
_REQUIRED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _MESSAGES,
    "/v1/messages": _MESSAGES,
    "/v1/messages/count_tokens": _MESSAGES,
    "/v1/completions": {"prompt": {"type": "string"}},
    "/v1/images/generations": {"prompt": {"type": "string"}},
}
_ERRORS = {
    "400": "Invalid request",
    "401": "No valid key",
    "403": "Host or origin not allowed",
    "404": "No such model",
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
}


def model_paths() -> dict[str, Any]:
    return {endpoint.path: {"post": _operation(endpoint)} for endpoint in ENDPOINTS.values()}


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    required = _REQUIRED.get(endpoint.path, {})
    properties = {"model": {"type": "string"}, "stream": {"type": ["boolean", "null"]}, **required}
    schema = {"type": "object", "required": list(required), "properties": properties, "additionalProperties": True}
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()}
    answer = {
        "description": "The backend's answer",
        "headers": headers,
        "content": {"application/json": {"schema": {}}},
    }
    return {
        "tags": ["models' answers"],
        "summary": f"{endpoint.task.capitalize()}, answered by a backend",
        "operationId": endpoint.path.strip("/").replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": answer} | {code: _error(text) for code, text in _ERRORS.items()},
    }


def _error(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ERROR_SCHEMA}}}
