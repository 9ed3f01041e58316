"""The llamacpp backend with a real model: the starter model, as the supervisor runs it."""

import asyncio
import json
import logging
import re
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from backends.llamacpp import KIND
from backends.spec import BackendError, BackendSpec, Launch
from backends.supervisor import Supervisor

SECRET = "xylophonist"


def spec(**fields: Any) -> BackendSpec:
    return BackendSpec(**{"name": "chat", "kind": "llamacpp", "model": "starter:smollm2", **fields})


def launch(**fields: Any) -> Launch:
    launch = KIND.launch(spec(**fields), 1, Path("/none"))
    assert launch
    return launch


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[str]:
    """The starter model's URL, one for all tests: it takes seconds to start on a busy machine."""
    with tempfile.TemporaryDirectory(prefix="jg-") as directory:
        starter = spec(args={"parallel": 2, "ctx_size": 2048})
        supervisor = Supervisor([starter], run_dir=Path(directory) / "run", on_change=lambda status: None)
        await supervisor.start()
        try:
            async with asyncio.timeout(120):
                await supervisor.wait_ready()
            yield str(supervisor.statuses()["chat"].url)
        finally:
            await supervisor.close()


def chat(words: str = "Say hello.", **fields: Any) -> dict[str, Any]:
    return {"model": "chat", "messages": [{"role": "user", "content": words}], "max_tokens": 8, **fields}


async def post(url: str, body: Any) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as client, client.post(url, json=body) as response:
        return response.status, await response.json()


@pytest.mark.asyncio(loop_scope="module")
async def test_it_chats_and_completes(engine: str) -> None:
    status, answer = await post(f"{engine}/v1/chat/completions", chat())
    assert status == 200
    assert answer["choices"][0]["message"]["content"]
    assert 0 < answer["usage"]["completion_tokens"] <= 8
    status, answer = await post(f"{engine}/v1/completions", {"model": "chat", "prompt": "One, two,", "max_tokens": 4})
    assert status == 200
    assert answer["choices"][0]["text"]


@pytest.mark.asyncio(loop_scope="module")
async def test_requests_run_beside_each_other_and_usage_comes_with_a_stream(engine: str) -> None:
    body = chat(stream=True, stream_options={"include_usage": True}, max_tokens=4)

    async def events() -> list[Any]:
        async with aiohttp.ClientSession() as client, client.post(f"{engine}/v1/chat/completions", json=body) as told:
            lines = (await told.text()).split("\n\n")
        assert lines[-2] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    for stream in await asyncio.gather(*(events() for _ in range(4))):
        assert stream[-1]["usage"]["completion_tokens"] <= 4
        assert stream[-1]["choices"] == []


@pytest.mark.asyncio(loop_scope="module")
async def test_a_client_that_leaves_ends_the_generation_and_no_prompt_is_logged(
    engine: str, caplog: pytest.LogCaptureFixture
) -> None:
    body = chat(f"Count to a thousand, {SECRET}.", stream=True, max_tokens=1900, ignore_eos=True)
    with caplog.at_level(logging.DEBUG):
        async with aiohttp.ClientSession() as client, client.post(f"{engine}/v1/chat/completions", json=body) as told:
            await told.content.readline()
        async with asyncio.timeout(60):
            while "cancel task" not in caplog.text:  # noqa: ASYNC110 - the engine's own word, in its log
                await asyncio.sleep(0.05)
    assert SECRET not in caplog.text


@pytest.mark.asyncio(loop_scope="module")
async def test_what_only_an_operator_should_see_is_off(engine: str) -> None:
    async with aiohttp.ClientSession() as client:
        for path in ("/slots", "/metrics", "/", "/tools", "/cors-proxy"):
            async with client.get(engine + path) as response:
                assert response.status in {403, 404, 501}, path
        async with client.get(f"{engine}/v1/models", headers={"Origin": "http://elsewhere.example"}) as response:
            assert response.headers.get("Access-Control-Allow-Origin") not in {"*", "http://elsewhere.example"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "/nowhere/model.gguf"}, "there is no file /nowhere/model.gguf"),
        ({"model": None}, "needs model"),
        ({"model": __file__}, "is not a GGUF file"),
        ({"args": {"nonsense": 1}}, "args.nonsense: no such argument"),
        ({"args": {"parallel": 0}}, "args.parallel: requests generated at once, at least 1, not 0"),
        ({"args": {"ctx-size": "many"}}, "args.ctx-size"),
    ],
)
def test_what_cannot_be_started_is_named_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=re.escape(message)) as caught:
        launch(**fields)
    assert "\n" not in str(caught.value)


def test_arguments_become_flags() -> None:
    command = launch(args={"ctx_size": 128, "flash-attn": False}).command
    assert "--ctx-size=128" in command
    assert "--flash-attn=off" in command
