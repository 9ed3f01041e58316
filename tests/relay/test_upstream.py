"""The client of the data path against raw servers: whatever a backend writes, in whatever pieces."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from proxy.relay.upstream import Answer, BrokeOff, Unreachable, Upstream

BODY = b'{"object":"x"}'
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n" + BODY
CHUNKED = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\n{"obje\r\n8\r\nct":"x"}\r\n0\r\n\r\n'
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + BODY
HEAD = b"Content-Type: application/json\r\n"

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """`connections` counts those accepted, `requests` holds the heads and bodies that came."""

    def __init__(self) -> None:
        self.url = ""
        self.connections = 0
        self.requests: list[bytes] = []


@asynccontextmanager
async def serving(*answers: bytes, pieces: int = 0, close: bool = False) -> AsyncIterator[tuple[Server, Upstream]]:
    """A server that gives these answers in turn, the last one ever again, `pieces` bytes at a time."""
    server, upstream = Server(), Upstream(connect_seconds=2)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
                server.requests.append(head + await reader.readexactly(length))
                answer = answers[min(len(server.requests), len(answers)) - 1]
                for at in range(0, len(answer), pieces or len(answer) or 1):
                    writer.write(answer[at : at + (pieces or len(answer))])
                    await writer.drain()
                    if pieces:
                        await asyncio.sleep(0)
                if close:
                    break
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/x"
    try:
        yield server, upstream
    finally:
        await upstream.close()
        listening.close()


async def whole(answer: Answer) -> bytes:
    try:
        return await answer.whole()
    finally:
        answer.abort()


@pytest.mark.parametrize("pieces", [0, 1, 7])
@pytest.mark.parametrize(("answer", "close"), [(PLAIN, False), (CHUNKED, False), (UNTIL_CLOSED, True)])
async def test_however_a_body_is_framed_and_cut_it_is_whole(answer: bytes, close: bool, pieces: int) -> None:
    async with serving(answer, pieces=pieces, close=close) as (server, upstream):
        got = await upstream.post(server.url, b"{}", HEAD)
        assert got.status == 200
        assert await whole(got) == BODY


async def test_connections_are_used_again_by_one_after_the_other() -> None:
    async with serving(PLAIN) as (server, upstream):
        for _ in range(5):
            assert await whole(await upstream.post(server.url, b"{}", HEAD)) == BODY
        assert server.connections == 1
        both = await asyncio.gather(*(upstream.post(server.url, b"{}", HEAD) for _ in range(2)))
        assert [await whole(answer) for answer in both] == [BODY, BODY]
        assert server.connections == 2


async def test_the_request_is_sent_as_given_with_its_length_and_asks_for_no_compression() -> None:
    async with serving(PLAIN) as (server, upstream):
        await whole(await upstream.post(server.url + "?a=b", b'{"x":1}', HEAD))
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/x?a=b HTTP/1.1"
    assert {b"Accept-Encoding: identity", b"Content-Length: 7", b"Content-Type: application/json"} <= set(lines)
    assert body == b'{"x":1}'


async def test_a_long_body_arrives_whole() -> None:
    body = b"x" * 3_000_000
    async with serving(PLAIN) as (server, upstream):
        assert await whole(await upstream.post(server.url, body, HEAD)) == BODY
    assert server.requests[0].endswith(b"\r\n\r\n" + body)


async def test_heads_that_only_announce_another_are_passed_over() -> None:
    async with serving(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + PLAIN) as (
        server,
        up,
    ):
        answer = await up.post(server.url, b"{}", HEAD)
        assert (answer.status, answer.header("link")) == (200, None)
        assert await whole(answer) == BODY


async def test_nobody_there_is_unreachable_and_not_lost() -> None:
    upstream = Upstream(connect_seconds=2)
    with pytest.raises(Unreachable) as refused:
        await upstream.post("http://127.0.0.1:1/v1/x", b"{}", HEAD)
    assert not refused.value.lost


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-"])
async def test_a_connection_closed_before_the_head_is_lost(answer: bytes) -> None:
    async with serving(answer, close=True) as (server, upstream):
        with pytest.raises(Unreachable) as lost:
            await upstream.post(server.url, b"{}", HEAD)
        assert lost.value.lost


@pytest.mark.parametrize("answer", [PLAIN[:-3], CHUNKED[:-5], CHUNKED[:60]])
async def test_a_body_cut_short_broke_off(answer: bytes) -> None:
    async with serving(answer, close=True) as (server, upstream):
        got = await upstream.post(server.url, b"{}", HEAD)
        with pytest.raises(BrokeOff):
            await whole(got)


@pytest.mark.parametrize("garbage", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nA: b\r\n" + b"X: y\r\n" * 60_000])
async def test_what_is_no_http_or_has_no_end_is_not_waited_for(garbage: bytes) -> None:
    async with serving(garbage) as (server, upstream):
        with pytest.raises((Unreachable, BrokeOff)):
            await upstream.post(server.url, b"{}", HEAD)


async def test_two_answers_to_one_request_are_not_taken_for_the_next_ones() -> None:
    other = PLAIN.replace(b"x", b"y")
    async with serving(PLAIN + other, PLAIN) as (server, upstream):
        for _ in range(2):
            assert await whole(await upstream.post(server.url, b"{}", HEAD)) == BODY
        assert server.connections == 2


async def test_an_answer_not_read_to_its_end_closes_its_connection() -> None:
    async with serving(CHUNKED[:60], PLAIN) as (server, upstream):
        (await upstream.post(server.url, b"{}", HEAD)).abort()
        assert await whole(await upstream.post(server.url, b"{}", HEAD)) == BODY
        assert server.connections == 2


async def test_pump_hands_on_what_comes_and_raises_what_its_taker_raises() -> None:
    taken: list[bytes] = []
    async with serving(CHUNKED, pieces=10) as (server, upstream):
        answer = await upstream.post(server.url, b"{}", HEAD)
        await answer.pump(taken.append)
        answer.abort()
        assert b"".join(taken) == BODY

        def refuse(_: bytes) -> None:
            raise ValueError("an event without end")

        answer = await upstream.post(server.url, b"{}", HEAD)
        with pytest.raises(ValueError, match="without end"):
            await answer.pump(refuse)
        answer.abort()


async def test_a_paused_answer_makes_the_backend_wait() -> None:
    size = 40 * 1024 * 1024
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(size // 65536):
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    upstream = Upstream()
    answer = await upstream.post(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/", b"", HEAD)
    got = 0

    def take(data: bytes) -> None:
        nonlocal got
        got += len(data)

    answer.pause()
    pumping = asyncio.ensure_future(answer.pump(take))
    await asyncio.sleep(0.3)
    assert sent < size / 2, "the backend was not held up"
    answer.resume()
    await pumping
    assert got == size
    answer.abort()
    await upstream.close()
    listening.close()


@asynccontextmanager
async def raw(handle: Handler) -> AsyncIterator[tuple[str, Upstream]]:
    """A server whose connections are handled so."""
    upstream = Upstream(connect_seconds=2)
    listening = await asyncio.start_server(handle, "127.0.0.1", 0, limit=1024)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/x", upstream
    finally:
        await upstream.close()
        listening.close()


TRAILED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'e\r\n{"object":"x"}\r\n0\r\nX-Late: 1\r\n\r\n'
)


async def test_trailers_are_no_headers() -> None:
    async with serving(TRAILED) as (server, upstream):
        got = await upstream.post(server.url, b"{}", HEAD)
        assert await whole(got) == BODY
        assert got.header("x-late") is None


async def test_a_body_behind_a_long_head_is_no_part_of_it() -> None:
    head = b"HTTP/1.1 200 OK\r\nX-Filler: " + b"x" * 200_000 + b"\r\n"
    body = b"x" * 2_000_000

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(head)
        await asyncio.sleep(0.1)
        writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async with raw(handle) as (url, upstream):
        got = await upstream.post(url, b"{}", HEAD)
        assert await whole(got) == body


async def test_an_answer_up_to_the_connections_end_that_its_taker_refuses_is_not_whole() -> None:
    async with serving(UNTIL_CLOSED, close=True) as (server, upstream):
        got = await upstream.post(server.url, b"{}", HEAD)

        def take(data: bytes) -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await got.pump(take)
        got.abort()


async def test_an_error_of_whoever_takes_the_last_bytes_is_not_lost() -> None:
    async with serving(CHUNKED, pieces=7) as (server, upstream):
        got = await upstream.post(server.url, b"{}", HEAD)
        seen = b""

        def take(data: bytes) -> None:
            nonlocal seen
            seen += data
            if seen == BODY:
                raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await got.pump(take)
        got.abort()


async def test_what_comes_in_one_read_with_bytes_too_many_is_not_lost() -> None:
    body = b'{"obje'
    first, rest = CHUNKED[: CHUNKED.index(body) + len(body)], CHUNKED[CHUNKED.index(body) + len(body) :]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(first)
        await asyncio.sleep(0.1)
        writer.write(rest + PLAIN)

    async with raw(handle) as (url, upstream):
        got = await upstream.post(url, b"{}", HEAD)
        seen: list[bytes] = []
        await got.pump(seen.append)
        got.abort()
        assert b"".join(seen) == BODY


async def test_a_connection_with_a_request_not_wholly_sent_is_not_used_again() -> None:
    connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(PLAIN)
        await asyncio.sleep(5)

    async with raw(handle) as (url, upstream):
        got = await upstream.post(url, b"x" * 50_000_000, HEAD)
        assert await whole(got) == BODY
        async with asyncio.timeout(3):
            got = await upstream.post(url, b"{}", HEAD)
        assert await whole(got) == BODY
    assert connections == 2


async def test_a_server_that_hangs_up_at_once_is_not_waited_for() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with raw(handle) as (url, upstream):
        for _ in range(20):
            with pytest.raises(Unreachable):
                async with asyncio.timeout(5):
                    await upstream.post(url, b"{}", HEAD)
