"""Whose turn it is on a connection: answers in their order, none twice, and no connection kept for nothing."""

import json
import re
import socket
import time
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from proxy.api.protocol import Protocol
from tests.e2e.harness import Proxy, until
from tests.e2e.test_connections import active, connected, read_until, request

#: Refused as soon as its head is there: no form is due.
REFUSED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\n"
)


def closed_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        return connection.recv(65536) == b""
    except TimeoutError:
        return False


def test_a_connection_whose_request_was_answered_before_its_body_came_is_not_kept_for_ever(proxy: Proxy) -> None:
    with connected(proxy) as connection:
        connection.sendall(REFUSED)
        assert read_until(connection, b"}}").startswith(b"HTTP/1.1 400 ")
        connection.sendall(b"hello")
        assert closed_within(connection, 9)


def test_bytes_between_requests_do_not_keep_a_connection(proxy: Proxy) -> None:
    with connected(proxy) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        read_until(connection, b"}")
        connection.sendall(b"\r\n")
        assert closed_within(connection, 9)


def test_a_body_that_is_too_slow_is_not_answered_amid_the_answer_before_it(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Protocol, "body_seconds", 0.3)
    with connected(proxy) as connection:
        connection.sendall(request("hi [[tokens=1000 token_ms=10]]", stream=True))
        connection.sendall(request("hi")[:-3])
        got = read_until(connection, b"no such mark")
    assert got.count(b"HTTP/1.1 ") == 1
    until(proxy.settled)


def test_many_wrong_requests_in_advance_are_answered_one_by_one(proxy: Proxy) -> None:
    wrong = b"POST /v1/embeddings HTTP/1.1\r\n\r\n"
    with connected(proxy) as connection:
        connection.sendall(request("hi [[tokens=5 token_ms=20]]") + wrong * 300)
        got = read_until(connection, b"\r\ncontent-length: ", 301)
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200"] + [b"400"] * 300


def test_a_client_that_leaves_before_its_body_has_come_is_counted_once(proxy: Proxy) -> None:
    def left() -> float:
        return (
            proxy.metric("joulegate_requests_total", code="499", endpoint="/v1/chat/completions", model="unknown") or 0
        )

    before = left()
    with connected(proxy) as connection:
        connection.sendall(request("hi")[:-3])
        time.sleep(0.1)
    until(lambda: left() > before)
    assert left() == before + 1


def test_what_follows_a_request_that_closes_the_connection_reaches_no_backend(proxy: Proxy) -> None:
    received = proxy.truth()["received"]
    last = REFUSED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"hello"
    with connected(proxy) as connection:
        connection.sendall(last + request("hi"))
        got = read_until(connection, b"no such mark")
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"400"]
    assert proxy.truth()["received"] == received


def test_a_client_that_does_not_read_its_answers_is_not_read_from(proxy: Proxy) -> None:
    wrong = b"POST /v1/embeddings HTTP/1.1\r\n\r\n" * 200_000
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.connect((urlsplit(proxy.url).hostname, urlsplit(proxy.url).port))
        connection.settimeout(3)
        with pytest.raises(TimeoutError):
            connection.sendall(wrong)
        connection.settimeout(20)
        got = 0
        while got < 1_000_000 and (data := connection.recv(65536)):
            got += len(data)
    assert got >= 1_000_000


def test_a_client_that_reads_late_gets_all_that_it_asked_for_in_advance(proxy: Proxy) -> None:
    with connected(proxy) as connection:
        connection.sendall(request("hi [[tokens=3000 big=2000 token_ms=0]]", stream=True) + request("hi") * 12)
        time.sleep(1)
        got = read_until(connection, b"\r\ncontent-length: ", 12)
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200"] * 13


def test_two_requests_in_advance_that_both_offer_an_upgrade_get_the_first_one_answered(proxy: Proxy) -> None:
    offer = request("hi [[tokens=2]]").replace(b"\r\n\r\n", b"\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", 1)
    with connected(proxy) as connection:
        connection.sendall(offer + offer)
        assert read_until(connection, b'"usage"').startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("then", [b"", b"POST /v1/chat/comp", request("hi")[:-5], request("hi")])
def test_a_client_that_never_reads_its_last_answer_does_not_keep_its_connection(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, then: bytes
) -> None:
    monkeypatch.setattr(Protocol, "head_seconds", 2.0)
    monkeypatch.setattr(Protocol, "body_seconds", 2.0)
    monkeypatch.setattr(Protocol, "unread_seconds", 2.0)
    address = urlsplit(proxy.url).hostname, urlsplit(proxy.url).port
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(address)
        connection.sendall(request("hi [[tokens=20 big=1000000 token_ms=1]]") + then)
        until(lambda: held(connection))
        until(lambda: not held(connection))


def held(connection: socket.socket) -> bool:
    """Whether the other side still has this connection, as far as its own system says."""
    own = connection.getsockname()[1]
    there = [each for each in psutil.Process().net_connections("tcp") if each.raddr and each.raddr.port == own]
    return bool(there)


def test_a_body_in_very_many_small_chunks_arrives_whole(proxy: Proxy) -> None:
    head, _, body = request("hi [[tokens=2]] " + "x" * 20_000).partition(b"\r\n\r\n")
    head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 2]), body[at : at + 2]) for at in range(0, len(body), 2))
    with connected(proxy) as connection:
        connection.sendall(head + b"\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert read_until(connection, b'"usage"').startswith(b"HTTP/1.1 200 ")
    sent = httpx.get(f"{proxy.node.registry.states['chat'].url}/fake/requests").json()[-1]["body"]
    assert (json.loads(sent) if isinstance(sent, str) else sent) == json.loads(body)


def test_after_all_of_this_nothing_is_left_behind(proxy: Proxy) -> None:
    model = proxy.node.registry.models["chat"]
    until(proxy.settled)
    until(lambda: active(proxy) == 0)
    assert model.gate.inside == 0
    assert [model.balancer.outstanding(id) for id in model.backends] == [0]
    assert proxy.metric("joulegate_requests_in_flight", model="chat") in {0, None}
    assert not proxy.on_loop(lambda: proxy.node.intake.under_way)
    proxy.check_law()
