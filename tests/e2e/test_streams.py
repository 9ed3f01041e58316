"""Streams: bytes as they come, the receipt at their end, and the backend told when the client leaves."""

import asyncio
import contextlib
import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.e2e.harness import MODELS, Proxy, energy_comment, events, running, until

PROMPT = "one two [[tokens=20 token_ms=5]]"


def chat(prompt: str = PROMPT, **more: Any) -> dict[str, Any]:
    return {"model": "chat", "stream": True, "messages": [{"role": "user", "content": prompt}], **more}


def test_the_head_of_a_stream_promises_figures_and_gives_none(proxy: Proxy) -> None:
    with proxy.client.stream("POST", "/v1/chat/completions", json=chat()) as answer:
        headers = dict(answer.headers)
        answer.read()
    assert headers["x-energy-status"] == "pending"
    assert headers["content-type"].startswith("text/event-stream")
    assert {"x-energy-joules", "x-energy-interval-joules", "x-carbon-grams"}.isdisjoint(headers)
    assert headers["link"] == f'</v1/energy/receipts/{headers["x-request-id"]}>; rel="energy-receipt"'


def test_a_client_that_asked_for_usage_gets_energy_beside_it(proxy: Proxy) -> None:
    text = proxy.post("/v1/chat/completions", chat(stream_options={"include_usage": True})).text
    *_, usage, done = events(text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 20
    assert usage["energy"]["energy_joules"] > 0
    assert usage["energy"] == energy_comment(text)


def test_a_client_that_did_not_ask_sees_no_usage_chunk(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", chat())
    found = events(answer.text)
    assert found[-1] == "[DONE]"
    assert all(event["choices"] for event in found[:-1])
    assert not any(event.get("usage") for event in found[:-1])
    comment = energy_comment(answer.text)
    assert comment["id"] == answer.headers["X-Request-Id"]
    assert comment["joules_per_output_token"] == pytest.approx(comment["energy_joules"] / 20, rel=1e-3)
    assert answer.text.rstrip().endswith("data: [DONE]")
    assert answer.text.split("\n\n")[-3].startswith(": energy ")


@pytest.mark.parametrize("command", ["dribble", "crlf", "no_done"])
def test_however_the_backend_writes_the_stream_is_whole(proxy: Proxy, command: str) -> None:
    found = events(proxy.post("/v1/chat/completions", chat(f"hi [[tokens=5 {command}]]")).text)
    assert found[-1] == "[DONE]"
    assert sum(1 for event in found[:-1] if event["choices"][0]["delta"].get("content")) == 5


def test_x_energy_body_off_leaves_a_stream_untouched(proxy: Proxy) -> None:
    text = proxy.post("/v1/chat/completions", chat(), **{"X-Energy-Body": "off"}).text
    assert ": energy" not in text
    assert text.rstrip().endswith("data: [DONE]")


def test_chunks_leave_as_they_come(proxy: Proxy) -> None:
    came = []
    with proxy.client.stream("POST", "/v1/chat/completions", json=chat("hi [[tokens=10 token_ms=50]]")) as answer:
        for _ in answer.iter_raw():
            came.append(time.monotonic())
    assert came[-1] - came[0] > 0.3


def test_streamed_images_carry_the_receipt_in_the_completed_event(proxy: Proxy) -> None:
    body = {"model": "painter", "prompt": "a cat", "stream": True, "num_inference_steps": 4}
    text = proxy.post("/v1/images/generations", body).text
    last = events(text)[-1]
    assert last["type"] == "image_generation.completed"
    assert last["energy"] == energy_comment(text)
    assert text.index(": energy") < text.index("image_generation.completed")


def test_pictures_that_come_one_after_the_other_all_arrive(proxy: Proxy) -> None:
    body = {"model": "painter", "prompt": "a cat [[between_ms=2500]]", "stream": True, "n": 3}
    text = proxy.post("/v1/images/generations", body).text
    pictures = [event for event in events(text) if event["type"] == "image_generation.completed"]
    assert ["energy" in picture for picture in pictures] == [False, False, True]
    assert energy_comment(text)["outcome"] == "completed"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_backend_and_pays_for_what_it_burnt(proxy: Proxy, stream: bool) -> None:
    body = chat("hi [[tokens=2000 token_ms=10]]") | {"stream": stream}
    url = proxy.node.registry.states["chat"].url
    before = httpx.get(f"{url}/fake/truth").json()["cancelled"]
    known = set(truth(proxy))
    with contextlib.suppress(TimeoutError):
        leave_after(0.4, f"{proxy.url}/v1/chat/completions", body)
    until(lambda: httpx.get(f"{url}/fake/truth").json()["active"] == 0, 5)
    assert httpx.get(f"{url}/fake/truth").json()["cancelled"] == before + 1
    (id_,) = set(truth(proxy)) - known
    receipt = until(lambda: (found := proxy.receipt(id_))["status"] == "settled" and found)
    assert receipt["outcome"] == "cancelled"
    assert receipt["energy_joules"] > 5  # of the 80 J that the device used meanwhile, less what is idle


def test_tokens_of_the_steps_are_those_of_the_usage(proxy: Proxy) -> None:
    body = chat("a b c d e [[tokens=12]]", n=2, stream_options={"include_usage": True})
    answer = proxy.post("/v1/chat/completions", body)
    usage = events(answer.text)[-2]["usage"]
    work = truth(proxy)[answer.headers["X-Request-Id"]]
    assert usage["completion_tokens"] == 24
    assert work["sequences"] == 2
    receipt = proxy.receipt(answer.headers["X-Request-Id"])
    assert receipt["method"] == "measured-steps"


def leave_after(seconds: float, url: str, body: dict[str, Any]) -> None:
    """Send a request and close the connection midway, whether the answer has begun or not."""

    async def send() -> None:
        async with httpx.AsyncClient() as client, asyncio.timeout(seconds):
            await client.post(url, json=body)

    asyncio.run(send())


def truth(proxy: Proxy) -> dict[str, Any]:
    url = proxy.node.registry.states["chat"].url
    found: dict[str, Any] = httpx.get(f"{url}/fake/truth").json()["requests"]
    return found


def test_a_stream_that_asks_for_other_options_keeps_them(proxy: Proxy) -> None:
    proxy.post("/v1/chat/completions", chat("hi", stream_options={"include_usage": False, "chunk": 3}))
    url = proxy.node.registry.states["chat"].url
    body = httpx.get(f"{url}/fake/requests").json()[-1]["body"]
    sent = json.loads(body) if isinstance(body, str) else body
    assert sent["stream_options"] == {"include_usage": True, "chunk": 3}


def test_a_backend_that_says_it_is_done_and_does_not_end_is_not_waited_for(proxy: Proxy) -> None:
    text = proxy.post("/v1/chat/completions", chat("hi [[tokens=3 token_ms=1 endless]]")).text
    receipt = energy_comment(text)
    assert (receipt["outcome"], events(text)[-1]) == ("completed", "[DONE]")
    until(lambda: proxy.truth()["active"] == 0, 10)
    assert proxy.post("/v1/chat/completions", chat()).status_code == 200


def test_a_silent_streams_client_sees_signs_of_life(tmp_path: Path) -> None:
    with running(tmp_path, models=MODELS[:1], server={"keep_alive_seconds": 0.2}) as proxy:
        text = proxy.post("/v1/chat/completions", chat("hi [[tokens=3 token_ms=700]]")).text
        assert text.count(": keep-alive\n\n") >= 3
        assert sum(1 for event in events(text)[:-1] if event["choices"][0]["delta"].get("content")) == 3
        assert energy_comment(text)["outcome"] == "completed"


def test_signs_of_life_come_before_the_backend_has_said_anything_and_errors_still_reach_the_client(
    tmp_path: Path,
) -> None:
    server = {"keep_alive_seconds": 0.2, "timeouts": {"first_byte": 1.0}}
    with running(tmp_path, models=MODELS[:1], server=server) as proxy:
        answer = proxy.post("/v1/chat/completions", chat("hi [[head_ms=3000]]"))
        assert answer.status_code == 200
        assert answer.text.startswith(": keep-alive\n\n")
        failure, done = events(answer.text)
        assert failure["error"]["code"] == "timeout"
        assert done == "[DONE]"
        assert energy_comment(answer.text)["outcome"] == "failed"
        plain = proxy.post("/v1/chat/completions", chat("hi [[head_ms=3000]]") | {"stream": False})
        assert plain.status_code == 504


def test_a_client_that_reads_slowly_holds_up_its_backend_and_not_the_proxys_memory(proxy: Proxy) -> None:
    parts = urlsplit(proxy.url)
    body = json.dumps(chat("hi [[tokens=400 big=200000 token_ms=1]]")).encode()
    before = psutil.Process().memory_info().rss
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(2.0)
        assert psutil.Process().memory_info().rss - before < 30 * 1024 * 1024
        got = 0
        while data := connection.recv(1 << 20):
            got += len(data)
            if data.endswith(b"0\r\n\r\n"):
                break
    assert got > 80_000_000
