"""LiteLLM as a client, unchanged, against the proxy: its answers, its errors, and the energy of each request."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environment import litellm_python
from tests.e2e.harness import Proxy, until

SCRIPT = Path(__file__).with_name("litellm_calls.py")
SIX = "wört1 wört2 wört3 wört4 wört5 wört6 "
Calls = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def calls(proxy: Proxy) -> Calls:
    """What came of each call of the script."""
    command = [str(litellm_python()), str(SCRIPT), proxy.url]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    found: Calls = json.loads(done.stdout)
    return found


def receipts(proxy: Proxy, name: str, count: int = 1) -> list[dict[str, Any]]:
    """The settled receipts of a call: it sends its name as its `X-Request-Id`."""

    def found() -> list[dict[str, Any]]:
        named = [row for row in proxy.stored() if row["client_request_id"] == f"litellm-{name}"]
        return named if len(named) == count and all(row["status"] == "settled" for row in named) else []

    rows: list[dict[str, Any]] = until(found)
    return rows


ANSWERS = {
    "chat": SIX,
    "stream": [SIX, None],
    "stream_with_usage": [SIX, 6],
    "tools": ["tool_calls", "weather", "{}"],
    "structured": json.dumps({"reason": SIX}),
    "completion": "wört1 wört2 wört3 ",
    "responses": "wört1 wört2 wört3",
    "embeddings": [[0.6, 0.8]] * 2,
    "images": ["iVBOR", "iVBOR"],
    "transcription": "4 bytes heard by chat",
    "asynchronous": [SIX] * 6,
    "anthropic": SIX.strip(),
    "anthropic_tools": ["tool_calls", "weather", "{}"],
    "anthropic_stream": SIX,
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_is_as_from_openai_and_accounted(proxy: Proxy, calls: Calls, name: str) -> None:
    assert calls[name]["answer"] == ANSWERS[name]
    if name == "transcription":
        found = [proxy.receipt(calls[name]["headers"]["x-request-id"])]
    else:
        found = receipts(proxy, name, 6 if name == "asynchronous" else 1)
    for receipt in found:
        assert receipt["outcome"] == "completed"
        assert 0 <= receipt["low_joules"] <= receipt["energy_joules"] <= receipt["high_joules"]


@pytest.mark.parametrize(
    "name", ["chat", "tools", "structured", "embeddings", "transcription", "anthropic", "anthropic_tools"]
)
def test_it_hands_on_the_energy_of_an_answer(calls: Calls, name: str) -> None:
    headers = calls[name]["headers"]
    low, high = map(float, headers["x-energy-interval-joules"].split("-"))
    assert low <= float(headers["x-energy-joules"]) <= high


@pytest.mark.parametrize("name", ["stream", "stream_with_usage"])
def test_it_hands_on_that_a_streams_energy_comes_later(calls: Calls, name: str) -> None:
    assert calls[name]["headers"]["x-energy-status"] == "pending"
    assert "x-energy-joules" not in calls[name]["headers"]


ERRORS = {
    "no_such_model": ["NotFoundError", 404],
    "bad_request": ["BadRequestError", 400],
    "refused_by_the_backend": ["BadRequestError", 400],
    "rate_limit": ["RateLimitError", 429],
    "retries": ["InternalServerError", 500],
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_librarys_own(calls: Calls, name: str) -> None:
    assert calls[name]["answer"] == ERRORS[name], calls[name]


def test_a_stream_that_breaks_off_is_an_error_that_says_so(calls: Calls) -> None:
    assert "broke off" in calls["broken_stream"]["message"]


@pytest.mark.parametrize(("name", "tried"), [("rate_limit", 1), ("broken_stream", 1), ("retries", 3)])
def test_what_failed_is_accounted_each_time_it_is_tried(proxy: Proxy, calls: Calls, name: str, tried: int) -> None:
    assert calls[name]["answer"] != "it did not fail"
    assert {row["outcome"] for row in receipts(proxy, name, tried)} == {"failed"}
