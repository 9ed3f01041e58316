"""A crowd of streaming clients on raw sockets, in a process of its own; prints what each saw as one JSON object.

    python -m tests.e2e.crowd HOST PORT STREAMS CUT_EVERY

All have their streams open before any gets a token. Every CUT_EVERYth hangs up after its fifth event, without a word.
"""

import asyncio
import json
import re
import sys

_TOKENS = 40
_CUT_AFTER = 5
_AT_ONCE = 100  # that connect


async def stream(host: str, port: int, size: int, turn: asyncio.Semaphore, *, cut: bool) -> tuple[str, object]:
    """One client: its request's id, and the energy comment's object, or None if it hung up."""
    prompt = f"hi [[tokens={_TOKENS} gather={size} token_ms=60]]"
    asked = {"model": "chat", "stream": True, "messages": [{"role": "user", "content": prompt}]}
    body = json.dumps(asked).encode()
    async with turn:
        reader, writer = await asyncio.open_connection(host, port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        answered = await reader.readuntil(b"\r\n\r\n")
    assert answered.startswith(b"HTTP/1.1 200 "), answered
    id_ = re.search(rb"x-request-id: (\w+)", answered)
    assert id_
    got = b""
    while not (cut and got.count(b"data: ") >= _CUT_AFTER) and not got.endswith(b"\r\n0\r\n\r\n"):
        data = await reader.read(65536)
        assert data, "the proxy hung up"
        got += data
    writer.transport.abort() if cut else writer.close()
    if cut:
        return id_[1].decode(), None
    assert got.count(b"data: ") == _TOKENS + 1
    comment = re.search(rb": energy (\{.*\})\n\ndata: \[DONE\]\n\n", got)
    assert comment, got
    return id_[1].decode(), json.loads(comment[1])


async def crowd(host: str, port: int, size: int, every: int) -> dict[str, object]:
    turn = asyncio.Semaphore(_AT_ONCE)
    clients = [stream(host, port, size, turn, cut=number % every == 0) for number in range(size)]
    return dict(await asyncio.gather(*clients))


if __name__ == "__main__":
    host, port, size, every = sys.argv[1:]
    json.dump(asyncio.run(crowd(host, int(port), int(size), int(every))), sys.stdout)
