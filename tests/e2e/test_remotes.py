"""Somebody else's server behind the proxy: it may answer what it likes, the client gets what is right."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from proxy.relay import exchange
from tests.e2e.harness import MODELS, running

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
