"""What `tests/e2e/test_sdks.py` leaves open of the Python libraries: asynchronous calls, tools to the end, streams of
tools and of JSON, errors and retries; each with the energy that the library shows and a receipt that settles.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic.types import MessageParam, ToolParam
from huggingface_hub import AsyncInferenceClient
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel

from tests.e2e.harness import MODELS, Proxy, running, until
from tests.e2e.test_security import key

SIX = "wört1 wört2 wört3 wört4 wört5 wört6 "
Accounted = Callable[..., None]


def asked(prompt: str = "hi [[tokens=6]]") -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": prompt}]


class Answered(BaseModel):
    reason: str


WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def energy(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.model_extra["energy"]
    return found


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="unused", max_retries=0) as found:
        yield found


class TestOpenAI:
    async def test_chat_and_a_tool_to_the_end(self, client: openai.AsyncOpenAI, accounted: Accounted) -> None:
        first = await client.chat.completions.create(model="chat", messages=asked(), tools=[WEATHER])
        (call,) = first.choices[0].message.tool_calls or []
        assert (call.type, first.choices[0].finish_reason) == ("function", "tool_calls")
        said: ChatCompletionMessageParam = first.choices[0].message.to_dict()  # type: ignore[assignment] # as one does
        result: ChatCompletionMessageParam = {"role": "tool", "tool_call_id": call.id, "content": "fine"}
        second = await client.chat.completions.create(model="chat", messages=[*asked(), said, result], tools=[WEATHER])
        assert second.choices[0].message.content == SIX
        for answer in (first, second):
            accounted(energy(answer)["id"], energy(answer)["energy_joules"])

    async def test_a_streamed_tool_call(self, client: openai.AsyncOpenAI, accounted: Accounted) -> None:
        async with client.chat.completions.stream(
            model="chat", messages=asked(), tools=[WEATHER], stream_options={"include_usage": True}
        ) as stream:
            answer = await stream.get_final_completion()
        (call,) = answer.choices[0].message.tool_calls or []
        assert (call.function.name, call.function.arguments.strip()) == ("weather", "{}")
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 6
        assert stream._response.headers["X-Energy-Status"] == "pending"
        accounted(stream._response.headers["X-Request-Id"])

    async def test_a_streamed_object(self, client: openai.AsyncOpenAI) -> None:
        async with client.chat.completions.stream(model="chat", messages=asked(), response_format=Answered) as stream:
            answer = await stream.get_final_completion()
        assert answer.choices[0].message.parsed == Answered(reason="wört")

    async def test_responses(self, client: openai.AsyncOpenAI, accounted: Accounted) -> None:
        answer = await client.responses.parse(model="chat", input="hi [[tokens=3]]", text_format=Answered)
        assert answer.output_parsed == Answered(reason="wört1 wört2 wört3")
        called = await client.responses.create(
            model="chat", input="hi", tools=[{"type": "function", "name": "weather", "parameters": {}, "strict": False}]
        )
        assert called.output[0].type == "function_call"
        streamed = await client.responses.create(model="chat", input="hi [[tokens=3]]", stream=True)
        *_, last = [event async for event in streamed]
        assert last.type == "response.completed"
        for found in (answer, called, last.response):
            accounted(energy(found)["id"], energy(found)["energy_joules"])

    async def test_what_is_no_chat(self, client: openai.AsyncOpenAI, accounted: Accounted) -> None:
        completion = await client.completions.create(model="chat", prompt=["one [[tokens=2]]"], n=2)
        assert [choice.text for choice in completion.choices] == ["wört1 wört2 "] * 2
        # By itself, the library asks for base64 and decodes it.
        vectors = await client.embeddings.create(model="chat", input=["one", "two"])
        assert [row.embedding for row in vectors.data] == [pytest.approx([0.6, 0.8])] * 2
        pictures = await client.images.generate(model="painter", prompt="an apple", size="auto", n=2)
        assert [base64.b64decode(row.b64_json or "")[1:4] for row in pictures.data or []] == [b"PNG"] * 2
        edited = await client.images.edit(model="painter", image=("cat.png", b"a picture"), prompt="a hat")
        assert base64.b64decode((edited.data or [])[0].b64_json or "") == b"a picture"
        judged = await client.moderations.create(input=["kind", "words"])
        assert [row.flagged for row in judged.results] == [False, False]
        heard = await client.audio.transcriptions.create(model="chat", file=("a.wav", b"RIFF"))
        assert heard.text == "4 bytes heard by chat"
        for answer in (completion, vectors, pictures, edited, judged, heard):
            accounted(energy(answer)["id"], energy(answer)["energy_joules"])

    async def test_a_streamed_picture(self, client: openai.AsyncOpenAI, accounted: Accounted) -> None:
        stream = await client.images.generate(model="painter", prompt="an apple", stream=True)
        (event,) = [event async for event in stream]
        assert event.type == "image_generation.completed"
        accounted(energy(event)["id"], energy(event)["energy_joules"])

    async def test_bytes(self, client: openai.AsyncOpenAI, accounted: Accounted) -> None:
        async with client.audio.speech.with_streaming_response.create(
            model="chat", voice="alloy", input="hello"
        ) as spoken:
            assert await spoken.read() == b"ID3hello"
        accounted(spoken.headers["X-Request-Id"], spoken.headers["X-Energy-Joules"])

    async def test_a_stream_left_early_is_cancelled(self, client: openai.AsyncOpenAI, accounted: Accounted) -> None:
        async with await client.chat.completions.create(
            model="chat", messages=asked("hi [[tokens=2000 token_ms=10]]"), stream=True
        ) as stream:
            await anext(stream)
        accounted(stream.response.headers["X-Request-Id"], outcome="cancelled")

    @pytest.mark.parametrize(
        ("error", "status", "prompt"),
        [
            (openai.BadRequestError, 400, "[[status=400]]"),
            (openai.NotFoundError, 404, "[[status=404]]"),
            (openai.ConflictError, 409, "[[status=409]]"),
            (openai.RateLimitError, 429, "[[status=429]]"),
            (openai.InternalServerError, 500, "[[status=500]]"),
        ],
    )
    async def test_errors_are_the_librarys_own(
        self,
        client: openai.AsyncOpenAI,
        accounted: Accounted,
        error: type[openai.APIStatusError],
        status: int,
        prompt: str,
    ) -> None:
        with pytest.raises(error) as caught:
            await client.chat.completions.create(model="chat", messages=asked(prompt))
        assert caught.value.status_code == status
        assert f"a fake error of status {status}" in caught.value.message
        assert caught.value.request_id is not None
        accounted(caught.value.request_id, caught.value.response.headers["X-Energy-Joules"], outcome="failed")

    async def test_retries_are_requests_of_their_own(self, proxy: Proxy, accounted: Accounted) -> None:
        ids: list[str] = []

        async def note(response: httpx.Response) -> None:
            ids.append(response.headers["X-Request-Id"])

        async with openai.AsyncOpenAI(
            base_url=f"{proxy.url}/v1",
            api_key="unused",
            max_retries=2,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"response": [note]}),
        ) as client:
            with pytest.raises(openai.InternalServerError):
                await client.chat.completions.create(model="chat", messages=asked("[[status=500]]"))
        assert len(set(ids)) == 3
        for id_ in ids:
            accounted(id_, outcome="failed")

    async def test_a_time_out_of_the_client_cancels(self, proxy: Proxy, client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(
                model="chat",
                messages=asked("hi [[tokens=2000 token_ms=10]]"),
                timeout=0.5,
                extra_headers={"X-Request-Id": "too-slow"},
            )

        def receipts() -> list[dict[str, Any]]:
            rows = [row for row in proxy.stored() if row["client_request_id"] == "too-slow"]
            return [row for row in rows if row["status"] == "settled"]

        (receipt,) = await asyncio.to_thread(until, receipts)
        assert receipt["outcome"] == "cancelled"
        assert receipt["energy_joules"] > 1


ANTHROPIC_TOOL: ToolParam = {"name": "weather", "input_schema": {"type": "object"}}


def asked_claude(prompt: str = "one two") -> list[MessageParam]:
    return [{"role": "user", "content": prompt}]


class TestAnthropic:
    @pytest.fixture
    async def claude(self, proxy: Proxy) -> AsyncIterator[anthropic.AsyncAnthropic]:
        async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key="unused", max_retries=0) as found:
            yield found

    async def test_a_tool_to_the_end(self, claude: anthropic.AsyncAnthropic, accounted: Accounted) -> None:
        first = await claude.messages.create(
            model="chat", max_tokens=4, messages=asked_claude(), tools=[ANTHROPIC_TOOL]
        )
        call = first.content[-1]
        assert (first.stop_reason, call.type) == ("tool_use", "tool_use")
        assert call.type == "tool_use"
        messages: list[MessageParam] = [
            *asked_claude(),
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "fine"}]},
        ]
        second = await claude.messages.create(model="chat", max_tokens=4, messages=messages, tools=[ANTHROPIC_TOOL])
        assert second.stop_reason == "end_turn"
        for answer in (first, second):
            accounted(energy(answer)["id"], energy(answer)["energy_joules"])

    async def test_a_streamed_tool_call(self, claude: anthropic.AsyncAnthropic, accounted: Accounted) -> None:
        async with claude.messages.stream(
            model="chat", max_tokens=4, messages=asked_claude(), tools=[ANTHROPIC_TOOL]
        ) as stream:
            events = [event async for event in stream]
            answer = await stream.get_final_message()
        assert answer.stop_reason == "tool_use"
        assert answer.content[-1].type == "tool_use"
        (told,) = [energy(event) for event in events if event.type == "message_delta"]
        accounted(told["id"], told["energy_joules"])

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (anthropic.BadRequestError, 400),
            (anthropic.NotFoundError, 404),
            (anthropic.RateLimitError, 429),
            (anthropic.InternalServerError, 500),
        ],
    )
    async def test_errors_are_the_librarys_own(
        self,
        claude: anthropic.AsyncAnthropic,
        accounted: Accounted,
        error: type[anthropic.APIStatusError],
        status: int,
    ) -> None:
        with pytest.raises(error) as caught:
            await claude.messages.create(model="chat", max_tokens=4, messages=asked_claude(f"[[status={status}]]"))
        assert isinstance(caught.value.body, dict)
        assert caught.value.body["type"] == "error"
        accounted(caught.value.response.headers["X-Request-Id"], outcome="failed")

    async def test_retries(self, proxy: Proxy, accounted: Accounted) -> None:
        async with anthropic.AsyncAnthropic(base_url=proxy.url, api_key="unused", max_retries=1) as claude:
            with pytest.raises(anthropic.InternalServerError) as caught:
                await claude.messages.create(model="chat", max_tokens=4, messages=asked_claude("[[status=500]]"))
        assert caught.value.response.request.headers["x-stainless-retry-count"] == "1"
        accounted(caught.value.response.headers["X-Request-Id"], outcome="failed")


@pytest.mark.asyncio(loop_scope="class")  # it keeps its connections for all its models
class TestLangChain:
    @pytest.fixture
    def model(self, proxy: Proxy) -> ChatOpenAI:
        return ChatOpenAI(
            model="chat", base_url=f"{proxy.url}/v1", api_key=lambda: "unused", include_response_headers=True
        )

    async def test_asynchronous_calls_and_batches(self, model: ChatOpenAI, accounted: Accounted) -> None:
        answers = [await model.ainvoke("hi [[tokens=6]]"), *await model.abatch(["hi [[tokens=6]]"] * 3)]
        assert [answer.content for answer in answers] == [SIX] * 4
        for answer in answers:
            headers = answer.response_metadata["headers"]
            accounted(headers["x-request-id"], headers["x-energy-joules"])

    async def test_streams_with_usage(self, model: ChatOpenAI, accounted: Accounted) -> None:
        chunks = [chunk async for chunk in model.astream("hi [[tokens=6]]", stream_usage=True)]
        assert "".join(str(chunk.content) for chunk in chunks) == SIX
        (usage,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
        assert usage["output_tokens"] == 6
        accounted(chunks[0].response_metadata["headers"]["x-request-id"])

    async def test_a_tool_to_the_end(self, model: ChatOpenAI) -> None:
        bound = model.bind_tools([dict(WEATHER)])
        asks = HumanMessage("hi [[tokens=6]]")
        called = await bound.ainvoke([asks])
        (call,) = called.tool_calls
        answer = await bound.ainvoke([asks, called, ToolMessage("fine", tool_call_id=call["id"])])
        assert (call["name"], answer.content) == ("weather", SIX)

    @pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
    async def test_structured_output(self, model: ChatOpenAI, method: Any) -> None:
        shape = {"title": "answered", "type": "object", "properties": {"reason": {"type": "string"}}}
        found = await model.with_structured_output(shape, method=method).ainvoke("hi as JSON [[tokens=6]]")
        assert found == ({"reason": SIX} if method == "json_schema" else {})

    async def test_embeddings(self, proxy: Proxy) -> None:
        embed = OpenAIEmbeddings(
            model="chat", base_url=f"{proxy.url}/v1", api_key=lambda: "unused", check_embedding_ctx_length=False
        )
        assert await embed.aembed_documents(["one", "two"]) == [pytest.approx([0.6, 0.8])] * 2

    async def test_errors_and_retries(self, proxy: Proxy, model: ChatOpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            await model.ainvoke("hi", model="nope")
        with pytest.raises(openai.InternalServerError) as caught:
            await model.ainvoke("[[status=500]]")
        assert caught.value.response.request.headers["x-stainless-retry-count"] == "2"


class TestHub:
    async def test_asynchronous_calls(self, proxy: Proxy) -> None:
        async with AsyncInferenceClient(base_url=f"{proxy.url}/v1", api_key="unused") as hub:
            answer = await hub.chat_completion(
                [{"role": "user", "content": "hi [[tokens=6]]"}], model="chat", tools=[json.loads(json.dumps(WEATHER))]
            )
            assert answer.choices[0].message.tool_calls is not None
            stream = await hub.chat_completion(
                [{"role": "user", "content": "hi [[tokens=6]]"}], model="chat", stream=True
            )
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == SIX


def test_without_a_key_the_library_says_so(tmp_path: Path) -> None:
    keys = [key("ann", "sk-ann")]
    with running(tmp_path, models=MODELS[:1], auth={"required": True, "keys": keys}) as proxy:
        with openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="sk-bob") as stranger:
            with pytest.raises(openai.AuthenticationError) as caught:
                stranger.chat.completions.create(model="chat", messages=asked())
            assert caught.value.code == "invalid_api_key"
        with (
            anthropic.Anthropic(base_url=proxy.url, api_key="sk-bob") as other,
            pytest.raises(anthropic.AuthenticationError),
        ):
            other.messages.create(model="chat", max_tokens=4, messages=asked_claude())
        with anthropic.Anthropic(base_url=proxy.url, api_key="sk-ann") as ann:
            assert ann.messages.create(model="chat", max_tokens=4, messages=asked_claude()).content
