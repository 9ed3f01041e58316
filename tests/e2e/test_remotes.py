"""Somebody else's server behind the proxy: it may answer what it likes, the client gets what is right."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from proxy.relay import exchange
from tests.e2e.harness import MODELS, running, until

CHAT = {"model": "elsewhere", "messages": [{"role": "user", "content": "hi"}]}


@contextmanager
def server(body: bytes, **headers: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Answers every request with `body`; gives its address and the headers of the POST requests it gets."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self._answer()

        def _answer(self) -> None:
            self.send_response(200)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", seen
        serving.shutdown()


@contextmanager
def busy_server(retry_after: int) -> Iterator[str]:
    """Asks everybody to come back later."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(503)

        def _answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.send_header("Retry-After", str(retry_after))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def remote(url: str) -> dict[str, object]:
    return {"name": "elsewhere", "backend": {"kind": "remote", "url": url}}


def test_a_remote_is_asked_for_plain_bytes_and_one_that_compresses_is_502(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"choices": []}')
    with (
        server(packed, Content_Type="application/json", Content_Encoding="gzip") as (url, seen),
        running(tmp_path, models=[remote(url)]) as proxy,
    ):
        answer = proxy.post("/v1/chat/completions", CHAT, Authorization="Bearer sk-mine", Cookie="a=b")
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "backend_failed"
    assert seen[0]["accept-encoding"] == "identity"
    assert {"authorization", "cookie"}.isdisjoint(seen[0])


def test_what_a_remote_says_of_energy_stays_behind(tmp_path: Path) -> None:
    said = {"X_Energy_Joules": "9", "X_Carbon_Grams": "9", "Set_Cookie": "a=b"}
    body = b'{"choices": [], "usage": {"prompt_tokens": -5}, "energy": {"energy_joules": 9}}'
    with (
        server(body, Content_Type="application/json", **said) as (url, _),
        running(tmp_path, models=[remote(url)]) as proxy,
    ):
        answer = proxy.post("/v1/chat/completions", CHAT)
        assert answer.status_code == 200
        assert answer.json()["energy"]["energy_joules"] is None
        assert {"x-energy-joules", "x-carbon-grams", "set-cookie"}.isdisjoint(answer.headers)


def test_an_error_of_our_own_is_500_and_a_failed_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise RuntimeError("a bug")

    monkeypatch.setattr(exchange, "upstream_body", broken)
    with running(tmp_path, models=MODELS[:1]) as proxy:
        answer = proxy.post("/v1/chat/completions", {**CHAT, "model": "chat"})
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert proxy.metric("joulegate_requests_total", model="chat", code="500") == 1


def test_a_client_that_leaves_in_the_pause_before_another_attempt_leaves_a_settled_receipt(tmp_path: Path) -> None:
    with busy_server(retry_after=2) as url, running(tmp_path, models=[remote(url)]) as proxy:
        with pytest.raises(httpx.ReadTimeout):
            proxy.client.post("/v1/chat/completions", json=CHAT, timeout=1.5)
        until(proxy.settled, 10)
        until(lambda: [row["status"] for row in proxy.stored()] == ["unavailable"], 5)


def test_a_key_that_cannot_be_sent_leaves_no_work_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_KEY", "schl\u00fcssel\u20ac")
    with server(b"{}", Content_Type="application/json") as (url, _):
        backend = {"kind": "remote", "url": url, "api_key_env": "ODD_KEY"}
        with running(tmp_path, models=[{"name": "elsewhere", "backend": backend}]) as proxy:
            assert proxy.post("/v1/chat/completions", CHAT).status_code == 500
            model = proxy.node.registry.models["elsewhere"]
            assert [model.balancer.outstanding(id) for id in model.backends] == [0]


def test_a_remotes_rate_limits_give_way_to_ours(tmp_path: Path) -> None:
    said = {"X_RateLimit_Limit_Requests": "9999", "X_RateLimit_Limit_Tokens": "7"}
    with server(b'{"choices": []}', Content_Type="application/json", **said) as (url, _):
        limited = {**remote(url), "max_in_flight": 2, "max_queue": 3}
        with running(tmp_path, models=[limited]) as proxy:
            headers = proxy.post("/v1/chat/completions", CHAT).headers
            assert headers.get_list("x-ratelimit-limit-requests") == ["5"]
            assert headers.get_list("x-ratelimit-limit-tokens") == ["7"]


def test_a_remotes_own_request_id_stays_behind(tmp_path: Path) -> None:
    body = b'{"type": "message", "content": []}'
    with (
        server(body, Content_Type="application/json", Request_Id="req_theirs") as (url, _),
        running(tmp_path, models=[remote(url)]) as proxy,
    ):
        headers = proxy.post("/v1/messages", {**CHAT, "max_tokens": 5}).headers
        assert headers.get_list("request-id") == [headers["x-request-id"]]
