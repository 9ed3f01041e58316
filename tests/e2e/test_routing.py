"""Several replicas of a model, and what happens when they fail, are full, or the proxy is to end."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.harness import MODELS, Proxy, energy_comment, events, running, until
from tests.e2e.test_command_line import Serving

ENGINE = {"kind": "vllm", "model": "fake", "devices": [0]}
PAIR = {"name": "chat", "replicas": [ENGINE, ENGINE], "aliases": ["gpt-4o-mini"]}


def chat(prompt: str, model: str = "chat", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **more}


def ask(proxy: Proxy, prompt: str, **more: Any) -> httpx.Response:
    return proxy.post("/v1/chat/completions", chat(prompt, **more))


def asked(proxy: Proxy, backend: str) -> list[dict[str, Any]]:
    """What a stand-in engine has been asked."""
    found: list[dict[str, Any]] = httpx.get(f"{proxy.node.registry.states[backend].url}/fake/requests").json()
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with running(tmp_path_factory.mktemp("pair"), models=[PAIR]) as proxy:
        until(lambda: all(state.state == "ready" for state in proxy.node.registry.states.values()))
        yield proxy


def test_replicas_share_the_work_under_the_models_name(pair: Proxy) -> None:
    answers = [ask(pair, "hi").json() for _ in range(6)]
    assert {answer["model"] for answer in answers} == {"chat"}
    assert len(asked(pair, "chat")) >= 3
    assert len(asked(pair, "chat-2")) >= 3
    assert pair.metric("joulegate_backend_up", model="chat", backend="chat-2") == 1


def test_an_alias_is_the_model_to_client_backend_and_receipt(pair: Proxy) -> None:
    answer = ask(pair, "hi", model="gpt-4o-mini")
    assert answer.status_code == 200
    assert answer.json()["energy"]["model"] == "chat"
    bodies = [json.loads(row["body"]) for name in ("chat", "chat-2") for row in asked(pair, name)]
    assert {body["model"] for body in bodies} == {"chat"}
    ids = [row["id"] for row in pair.client.get("/v1/models").json()["data"]]
    assert ids == ["chat", "gpt-4o-mini"]
    assert pair.client.get("/v1/models/gpt-4o-mini").json()["id"] == "gpt-4o-mini"


def test_a_failed_attempts_energy_is_wasted_in_the_receipt_of_the_one_that_answered(tmp_path: Path) -> None:
    with running(tmp_path, models=[PAIR]) as proxy:
        until(lambda: all(state.state == "ready" for state in proxy.node.registry.states.values()))
        answer = ask(proxy, "hi [[tokens=30 token_ms=10 cut_after=8 once]]")
        assert answer.status_code == 200
        receipt = proxy.receipt(answer.headers["X-Request-Id"])
        assert receipt["outcome"] == "completed"
        assert receipt["status"] == "settled"
        parts = receipt["parts"]
        assert parts["wasted"] > 1
        assert parts["gpu"] > 5
        assert sum(parts.values()) == pytest.approx(receipt["energy_joules"], abs=1e-6)
        assert receipt["method"] == "measured-steps"
        ids = [row["headers"]["x-request-id"] for name in ("chat", "chat-2") for row in asked(proxy, name)]
        assert sorted(ids) == [receipt["id"], f"{receipt['id']}.1"]
        proxy.check_law()


def test_a_killed_replica_is_not_noticed_by_clients_and_comes_back(tmp_path: Path) -> None:
    with running(tmp_path, models=[PAIR]) as proxy:
        until(lambda: all(state.state == "ready" for state in proxy.node.registry.states.values()))
        pid = proxy.node.registry.states["chat"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert [ask(proxy, "hi").status_code for _ in range(8)] == [200] * 8
        assert proxy.client.get("/ready").status_code == 200
        until(lambda: proxy.node.registry.states["chat"].restarts == 1 and proxy.node.registry.up("chat"))
        until(lambda: ask(proxy, "hi") and asked(proxy, "chat"))


@contextmanager
def flaky() -> Iterator[tuple[str, list[int]]]:
    """A server with a healthy /health whose other answers have the status that stands in the list."""
    status = [503]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._answer(status[0])

        def _answer(self, code: int) -> None:
            body = b'{"object": "chat.completion", "choices": []}'
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", status
        serving.shutdown()


def test_a_backend_that_recovers_is_found_again_by_a_probe(tmp_path: Path) -> None:
    with flaky() as (url, status):
        models = [{"name": "chat", "backend": {"kind": "remote", "url": url}}]
        with running(tmp_path, models=models) as proxy:
            answer = until(lambda: "left alone" in (a := ask(proxy, "hi")).text and a)
            assert answer.status_code == 503
            assert int(answer.headers["Retry-After"]) >= 1
            status[0] = 200
            until(lambda: ask(proxy, "hi").status_code == 200)


def test_more_than_may_wait_are_429_and_those_who_wait_are_served(tmp_path: Path) -> None:
    model = {**MODELS[0], "max_in_flight": 1, "max_queue": 2}
    with running(tmp_path, models=[model]) as proxy, ThreadPoolExecutor(3) as clients:
        slow = [clients.submit(ask, proxy, "hi [[tokens=40 token_ms=25]]") for _ in range(3)]
        until(lambda: proxy.metric("joulegate_queue_length", model="chat") == 2)
        refused = ask(proxy, "hi")
        assert refused.status_code == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        rates = {name: refused.headers[f"x-ratelimit-{name}-requests"] for name in ("limit", "remaining", "reset")}
        assert rates == {"limit": "3", "remaining": "0", "reset": f"{refused.headers['Retry-After']}s"}
        assert [answer.result(30).status_code for answer in slow] == [200] * 3
        assert proxy.metric("joulegate_queue_length", model="chat") == 0
        assert ask(proxy, "hi").headers["x-ratelimit-remaining-requests"] == "2"


def test_a_model_without_a_limit_tells_none(pair: Proxy) -> None:
    assert "x-ratelimit-limit-requests" not in ask(pair, "hi").headers


def test_one_who_leaves_the_queue_makes_room(tmp_path: Path) -> None:
    model = {**MODELS[0], "max_in_flight": 1, "max_queue": 1}
    with running(tmp_path, models=[model]) as proxy, ThreadPoolExecutor(2) as clients:
        slow = clients.submit(ask, proxy, "hi [[tokens=60 token_ms=25]]")
        until(lambda: proxy.metric("joulegate_requests_in_flight", model="chat") == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{proxy.url}/v1/chat/completions", json=chat("hi"), timeout=0.3)
        until(lambda: proxy.metric("joulegate_queue_length", model="chat") == 0)
        assert ask(proxy, "hi").status_code == 200
        assert slow.result(30).status_code == 200


def test_a_backend_that_does_not_begin_to_answer_in_time_is_504(tmp_path: Path) -> None:
    with running(tmp_path, models=MODELS[:1], server={"timeouts": {"first_byte": 1.0}}) as proxy:
        answer = ask(proxy, "hi [[head_ms=20000]]")
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        assert proxy.receipt(answer.headers["X-Request-Id"])["outcome"] == "failed"
        assert ask(proxy, "hi").status_code == 200


def test_a_backend_that_takes_no_connection_in_time_is_503(tmp_path: Path) -> None:
    with deaf() as (url, go_deaf):
        models = [{"name": "chat", "backend": {"kind": "remote", "url": url}}]
        with running(tmp_path, models=models, server={"timeouts": {"connect": 0.2}}) as proxy:
            go_deaf()
            answer = ask(proxy, "hi")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "backend_unavailable")


@contextmanager
def deaf() -> Iterator[tuple[str, Callable[[], None]]]:
    """A server with a healthy /health, until it does not even take connections any more."""
    listening, heard, held = socket.create_server(("127.0.0.1", 0), backlog=0), threading.Event(), list[socket.socket]()
    listening.settimeout(0.05)

    def serve() -> None:
        while not heard.is_set():
            with contextlib.suppress(TimeoutError), listening.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def go_deaf() -> None:
        heard.set()
        serving.join()
        for _ in range(3):  # they fill its backlog; the system drops whoever else knocks
            held.append(socket.socket())
            held[-1].setblocking(False)
            held[-1].connect_ex(listening.getsockname())

    serving = threading.Thread(target=serve)
    serving.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", go_deaf
    finally:
        heard.set()
        serving.join()
        for connection in (*held, listening):
            connection.close()


def test_a_stream_longer_than_the_total_time_ends_with_an_error_event_and_its_energy(tmp_path: Path) -> None:
    with running(tmp_path, models=MODELS[:1], server={"timeouts": {"total": 0.5}}) as proxy:
        answer = ask(proxy, "hi [[tokens=500 token_ms=20]]", stream=True)
        *_, failure, done = events(answer.text)
        assert failure["error"]["code"] == "timeout"
        assert done == "[DONE]"
        assert energy_comment(answer.text)["outcome"] == "failed"
        assert ask(proxy, "hi [[tokens=500 token_ms=20]]").status_code == 504


def test_a_session_stays_on_its_replica(tmp_path: Path) -> None:
    with running(tmp_path, models=[PAIR | {"affinity": "session"}]) as proxy:
        until(lambda: all(state.state == "ready" for state in proxy.node.registry.states.values()))
        for _ in range(6):
            proxy.post("/v1/chat/completions", chat("hi"), **{"X-Session-Id": "ann"})
        assert sorted(len(asked(proxy, name)) for name in ("chat", "chat-2")) == [0, 6]


@pytest.fixture
def engine() -> Iterator[str]:
    """A stand-in engine that somebody else runs."""
    script = Path(__file__).parents[1] / "backends" / "fake_engine.py"
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as probe:
        port = probe.server_port
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(script), f"--port={port}", "--model=chat"], env=environment)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("grace", "whole"), [(20, True), (0, False)])
def test_sigterm_lets_those_under_way_finish_and_stores_their_receipts(
    tmp_path: Path, engine: str, grace: int, whole: bool
) -> None:
    config = tmp_path / "joulegate.yaml"
    config.write_text(
        f"server: {{drain_seconds: {grace}}}\nenergy: {{meters: {{nvml: false, rapl: false, estimate: false}}}}\n"
        f"models: [{{name: chat, backend: {{kind: remote, url: '{engine}'}}}}]\n"
    )
    serving = Serving(tmp_path, "--config", str(config))
    with ThreadPoolExecutor(1) as clients, httpx.Client(base_url=serving.address(), timeout=30) as client:
        until(lambda: client.get("/ready").status_code == 200)
        body = chat("hi [[tokens=60 token_ms=40]]", stream=True)
        slow = clients.submit(httpx.post, f"{client.base_url}/v1/chat/completions", json=body, timeout=30)
        until(lambda: 'joulegate_requests_in_flight{model="chat"} 1.0' in client.get("/metrics").text)
        serving.process.send_signal(signal.SIGTERM)
        if whole:
            ready = until(lambda: (a := client.get("/ready")).status_code == 503 and a)
            assert ready.json()["status"] == "draining"
            refused = client.post("/v1/chat/completions", json=chat("hi"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["Retry-After"]) > 0
            assert events(slow.result(30).text)[-1] == "[DONE]"
        else:
            slow.exception(30)
    assert serving.stop(signal.SIGTERM) == 0
    listed = subprocess.run(
        [sys.executable, "-c", f"import sqlite3; print(sqlite3.connect({str(tmp_path / 'joulegate.db')!r})"
         ".execute('SELECT outcome FROM receipts').fetchall()[0][0])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert listed.stdout.strip() == ("completed" if whole else "cancelled")


@pytest.mark.parametrize("status", [401, 403])
def test_a_remote_that_does_not_take_the_proxys_own_key_is_no_fault_of_the_client(tmp_path: Path, status: int) -> None:
    with flaky() as (url, answers):
        answers[0] = status
        remote = {"name": "chat", "backend": {"kind": "remote", "url": url}}
        with running(tmp_path, models=[remote]) as proxy:
            answer = ask(proxy, "hi")
            assert answer.status_code == 502
            assert answer.json()["error"]["code"] == "backend_refused_key"
