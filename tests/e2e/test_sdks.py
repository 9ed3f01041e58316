"""The libraries that applications use, unchanged, against the proxy: what they read is as from the real API."""

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from huggingface_hub import InferenceClient
from openai.types.chat import ChatCompletionToolParam
from pydantic import BaseModel

from tests.e2e.harness import Proxy
from tests.e2e.test_answers import fake_requests


@pytest.fixture
def client(proxy: Proxy) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


@pytest.fixture
def claude(proxy: Proxy) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=proxy.url, api_key="unused", max_retries=0) as found:
        yield found


def extra(answer: Any) -> dict[str, Any]:
    """The energy that a library's typed answer carries beside what it knows."""
    energy: dict[str, Any] = answer.model_extra["energy"]
    return energy


WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


class Answered(BaseModel):
    reason: str
    conclusion: str


class TestOpenAI:
    def test_tools(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "hi"}], tools=[WEATHER], tool_choice="auto"
        )
        (call,) = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        assert call.function.name == "weather"

    def test_structured_output(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.parse(
            model="chat", messages=[{"role": "user", "content": "hi [[tokens=2]]"}], response_format=Answered
        )
        parsed = answer.choices[0].message.parsed
        assert parsed is not None
        assert parsed.reason.startswith("wört1")

    def test_embeddings(self, client: openai.OpenAI) -> None:
        answer = client.embeddings.create(model="chat", input=["one", "two"], encoding_format="float")
        assert [row.embedding for row in answer.data] == [[0.6, 0.8]] * 2
        assert extra(answer)["task"] == "embedding"

    def test_edits_and_audio(self, client: openai.OpenAI) -> None:
        edited = client.images.edit(model="painter", image=("cat.png", b"\x89PNG some"), prompt="a hat")
        assert edited.data
        assert base64.b64decode(edited.data[0].b64_json or "") == b"\x89PNG some"
        heard = client.audio.transcriptions.create(model="chat", file=("a.wav", io.BytesIO(b"RIFF")))
        assert heard.text == "4 bytes heard by chat"
        spoken = client.audio.speech.create(model="chat", voice="alloy", input="hello")
        assert spoken.read() == b"ID3hello"

    def test_moderations(self, client: openai.OpenAI) -> None:
        answer = client.moderations.create(model="omni-moderation-latest", input="a kind word")
        assert answer.results[0].flagged is False

    def test_responses(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(model="chat", input="hi [[tokens=4]]")
        assert answer.output_text.startswith("wört1")
        assert extra(answer)["energy_joules"] is not None
        assert client.responses.retrieve(answer.id).output_text == answer.output_text
        client.responses.delete(answer.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(answer.id)

    def test_streamed_responses(self, client: openai.OpenAI) -> None:
        with client.responses.stream(model="chat", input="hi [[tokens=4]]") as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert final.output_text == text
        assert extra(final)["energy_joules"] is not None

    def test_raw_answers_tell_the_request(self, client: openai.OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(
            model="chat", messages=[{"role": "user", "content": "hi"}]
        )
        assert raw.request_id == raw.headers["x-request-id"]
        assert int(raw.headers["openai-processing-ms"]) > 0
        assert float(raw.headers["x-energy-joules"]) >= 0

    def test_what_failed_is_tried_again_as_the_library_does(self, proxy: Proxy) -> None:
        prompt = "again [[status=500]]"
        before = _asked(proxy, prompt)
        client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="unused", max_retries=1)
        with client, pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="chat", messages=[{"role": "user", "content": prompt}])
        assert _asked(proxy, prompt) == before + 2

    async def test_asynchronous_calls(self, proxy: Proxy) -> None:
        async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="unused") as client:
            answer = await client.embeddings.create(model="chat", input="one")
            assert answer.data[0].embedding
            assert "chat" in [model.id async for model in client.models.list()]


def _asked(proxy: Proxy, prompt: str) -> int:
    return sum(prompt in str(seen["body"]) for seen in fake_requests(proxy, "chat"))


class TestAnthropic:
    def test_messages(self, claude: anthropic.Anthropic) -> None:
        answer = claude.messages.create(model="chat", max_tokens=4, messages=[{"role": "user", "content": "one two"}])
        assert answer.content[0].type == "text"
        assert answer.usage.output_tokens == 4
        assert extra(answer)["joules_per_output_token"] is not None

    def test_tools(self, claude: anthropic.Anthropic) -> None:
        answer = claude.messages.create(
            model="chat",
            max_tokens=4,
            messages=[{"role": "user", "content": "one two"}],
            tools=[{"name": "weather", "input_schema": {"type": "object"}}],
        )
        assert answer.stop_reason == "tool_use"
        assert answer.content[-1].type == "tool_use"

    def test_streams(self, claude: anthropic.Anthropic) -> None:
        messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "one"}]
        with claude.messages.stream(model="chat", max_tokens=4, messages=messages) as stream:
            found = list(stream)
            text = stream.get_final_text()
        assert text.startswith("wört1 wört2")
        (delta,) = [event for event in found if event.type == "message_delta"]
        assert extra(delta)["energy_joules"] is not None

    def test_token_counts(self, claude: anthropic.Anthropic) -> None:
        counted = claude.messages.count_tokens(model="chat", messages=[{"role": "user", "content": "one two three"}])
        assert counted.input_tokens == 3

    def test_errors_are_the_clients_own(self, claude: anthropic.Anthropic) -> None:
        with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
            claude.messages.create(model="nope", max_tokens=4, messages=[{"role": "user", "content": "one"}])
        messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": "[[status=429]]"}]
        with pytest.raises(anthropic.RateLimitError):
            claude.messages.create(model="chat", max_tokens=4, messages=messages)


class TestHub:
    def test_chat(self, proxy: Proxy) -> None:
        hub = InferenceClient(base_url=f"{proxy.url}/v1", api_key="unused")
        answer = hub.chat_completion([{"role": "user", "content": "one [[tokens=3]]"}], model="chat")
        assert (answer.choices[0].message.content or "").startswith("wört1")

    def test_text_classification(self, proxy: Proxy) -> None:
        hub = InferenceClient(model=f"{proxy.url}/models/sentiment", api_key="unused")
        (row,) = hub.text_classification("a warm, clever film")
        assert (row.label, row.score) == ("POSITIVE", 0.9)

    def test_text_to_image(self, proxy: Proxy) -> None:
        hub = InferenceClient(model=f"{proxy.url}/models/painter", api_key="unused")
        picture = hub.text_to_image("a red apple", width=32, height=16, num_inference_steps=2)
        assert picture.size == (32, 16)


def test_langchain(proxy: Proxy) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(model="chat", base_url=f"{proxy.url}/v1", api_key="unused")
    assert model.invoke("hi [[tokens=3]]").content.startswith("wört1")
    assert "".join(chunk.content for chunk in model.stream("hi [[tokens=3]]")).startswith("wört1 wört2")
    (call,) = model.bind_tools([WEATHER]).invoke("hi").tool_calls
    assert call["name"] == "weather"


def test_the_body_of_an_unknown_field_is_unharmed(proxy: Proxy, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="chat",
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:,"}}],
            }
        ],
        logprobs=True,
        top_logprobs=3,
        prompt_cache_key="abc",
        extra_body={"guided": {"deep": [None]}},
    )
    seen = json.loads(fake_requests(proxy, "chat")[-1]["body"])
    assert seen["messages"][0]["content"][1]["image_url"] == {"url": "data:,"}
    assert (seen["logprobs"], seen["top_logprobs"], seen["prompt_cache_key"]) == (True, 3, "abc")
    assert seen["guided"] == {"deep": [None]}
