"""Input that no honest client sends: refused (4xx in the envelope, or hung up), nothing of it reaches a backend, and
the proxy serves on. Raw sockets, because no library would send it.
"""

import contextlib
import gzip
import json
import re
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from proxy.api.protocol import HEAD_BYTES, Protocol
from tests.e2e.harness import MODELS, Proxy, running, until
from tests.e2e.test_connections import connected

BODY = b'{"model":"chat","messages":[{"role":"user","content":"hi [[tokens=2]]"}]}'
PATH = b"/v1/chat/completions"
JSON = b"Content-Type: application/json\r\n"
HEADERS = b"Host: localhost\r\n" + JSON
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def post(
    headers: bytes = HEADERS + LENGTH, body: bytes = BODY, *, path: bytes = PATH, line: bytes = b"POST %b HTTP/1.1\r\n"
) -> bytes:
    return (line % path if b"%b" in line else line) + headers + b"\r\n" + body


def with_body(body: bytes, headers: bytes = HEADERS) -> bytes:
    return post(headers + b"Content-Length: %d\r\n" % len(body), body)


HIDDEN = post()
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def conversation(proxy: Proxy, *pieces: bytes) -> list[tuple[int, bytes]]:
    """What the proxy answers to these bytes until it hangs up: the status and body of each answer."""
    got = b""
    with connected(proxy) as connection, contextlib.suppress(ConnectionError):
        with contextlib.suppress(ConnectionError):  # it may hang up before it has all
            for piece in pieces:
                connection.sendall(piece)
        while data := connection.recv(65536):
            got += data
    return list(answers(got))


def answers(got: bytes) -> Iterator[tuple[int, bytes]]:
    """Each answer among these bytes by its own framing: what stands between two of them would be noticed."""
    while got:
        head, _, got = got.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.1 (\d{3}) ", head)
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        assert status, head
        assert length, head
        yield int(status[1]), got[: int(length[1])]
        got = got[int(length[1]) :]


@pytest.fixture
def refused(proxy: Proxy) -> Iterator[Callable[..., None]]:
    """Send bytes that must be refused; afterwards no backend has heard of them and all is well."""
    before = proxy.truth()["received"]

    def send(*pieces: bytes, then: bytes = HEALTH, status: int | None = None) -> None:
        first, *others = conversation(proxy, *pieces, then) or [(400, b"")]
        assert first[0] == status if status else 400 <= first[0] < 500, first
        if first[1]:
            assert set(json.loads(first[1])["error"]) == {"message", "type", "param", "code"}
        assert others in ([], [(200, b'{"status":"ok"}')]), others

    yield send
    assert proxy.truth()["received"] == before
    served = conversation(proxy, post(HEADERS + LENGTH + b"Connection: close\r\n"))
    assert [status for status, _ in served] == [200]
    assert proxy.truth()["received"] == before + 1


def chunked(body: bytes) -> bytes:
    return post(HEADERS + CHUNKED, body)


FRAMING = {
    "length and chunks": post(HEADERS + LENGTH + CHUNKED, CHUNKS),
    "chunks and length": post(HEADERS + CHUNKED + b"Content-Length: 4\r\n", CHUNKS),
    "chunks and the whole length, another request inside": post(
        HEADERS + CHUNKED + b"Content-Length: %d\r\n" % (5 + len(HIDDEN)), b"0\r\n\r\n" + HIDDEN
    ),
    "two lengths": post(HEADERS + LENGTH + b"Content-Length: 3\r\n"),
    "two equal lengths": post(HEADERS + LENGTH + LENGTH),
    "a list of lengths": post(HEADERS + b"Content-Length: %d, %d\r\n" % (len(BODY), len(BODY))),
    "a length with a sign": post(HEADERS + b"Content-Length: +%d\r\n" % len(BODY)),
    "a length below 0": post(HEADERS + b"Content-Length: -1\r\n"),
    "a length in hexadecimal": post(HEADERS + b"Content-Length: 0x%x\r\n" % len(BODY)),
    "a length of two words": post(HEADERS + b"Content-Length: %d 1\r\n" % len(BODY)),
    "no length at all": post(HEADERS + b"Content-Length: \r\n"),
    "a length past counting": post(HEADERS + b"Content-Length: 99999999999999999999999\r\n"),
    "an encoding that is not chunked": post(HEADERS + LENGTH + b"Transfer-Encoding: identity\r\n"),
    "an encoding after chunked": post(HEADERS + b"Transfer-Encoding: chunked, gzip\r\n", CHUNKS),
    "an encoding that looks like chunked": post(HEADERS + b"Transfer-Encoding: xchunked\r\n", CHUNKS),
    "chunked twice": post(HEADERS + CHUNKED + CHUNKED, CHUNKS),
    "chunked, then identity": post(HEADERS + CHUNKED + b"Transfer-Encoding: identity\r\n", CHUNKS),
    "a space before the colon": post(HEADERS + b"Transfer-Encoding : chunked\r\n", CHUNKS),
    "a vertical tab before chunked": post(HEADERS + b"Transfer-Encoding: \x0bchunked\r\n", CHUNKS),
    "chunked on a folded line": post(HEADERS + b"Transfer-Encoding:\r\n chunked\r\n", CHUNKS),
    "a chunk below 0": chunked(b"-1\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk of no number": chunked(b"zz\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk of 0x": chunked(b"0x%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n"),
    "a chunk of no size": chunked(b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk past counting": chunked(b"f" * 18 + b"\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk that is longer than it says": chunked(b"5\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "a chunk without its end": chunked(b"%x\r\n%b0\r\n\r\n" % (len(BODY), BODY)),
    "bare line feeds in chunks": chunked(CHUNKS.replace(b"\r\n", b"\n")),
    "a bare line feed in an extension": chunked(CHUNKS.replace(b"\r\n", b";\n", 1)),
}

HEADS = {
    "bare line feeds": post().replace(b"\r\n", b"\n"),
    "a bare line feed after the first line": post(line=b"POST %b HTTP/1.1\n"),
    "a bare carriage return": post(HEADERS + LENGTH + b"X-A: a\rX-B: b\r\n"),
    "a NUL in a value": post(HEADERS + LENGTH + b"X-A: a\0b\r\n"),
    "a NUL in a name": post(HEADERS + LENGTH + b"X\0A: b\r\n"),
    "a control character": post(HEADERS + LENGTH + b"X-A: a\x01b\r\n"),
    "a space in a name": post(HEADERS + LENGTH + b"X A: b\r\n"),
    "no name": post(HEADERS + LENGTH + b": b\r\n"),
    "no colon": post(HEADERS + LENGTH + b"XA\r\n"),
    "a folded line": post(HEADERS + LENGTH + b"X-A: a\r\n b\r\n"),
    "a folded first line": post(b" X-A: a\r\n" + HEADERS + LENGTH),
    "no host": post(JSON + LENGTH),
    "two hosts": post(HEADERS + LENGTH + b"Host: localhost\r\n"),
    "a foreign host, then ours": post(b"Host: evil.example\r\n" + HEADERS + LENGTH),
    "ours, then a foreign host": post(HEADERS + LENGTH + b"Host: evil.example\r\n"),
    "an empty host": post(b"Host: \r\n" + JSON + LENGTH),
    "a host with a user": post(b"Host: localhost@evil.example\r\n" + JSON + LENGTH),
    "a host with a path": post(b"Host: localhost/evil\r\n" + JSON + LENGTH),
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "HTTP/1.2": post(line=b"POST %b HTTP/1.2\r\n"),
    "HTTP/2 in the words of HTTP/1": post(line=b"POST %b HTTP/2.0\r\n"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c403036162"),
    "nothing of the kind": b"\0\xff\xfe what?\r\n\r\n",
    "a method in small letters": post(line=b"post %b HTTP/1.1\r\n"),
    "no such method": post(line=b"STEAL %b HTTP/1.1\r\n"),
    "a method without end": post(line=b"P" * 10_000 + b" %b HTTP/1.1\r\n"),
    "a tunnel": b"CONNECT evil.example:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "the server itself": b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
}

TARGETS = {
    "steps up": b"/v1/../v1/chat/completions",
    "steps out": b"/../../fake/truth",
    "steps from what is forwarded": PATH + b"/../../../fake/truth",
    "encoded steps": b"/v1/%2e%2e/v1/chat/completions",
    "encoded slashes": b"/v1%2fchat%2Fcompletions",
    "an encoded letter": b"/v1/chat/completion%73",
    "encoded twice": b"/v1/chat/completion%2573",
    "a bad encoding": b"/v1/chat/completions%zz",
    "an encoded NUL": PATH + b"%00",
    "encoded line ends": PATH + b"%0d%0aX-Evil: 1",
    "encoded, not UTF-8": b"/v1/chat/%ff",
    "not ASCII": b"/v1/chat/\xff",
    "a NUL": b"/v1/chat\0/completions",
    "two slashes": b"//v1/chat/completions",
    "what looks like a host": b"//evil.example/v1/chat/completions",
    "a slash at the end": PATH + b"/",
    "backslashes": b"\\v1\\chat\\completions",
    "a parameter": PATH + b";x=y",
    "capitals": b"/V1/chat/completions",
    "a space": PATH + b" x",
    "no slash": PATH[1:],
    "an absolute URL": b"http://localhost" + PATH,
    "an absolute URL elsewhere": b"http://evil.example" + PATH,
    "an absolute URL with a user": b"http://localhost@evil.example" + PATH,
    "another scheme": b"file:///etc/passwd",
    "an authority": b"evil.example:80",
    "an engine's own": b"/fake/truth",
    "an engine's management": b"/v1/load_lora_adapter",
    "a pipeline in an encoded path": b"/models%2Fsentiment%2Fpipeline%2Ftext-classification",
    "a model that steps out": b"/models/../../fake/truth/pipeline/text-classification",
}


def deep(opening: bytes, closing: bytes = b"") -> bytes:
    return BODY[:-1] + b',"x":' + opening * 100_000 + b"1" + closing * 100_000 + b"}"


def saying(content: bytes) -> bytes:
    return b'{"model":"chat","messages":[{"role":"user","content":"%b"}]}' % content


BODIES = {
    "a byte that is not UTF-8": saying(b"\xff"),
    "an overlong slash": saying(b"\xc0\xaf"),
    "half of a character": saying(b"\xe2\x82"),
    "a surrogate as UTF-8": saying(b"\xed\xa0\x80"),
    "not UTF-8 where nobody looks": BODY[:-1] + b',"x":"\xff"}',
    "not UTF-8 in a name": BODY[:-1] + b',"\xff":1}',
    "UTF-16": BODY.decode().encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + BODY,
    "compressed": gzip.compress(BODY),
    "a control character": saying(b"\x01"),
    "a NUL at the end": BODY + b"\0",
    "two documents": BODY + BODY,
    "NaN": BODY[:-1] + b',"temperature":NaN}',
    "a comma too many": BODY[:-1] + b",}",
    "single quotes": BODY.replace(b'"', b"'"),
    "cut off": BODY[:-1],
    "a list": b"[" + BODY + b"]",
    "null": b"null",
    "deep lists": deep(b"[", b"]"),
    "deep objects": deep(b'{"a":', b"}"),
    "deep, without end": deep(b"["),
    "deep where it is read": b'{"model":"chat","messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a model's name without end": BODY.replace(b"chat", b"c" * 1_000_000),
}

TYPES = {
    "none": b"",
    "text": b"Content-Type: text/plain\r\n",
    "a web form": b"Content-Type: application/x-www-form-urlencoded\r\n",
    "a form with files": b"Content-Type: multipart/form-data; boundary=b\r\n",
    "what begins like JSON": b"Content-Type: application/jsonx\r\n",
    "what holds JSON": b"Content-Type: text/plain; application/json\r\n",
    "nonsense": b"Content-Type: \x80\xff;;;\r\n",
}


def each(cases: dict[str, bytes]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases)


@each(FRAMING)
def test_a_message_whose_end_can_be_read_in_two_ways(refused: Callable[..., None], case: bytes) -> None:
    refused(case, then=HIDDEN)


@each(HEADS)
def test_a_head_that_is_none(refused: Callable[..., None], case: bytes) -> None:
    refused(case)


@each(TARGETS)
def test_a_path_that_is_not_as_it_is_forwarded(refused: Callable[..., None], case: bytes) -> None:
    refused(post(path=case))


@each(BODIES)
def test_a_body_that_is_not_the_json_it_should_be(refused: Callable[..., None], case: bytes) -> None:
    refused(with_body(case))


@each(TYPES)
def test_a_body_of_another_type(refused: Callable[..., None], case: bytes) -> None:
    refused(with_body(BODY, b"Host: localhost\r\n" + case), status=400)


@pytest.mark.parametrize("head", [HEADERS, HEADERS + b"Authorization: Bearer x\r\n"])
def test_what_is_wrong_is_told_in_one_answer_amid_others(proxy: Proxy, head: bytes) -> None:
    """A second request that is none breaks in on nobody: the first is answered whole, or not at all."""
    got = conversation(proxy, post(head + LENGTH), b"NONSENSE\r\n\r\n")
    assert [status for status, _ in got] in ([], [200], [200, 400])
    until(proxy.settled)


# --- the honest neighbours of the above: they are served ---


HONEST = {
    "chunks": chunked(CHUNKS),
    "chunks with an extension": chunked(CHUNKS.replace(b"\r\n", b";name=value\r\n", 1)),
    "blank lines before": b"\r\n\r\n" + post(),
    "a query": post(path=PATH + b"?api-version=1"),
    "an escape for a character": with_body(saying("wört \\u00fc \\ud83d\\ude00".encode())),
    "nested a little": with_body(BODY[:-1] + b',"x":' + b"[" * 200 + b"]" * 200 + b"}"),
    "HTTP/1.0": post(b"Content-Type: application/json\r\n" + LENGTH, line=b"POST %b HTTP/1.0\r\n"),
    "an offer of HTTP/2, as Java's client makes it": post(
        HEADERS
        + LENGTH
        + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    ),
    "an offer of HTTP/2 with chunks": post(HEADERS + CHUNKED + b"Connection: Upgrade\r\nUpgrade: h2c\r\n", CHUNKS),
    "a wish for a WebSocket": post(HEADERS + LENGTH + b"Connection: Upgrade\r\nUpgrade: websocket\r\n"),
}


@pytest.mark.parametrize("size", [1 << 20, 7], ids=["whole", "in pieces"])
@each(HONEST)
def test_what_is_unusual_but_right_is_served(proxy: Proxy, case: bytes, size: int) -> None:
    before = proxy.truth()["received"]
    with connected(proxy) as connection:
        for at in range(0, len(case), size):
            connection.sendall(case[at : at + size])
            time.sleep(0.0005)
        got = b""
        while not re.search(rb'"usage"[^\n]+\}$', got):
            data = connection.recv(65536)
            assert data, got
            got += data
    assert got.startswith(b"HTTP/1.1 200 "), got
    assert proxy.truth()["received"] == before + 1


def test_an_upgrade_without_a_body_is_answered_as_if_none_were_wished(proxy: Proxy) -> None:
    wish = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert conversation(proxy, wish, HIDDEN) == [(200, b'{"status":"ok"}')]


def test_trailers_are_no_headers(proxy: Proxy) -> None:
    trailers = b"Host: evil.example\r\nContent-Type: text/plain\r\nOrigin: https://evil.example\r\n\r\n"
    got = conversation(proxy, chunked(CHUNKS[:-2] + trailers), HEALTH)
    assert [status for status, _ in got] == [200, 200]


# --- what does not end ---


def endless(proxy: Proxy, head: bytes, piece: bytes, most: int) -> list[tuple[int, bytes]]:
    """Send until the proxy hangs up, `most` bytes at most; what it answered."""
    got = b""
    with connected(proxy) as connection, contextlib.suppress(ConnectionError):
        try:
            connection.sendall(head)
            for _ in range(most // len(piece)):
                connection.sendall(piece)
                time.sleep(0.001)
        except ConnectionError:
            pass
        else:
            pytest.fail(f"it took {most} bytes without an end")
        while data := connection.recv(65536):
            got += data
    return list(answers(got))


FLOODS = {
    "headers": (post(HEADERS, b"")[:-2], b"X-Filler: %b\r\n" % (b"x" * 1000)),
    "small headers": (post(HEADERS, b"")[:-2], b"a:b\r\n" * 200),
    "one header": (post(HEADERS, b"")[:-2] + b"X-Long: ", b"x" * 1000),
    "a header's name": (post(HEADERS, b"")[:-2], b"x" * 1000),
    "a path": (b"POST /", b"x" * 1000),
    "blank lines": (b"", b"\r\n" * 500),
    "trailers": (chunked(CHUNKS[:-2]), b"X-Filler: %b\r\n" % (b"x" * 1000)),
    "one trailer": (chunked(CHUNKS[:-2]) + b"X-Long: ", b"x" * 1000),
    "a chunk's extension": (chunked(b"%x;" % len(BODY)), b"x" * 1000),
    "zeros of a chunk's size": (chunked(b""), b"0" * 1000),
}


@pytest.mark.parametrize(("head", "piece"), FLOODS.values(), ids=FLOODS)
def test_what_goes_on_without_end_beside_the_body_is_cut_short(proxy: Proxy, head: bytes, piece: bytes) -> None:
    before = proxy.truth()["received"]
    for status, _ in endless(proxy, head, piece, 20 * HEAD_BYTES):
        assert status in {400, 431}
    assert proxy.truth()["received"] == before
    assert proxy.client.get("/health").status_code == 200
    until(proxy.settled)


@pytest.mark.parametrize(
    ("path", "status"), [(PATH, 413), (b"/v1/nothing", 404), (b"/health", 405), (b"/v1/energy/devices", 405)]
)
@pytest.mark.parametrize("framing", [CHUNKED, b"Content-Length: 999999999\r\n"], ids=["chunked", "announced"])
def test_a_body_without_end_is_answered_and_hung_up(
    monkeypatch: pytest.MonkeyPatch,
    small: Proxy,
    path: bytes,
    status: int,
    framing: bytes,
) -> None:
    monkeypatch.setattr(Protocol, "linger_seconds", 0.3)
    before = small.truth()["received"]
    piece = b"400\r\n%b\r\n" % (b"x" * 1024) if framing is CHUNKED else b"x" * 1024
    got = endless(small, post(HEADERS + framing, b"", path=path), piece, 64 << 20)
    assert [code for code, _ in got] in ([], [status])
    assert small.truth()["received"] == before
    assert small.post("/v1/chat/completions", json.loads(BODY)).status_code == 200


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy that takes bodies of 100,000 bytes."""
    with running(tmp_path_factory.mktemp("small"), models=MODELS[:1], server={"max_body_bytes": 100_000}) as proxy:
        yield proxy


def test_a_body_over_the_limit_is_told_so_before_it_is_sent(small: Proxy) -> None:
    with connected(small) as connection:
        connection.sendall(post(HEADERS + b"Content-Length: 100001\r\nExpect: 100-continue\r\n", b""))
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_trickles_is_408(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Protocol, "body_seconds", 0.3)
    monkeypatch.setattr(Protocol, "linger_seconds", 0.3)
    before = proxy.truth()["received"]
    got = b""
    with connected(proxy) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(post(body=b""))
        for byte in BODY:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
        while data := connection.recv(65536):
            got += data
    assert [status for status, _ in answers(got)] in ([], [408])
    assert proxy.truth()["received"] == before


def test_many_slow_clients_keep_nobody_out(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Protocol, "head_seconds", 1.0)
    halves = [b"", post()[:20], post(HEADERS, b"")[:-2], post(body=b"")]
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(proxy)) for _ in range(200)]
        for at, connection in enumerate(slow):
            connection.sendall(halves[at % 4])
        assert proxy.post("/v1/chat/completions", json.loads(BODY)).status_code == 200
        for at, connection in enumerate(slow):
            if at % 4 != 3:  # whose body has longer
                assert b" 408 " in _all(connection)
    until(proxy.settled)


def _all(connection: socket.socket) -> bytes:
    got = b""
    with contextlib.suppress(ConnectionError):
        while data := connection.recv(65536):
            got += data
    return got


def test_twins_of_a_name_mean_the_same_to_the_backend_as_to_us(proxy: Proxy) -> None:
    """JSON may name a member twice, or in other letters: who is asked is what the backend reads."""
    twice = [
        b'{"model":"nope","model":"chat","messages":[]}',
        b'{"model":"nope","mod\\u0065l":"chat","messages":[]}',
    ]
    for body in twice:
        answer = proxy.client.post(PATH.decode(), content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200
        assert answer.json()["model"] == json.loads(body)["model"] == "chat"
