"""A vLLM without our hook, and one that somebody else started: served, and accounted as well as can be."""

from typing import Any

import pytest

from tests.e2e.harness import events
from tests.engines.engines import Engines, expected_tokens

pytestmark = pytest.mark.engines


def chat(model: str, **fields: Any) -> dict[str, Any]:
    words = [{"role": "user", "content": "tell me a story, please"}]
    return {"model": model, "messages": words, "max_tokens": 30, "ignore_eos": True, **fields}


def test_a_vllm_without_the_hook_serves_and_is_accounted_by_tokens(attached: Engines) -> None:
    for stream in (False, True):
        answer = attached.proxy.post("/v1/chat/completions", chat("unhooked", stream=stream))
        receipt = attached.settled(answer)
        assert receipt["method"] == "measured-tokens"
        assert receipt["parts"]["gpu"] > 0
        assert not attached.steps_of(receipt["id"])
    assert "has no --scheduler-cls in engine/arg_utils.py" in attached.log
    assert "(measured-tokens); tested with vLLM 0.32" in attached.log


def test_a_port_that_another_took_first_is_named_and_another_is_tried(attached: Engines) -> None:
    assert "unhooked: ended with exit code 1: OSError: [Errno 98] Address already in use" in attached.log
    assert attached.proxy.node.registry.states["unhooked"].restarts == 1
    assert attached.proxy.client.get("/ready").status_code == 200


def test_a_vllm_that_already_runs_is_accounted_by_the_steps_it_tells(attached: Engines) -> None:
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    for fields in ({}, streamed, {"n": 2}):
        answer = attached.proxy.post("/v1/chat/completions", chat("elsewhere", **fields))
        receipt = attached.settled(answer)
        assert receipt["method"] == "measured-steps"
        assert receipt["parts"]["gpu"] > 0
        usage = events(answer.text)[-2]["usage"] if fields is streamed else answer.json()["usage"]
        expected = expected_tokens(usage, sequences=int(str(fields.get("n", 1))))
        assert attached.computed(receipt["id"], expected) == expected


def test_the_same_vllm_without_a_socket_is_accounted_by_tokens(attached: Engines) -> None:
    answer = attached.proxy.post("/v1/chat/completions", chat("unwatched"))
    receipt = attached.settled(answer)
    assert receipt["method"] == "measured-tokens"
    assert receipt["parts"]["gpu"] > 0
