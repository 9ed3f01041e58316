"""Connections as raw bytes: what well-behaved clients never do harms nobody and costs nothing."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from proxy.api.protocol import HEAD_BYTES, Protocol
from tests.e2e.harness import Proxy, until

LONG = "hi [[tokens=2000 token_ms=10]]"


@contextlib.contextmanager
def connected(proxy: Proxy) -> Iterator[socket.socket]:
    parts = urlsplit(proxy.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        yield connection


def request(prompt: str, *, stream: bool = False) -> bytes:
    body = json.dumps({"model": "chat", "stream": stream, "messages": [{"role": "user", "content": prompt}]}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_until(connection: socket.socket, mark: bytes, times: int = 1) -> bytes:
    got = b""
    while got.count(mark) < times and (data := connection.recv(65536)):
        got += data
    return got


def active(proxy: Proxy) -> int:
    found: int = proxy.truth()["active"]
    return found


def test_pipelined_requests_are_answered_in_order(proxy: Proxy) -> None:
    with connected(proxy) as connection:
        connection.sendall(request("hi [[tokens=2]]") + request("hi [[status=429]]") + request("hi [[tokens=3]]"))
        got = read_until(connection, b"HTTP/1.1 ", 3)
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200", b"429", b"200"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
def test_a_client_that_pipelined_and_leaves_frees_the_backend(proxy: Proxy, *, stream: bool, at_once: bool) -> None:
    with connected(proxy) as connection:
        requests = request(LONG, stream=stream), request("hi [[tokens=2]]")
        connection.sendall(requests[0])
        if not at_once:
            until(lambda: active(proxy) == 1)
        connection.sendall(requests[1])
        until(lambda: active(proxy) == 1)
        time.sleep(0.1)
    until(lambda: active(proxy) == 0, 5)
    until(proxy.settled)


@pytest.mark.parametrize("piece", [b"X-Filler: " + b"x" * 1000 + b"\r\n", b"x" * 1000])
def test_a_head_without_end_is_431(proxy: Proxy, piece: bytes) -> None:
    with connected(proxy) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: x\r\nX-Long: ")
        with contextlib.suppress(OSError):  # it hangs up amid what we send
            for _ in range(10 * HEAD_BYTES // len(piece)):
                connection.sendall(piece)
                time.sleep(0.0005)
        with contextlib.suppress(ConnectionResetError):
            got = connection.recv(65536)
            assert got.startswith(b"HTTP/1.1 431 ")
            assert set(json.loads(got.split(b"\r\n\r\n")[1])["error"]) == {"message", "type", "param", "code"}
            assert connection.recv(1) == b""


def test_a_long_body_is_no_long_head(proxy: Proxy) -> None:
    assert proxy.post("/classify", {"model": "sentiment", "input": "x " * HEAD_BYTES}).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /"])
def test_a_head_that_takes_too_long_is_hung_up(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(Protocol, "head_seconds", 0.3)
    with connected(proxy) as connection:
        connection.sendall(sent)
        got = read_until(connection, b"no such mark")
    assert b"HTTP/1.1 408 " in got
    assert got.count(b"HTTP/1.1 200 ") == sent.count(b"\r\n\r\n")


@pytest.mark.parametrize("cut", [10, 200, -1])
def test_a_client_that_leaves_amid_its_request_leaves_nothing_behind(proxy: Proxy, cut: int) -> None:
    with connected(proxy) as connection:
        connection.sendall(request(LONG)[:cut])
        time.sleep(0.1)
    assert active(proxy) == 0
    assert proxy.client.get("/health").status_code == 200
    until(proxy.settled)
