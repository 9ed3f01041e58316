"""The official clients work unchanged, and see the energy."""

import base64

import openai
import pytest

from tests.e2e.harness import Proxy


@pytest.fixture
def client(proxy: Proxy) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="unused", max_retries=0)


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "hi [[tokens=6]]"}])
    assert answer.choices[0].message.content
    assert answer.usage
    assert answer.usage.completion_tokens == 6
    assert answer.model_extra
    assert answer.model_extra["energy"]["object"] == "energy.receipt"


def test_streamed_chat_sees_energy_in_the_usage_chunk(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="chat",
        messages=[{"role": "user", "content": "hi [[tokens=6]]"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert last.usage
    assert last.model_extra
    assert last.model_extra["energy"]["energy_joules"] is not None


def test_a_stream_without_usage_is_as_from_openai(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": "hi [[tokens=6]]"}], stream=True
    )
    assert all(chunk.choices for chunk in stream)


def test_images(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="painter", prompt="a red apple", n=2)
    assert answer.data
    assert len(answer.data) == 2
    assert base64.b64decode(answer.data[0].b64_json or "").startswith(b"\x89PNG")
    assert answer.model_extra
    assert answer.model_extra["energy"]["task"] == "image"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["chat", "observed", "sentiment", "painter"]
    assert client.models.retrieve("chat").id == "chat"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="chat", messages="hi")  # type: ignore[arg-type] # on purpose
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model="chat", messages=[{"role": "user", "content": "hi [[status=429]]"}])
    with pytest.raises(openai.APIError):
        list(
            client.chat.completions.create(
                model="chat", messages=[{"role": "user", "content": "hi [[tokens=20 cut_after=3]]"}], stream=True
            )
        )


async def test_the_asynchronous_client(proxy: Proxy) -> None:
    async with openai.AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="unused") as client:
        stream = await client.chat.completions.create(
            model="chat", messages=[{"role": "user", "content": "hi [[tokens=6]]"}], stream=True
        )
        assert len([chunk async for chunk in stream]) >= 6
