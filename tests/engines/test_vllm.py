"""A real vLLM behind the real proxy: who was in every step, and what became of the energy."""

import base64
import io
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.e2e.harness import energy_comment, events, until
from tests.engines.engines import STARTUP_SECONDS, Engines, expected_tokens

pytestmark = pytest.mark.engines

HELLO = [{"role": "user", "content": "hello there, my friend"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "llama", "messages": HELLO, "max_tokens": 12, "ignore_eos": True, **fields}


def under_way(engines: Engines, answer: httpx.Response) -> str:
    """The id of a streamed answer, once the engine works on it: a busy vLLM may hold its first words back for long."""
    id: str = answer.headers["X-Request-Id"]
    until(lambda: engines.steps_of(id))
    return id


def test_the_steps_of_concurrent_requests_say_exactly_what_usage_says(engines: Engines) -> None:
    def ask(number: int) -> tuple[str, dict[str, Any]]:
        words = [{"role": "user", "content": f"{number} tell me a story " * (number + 1)}]
        streamed: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if number % 2 else {}
        body = chat(messages=words, max_tokens=8 + number, **streamed)
        answer = engines.proxy.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
        told = events(answer.text)[-2] if streamed else answer.json()
        return answer.headers["X-Request-Id"], told["usage"]

    with ThreadPoolExecutor(8) as pool:
        asked = list(pool.map(ask, range(12)))
    for id, usage in asked:
        assert engines.computed(id, expected_tokens(usage)) == expected_tokens(usage)
        contexts = [work["context"] for work in engines.steps_of(id)]
        assert contexts == sorted(contexts)
        assert contexts[-1] == usage["total_tokens"] - 1
        receipt = engines.until_settled(id)
        assert receipt["method"] == "measured-steps"
        assert receipt["energy_joules"] > 0


def test_a_prompt_that_is_cached_is_not_work(engines: Engines) -> None:
    words = [{"role": "user", "content": "the very same long prompt, again and again; " * 12}]
    body = chat(messages=words)
    first = engines.proxy.post("/v1/chat/completions", body)
    second = engines.proxy.post("/v1/chat/completions", body)
    usage = second.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 0
    for answer in (first, second):
        expected = expected_tokens(answer.json()["usage"])
        assert engines.computed(answer.headers["X-Request-Id"], expected) == expected


def test_several_sequences_and_several_prompts_belong_to_one_receipt(engines: Engines) -> None:
    several = engines.proxy.post("/v1/chat/completions", chat(n=3))
    expected = expected_tokens(several.json()["usage"], sequences=3)
    assert engines.computed(several.headers["X-Request-Id"], expected) == expected
    prompts = {"model": "llama", "prompt": ["one two", "three"], "max_tokens": 5, "ignore_eos": True}
    answer = engines.proxy.post("/v1/completions", prompts)
    usage = answer.json()["usage"]
    expected = usage["prompt_tokens"] + usage["completion_tokens"] - 2
    assert engines.computed(answer.headers["X-Request-Id"], expected) == expected
    assert engines.settled(answer)["method"] == "measured-steps"


def test_classification_reports_every_input(engines: Engines) -> None:
    body = {"model": "bert", "input": ["what a film", "no", "never again, please, never again"]}
    answer = engines.proxy.post("/classify", body)
    assert [row["label"] in {"POSITIVE", "NEGATIVE"} for row in answer.json()["data"]] == [True] * 3
    id = answer.headers["X-Request-Id"]
    prompt = answer.json()["usage"]["prompt_tokens"]
    assert engines.computed(id, prompt) == prompt
    assert len(engines.steps_of(id)) == 3
    assert engines.settled(answer)["method"] == "measured-steps"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hello there", "max_output_tokens": 5}),
        ("/v1/messages", {"messages": HELLO, "max_tokens": 5}),
    ],
)
def test_other_dialects_are_attributed_by_their_steps_too(engines: Engines, path: str, body: dict[str, Any]) -> None:
    answer = engines.proxy.post(path, {"model": "llama", **body})
    usage = answer.json()["usage"]
    expected = usage["input_tokens"] + usage["output_tokens"] - 1
    assert engines.computed(answer.headers["X-Request-Id"], expected) == expected
    receipt = engines.settled(answer)
    assert receipt["method"] == "measured-steps"
    assert receipt["energy_joules"] > 0


@pytest.mark.parametrize(
    ("path", "body", "sequences"),
    [
        ("/v1/embeddings", {"input": ["hello there", "you"]}, 2),
        ("/pooling", {"input": ["hello there", "you"]}, 2),
        ("/score", {"text_1": "hello", "text_2": ["you there", "me"]}, 3),
        ("/rerank", {"query": "hello", "documents": ["you there", "me", "us"]}, 4),
    ],
)
def test_what_embeds_and_scores_reports_every_sequence(
    engines: Engines, path: str, body: dict[str, Any], sequences: int
) -> None:
    answer = engines.proxy.post(path, {"model": "embedder", **body})
    tokens = answer.json()["usage"]["total_tokens"]
    id = answer.headers["X-Request-Id"]
    assert engines.computed(id, tokens) == tokens
    assert len(engines.steps_of(id)) == sequences
    assert engines.settled(answer)["method"] == "measured-steps"


def test_logprobs_and_a_guided_choice_go_through(engines: Engines) -> None:
    answer = engines.client.chat.completions.create(
        model="llama",
        messages=[{"role": "user", "content": "yes or no?"}],
        logprobs=True,
        top_logprobs=2,
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert answer.choices[0].message.content in {"yes", "no"}
    logprobs = answer.choices[0].logprobs
    assert logprobs
    assert logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in logprobs.content)


def test_tokenizing_goes_through(engines: Engines) -> None:
    count = engines.proxy.post("/tokenize", {"model": "llama", "prompt": "hello"}).json()
    assert count["count"] == len(count["tokens"])
    back = engines.proxy.post("/detokenize", {"model": "llama", "tokens": count["tokens"]})
    assert back.json()["prompt"] == "hello"


def test_an_answer_by_a_schema_streams_through(engines: Engines) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["cat", "dog"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    with engines.client.chat.completions.create(
        model="llama",
        messages=[{"role": "user", "content": "cat or dog?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": schema, "strict": True}},
        stream=True,
        max_tokens=1000,
    ) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert json.loads(text)["kind"] in {"cat", "dog"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_goes_through(engines: Engines, stream: bool) -> None:
    """The tool is named, so that a model which knows nothing must call it; what it is called with is its schema's."""
    parameters = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters, "strict": True}}
    named = {"type": "function", "function": {"name": "weather"}}
    body = {"model": "llama", "messages": HELLO, "tools": [tool], "tool_choice": named, "max_tokens": 1000}
    answer = engines.proxy.post("/v1/chat/completions", {**body, "stream": stream})
    receipt = engines.settled(answer)
    assert receipt["method"] == "measured-steps"
    if stream:
        told = [event for event in events(answer.text) if event != "[DONE]" and event["choices"]]
        calls = [call for event in told for call in event["choices"][0]["delta"].get("tool_calls") or []]
    else:
        calls = answer.json()["choices"][0]["message"]["tool_calls"]
    assert calls[0]["function"]["name"] == "weather"
    arguments = "".join(call["function"].get("arguments") or "" for call in calls)
    assert json.loads(arguments)["city"] in {"Rome", "Oslo"}


def test_several_sequences_with_logprobs_stream_through(engines: Engines) -> None:
    body = chat(n=2, stream=True, logprobs=True, top_logprobs=1, stream_options={"include_usage": True})
    answer = engines.proxy.post("/v1/chat/completions", body)
    *told, last, done = events(answer.text)
    assert done == "[DONE]"
    tokens = [
        (choice["index"], token["token"])
        for event in told
        for choice in event["choices"]
        for token in (choice.get("logprobs") or {}).get("content") or []
    ]
    assert {index for index, _ in tokens} == {0, 1}
    assert len(tokens) == last["usage"]["completion_tokens"] == 24
    expected = expected_tokens(last["usage"], sequences=2)
    assert engines.computed(answer.headers["X-Request-Id"], expected) == expected


def picture(url: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    return {"model": "seer", "messages": [{"role": "user", "content": parts}], "max_tokens": 6, "ignore_eos": True}


def data_url() -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 40)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_picture_goes_through_and_its_tokens_are_work(engines: Engines, stream: bool) -> None:
    counted = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = engines.proxy.post("/v1/chat/completions", {**picture(data_url()), **counted})
    receipt = engines.settled(answer)
    assert receipt["method"] == "measured-steps"
    usage = events(answer.text)[-2]["usage"] if stream else answer.json()["usage"]
    assert usage["prompt_tokens"] > 16  # the picture's patches, and the words
    assert engines.computed(receipt["id"], expected_tokens(usage)) == expected_tokens(usage)


def test_a_picture_is_not_fetched_on_a_clients_behalf(engines: Engines) -> None:
    answer = engines.proxy.post("/v1/chat/completions", picture(f"{engines.proxy.url}/picture.png"))
    assert answer.status_code == 400
    assert "allowed domains" in answer.json()["error"]["message"]


def test_an_errors_code_is_openais(engines: Engines) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        engines.client.chat.completions.create(model="llama", messages=[], max_tokens=-1)
    assert caught.value.code is None or isinstance(caught.value.code, str)


def test_a_client_that_leaves_frees_the_engine_and_settles_as_cancelled(engines: Engines) -> None:
    body = chat(max_tokens=8000, stream=True)
    with engines.proxy.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        id = under_way(engines, answer)
    receipt = engines.until_settled(id)
    assert receipt["outcome"] == "cancelled"
    assert receipt["energy_joules"] > 0
    assert 0 < len(engines.steps_of(id)) < 8000
    done = engines.settled(engines.proxy.post("/v1/chat/completions", chat()))
    assert done["outcome"] == "completed"
    assert len(engines.steps_of(id)) < 8000


def test_an_engine_killed_in_mid_stream_is_survived(engines: Engines) -> None:
    state = engines.proxy.node.registry.states["llama"]
    assert state.pid
    with engines.proxy.client.stream("POST", "/v1/chat/completions", json=chat(max_tokens=8000, stream=True)) as answer:
        under_way(engines, answer)
        os.killpg(state.pid, signal.SIGKILL)
        text = "\n".join(answer.iter_lines())
    assert any("error" in event for event in events(text) if event != "[DONE]")
    assert events(text)[-1] == "[DONE]"
    assert energy_comment(text)["outcome"] == "failed"
    until(lambda: engines.proxy.post("/v1/chat/completions", chat()).status_code == 503)
    other = engines.proxy.post("/classify", {"model": "bert", "input": "still here"})
    assert other.status_code == 200
    until(lambda: engines.proxy.client.get("/ready").status_code == 200, STARTUP_SECONDS)
    assert engines.settled(engines.proxy.post("/v1/chat/completions", chat()))["method"] == "measured-steps"
