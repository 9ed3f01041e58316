"""OpenAI's library for Node, unchanged, against the proxy: its answers, its errors, and the energy of each request."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.environment import node_modules
from tests.e2e.harness import Proxy

SCRIPT = Path(__file__).with_name("node") / "calls.mjs"
SIX = "wört1 wört2 wört3 wört4 wört5 wört6 "
Calls = dict[str, dict[str, Any]]

pytestmark = pytest.mark.skipif(
    shutil.which("npm") is None, reason="there is no npm; install Node 20 or later with it (apt-get install nodejs npm)"
)


@pytest.fixture(scope="module")
def calls(proxy: Proxy) -> Calls:
    """What came of each call of the script."""
    command = ["node", str(SCRIPT), proxy.url, str(node_modules())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found: Calls = json.loads(done.stdout)
    return found


ANSWERS = {
    "chat": SIX,
    "stream": SIX,
    "stream_with_usage": SIX,
    "raw_stream": "data: [DONE]",
    "stream_helper": SIX,
    "tools": ["tool_calls", {"name": "weather", "arguments": "{}"}],
    "tools_run": [SIX, ["user", "assistant", "tool", "assistant"]],
    "tools_streamed": SIX,
    "structured": {"reason": SIX, "conclusion": SIX},
    "completion": "wört1 wört2 wört3 ",
    "responses": "wört1 wört2 wört3",
    "responses_streamed": "wört1 wört2 wört3 ",
    "embeddings": [["0.6", "0.8"]] * 2,
    "moderations": False,
    "images": ["PNG", "PNG"],
    "images_streamed": "image_generation.completed",
    "image_edit": "a picture",
    "transcription": "4 bytes heard by chat",
    "speech": "ID3hello",
    "request_id": True,
}
STREAMS = {"stream", "stream_with_usage", "raw_stream", "stream_helper", "tools_streamed"} | {
    "responses_streamed",
    "images_streamed",
}
#: What has no place for it, or of which the script keeps none.
BARE = {"stream", "raw_stream", "stream_helper", "tools_run", "tools_streamed", "speech", "request_id"}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_answer_is_as_from_openai_and_accounted(calls: Calls, accounted: Callable[..., None], name: str) -> None:
    told = calls[name]
    assert told["answer"] == ANSWERS[name]
    assert told["heads"]
    for head in told["heads"]:
        assert head["status"] in ({"pending"} if name in STREAMS else {"provisional", "settled"})
        accounted(head["id"], head["joules"])


@pytest.mark.parametrize("name", sorted(ANSWERS.keys() - BARE))
def test_the_library_shows_the_energy(calls: Calls, name: str) -> None:
    energy = calls[name]["energy"]
    assert energy["id"] == calls[name]["heads"][-1]["id"]
    assert energy["energy_joules"] == pytest.approx(sum(energy["parts"].values()), abs=1e-9)


def test_a_stream_tells_its_energy_in_a_comment(calls: Calls) -> None:
    told = calls["raw_stream"]
    assert told["comment"]["id"] == told["heads"][0]["id"]
    assert told["comment"]["energy_joules"] is not None
    assert calls["stream"]["energy"] is None


def test_a_stream_left_early_is_cancelled(calls: Calls, accounted: Callable[..., None]) -> None:
    told = calls["stream_left_early"]
    assert told["answer"] == "chat.completion.chunk"
    accounted(told["heads"][0]["id"], outcome="cancelled")


def test_the_models_are_listed(calls: Calls) -> None:
    assert calls["models"]["answer"] == [["chat", "observed", "sentiment", "painter"], "chat"]


ERRORS: dict[str, dict[str, Any]] = {
    "no_such_model": {"name": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"},
    "bad_request": {"name": "BadRequestError", "status": 400, "code": None, "param": "messages"},
    "rate_limit": {"name": "RateLimitError", "status": 429},
    "broken_stream": {"name": "APIError", "code": "backend_failed"},
    "retries": {"name": "InternalServerError", "status": 500},
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_librarys_own(calls: Calls, name: str) -> None:
    assert calls[name]["answer"].items() >= ERRORS[name].items()


@pytest.mark.parametrize("name", ["rate_limit", "broken_stream", "retries"])
def test_what_failed_is_accounted_too(calls: Calls, accounted: Callable[..., None], name: str) -> None:
    heads = calls[name]["heads"]
    assert len({head["id"] for head in heads}) == (3 if name == "retries" else 1)
    for head in heads:
        accounted(head["id"], head["joules"], outcome="failed")
