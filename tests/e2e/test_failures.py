"""What goes wrong is told well, charged to whom it belongs, and harms nobody else."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import MODELS, Proxy, energy_comment, events, running, until

ENVELOPE = {"message", "type", "param", "code"}


def chat(prompt: str, model: str = "chat", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **more}


def error(answer: Any) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == ENVELOPE
    found: dict[str, Any] = body["error"]
    return found


def test_an_unknown_model_is_404_and_names_those_there_are(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", chat("hi", model="gpt-9"))
    assert answer.status_code == 404
    told = error(answer)
    assert (told["code"], told["param"]) == ("model_not_found", "model")
    assert "'chat'" in told["message"]
    assert "'painter'" in told["message"]
    assert proxy.client.get("/v1/models/gpt-9").json()["error"]["code"] == "model_not_found"


def test_a_model_of_another_kind_is_400(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", chat("hi", model="painter"))
    assert answer.status_code == 400
    assert error(answer)["code"] == "model_not_supported"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", b"{", None),
        ("/v1/chat/completions", b"", None),
        ("/v1/chat/completions", b"[1]", None),
        ("/v1/chat/completions", b'{"model": "chat"}', "messages"),
        ("/v1/chat/completions", b'{"model": 7, "messages": []}', "model"),
        ("/v1/chat/completions", b'{"model": "chat", "messages": "hi"}', "messages"),
        ("/v1/chat/completions", b'{"model": "chat", "messages": [], "stream": "yes"}', "stream"),
        ("/v1/chat/completions", b'{"model": "\xff", "messages": []}', None),
        ("/v1/chat/completions", b'{"model": "chat", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
        ("/classify", b'{"model": "sentiment"}', "input"),
        ("/classify", b'{"model": "sentiment", "input": 3}', "input"),
        ("/v1/images/generations", b'{"model": "painter"}', "prompt"),
        ("/v1/images/generations", b'{"model": "painter", "prompt": "x", "n": "two"}', "n"),
    ],
)
def test_bad_input_is_400_and_names_the_parameter(proxy: Proxy, path: str, body: bytes, param: str | None) -> None:
    answer = proxy.client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    told = error(answer)
    assert told["type"] == "invalid_request_error"
    assert told["param"] == param


def test_what_is_not_json_by_its_type_is_400(proxy: Proxy) -> None:
    answer = proxy.client.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert error(answer)["code"] == "invalid_content_type"


def test_the_wrong_method_and_the_wrong_path_have_the_envelope_too(proxy: Proxy) -> None:
    assert proxy.client.get("/v1/chat/completions").status_code == 405
    answer = proxy.client.get("/v1/nothing")
    assert answer.status_code == 404
    error(answer)
    assert proxy.client.post("/v1/load_lora_adapter", json={}).status_code == 404


def test_refusals_on_anthropics_paths_have_its_envelope(proxy: Proxy) -> None:
    refused = proxy.client.post("/v1/messages", json={}, headers={"Host": "evil.example"})
    assert refused.status_code == 403
    for answer in (refused, proxy.client.get("/v1/messages")):
        body = answer.json()
        assert body["type"] == "error"
        assert set(body["error"]) == {"type", "message"}


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics"])
def test_head_is_get_without_its_body(proxy: Proxy, path: str) -> None:
    answer = proxy.client.head(path)
    assert answer.status_code == 200
    assert answer.content == b""
    assert answer.headers["Content-Type"] == proxy.client.get(path).headers["Content-Type"]


def test_an_unknown_receipt_is_404(proxy: Proxy) -> None:
    answer = proxy.client.get("/v1/energy/receipts/" + "0" * 32)
    assert answer.status_code == 404
    assert error(answer)["code"] == "receipt_not_found"
    assert proxy.client.get("/v1/energy/receipts/x?wait=forever").status_code == 400


@pytest.mark.parametrize("status", [400, 422, 429, 500, 503])
def test_a_backends_own_errors_come_in_the_envelope(proxy: Proxy, status: int) -> None:
    answer = proxy.post("/v1/chat/completions", chat(f"hi [[status={status}]]"))
    assert answer.status_code == (400 if status == 422 else status)
    error(answer)
    assert answer.headers["X-Request-Id"]
    if status in (429, 503):
        assert answer.headers["Retry-After"] == "7"


def test_a_stream_cut_off_tells_the_error_then_the_energy_then_ends(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", chat("hi [[tokens=50 token_ms=20 cut_after=8]]", stream=True))
    *_, failure, done = events(answer.text)
    assert set(failure["error"]) == ENVELOPE
    assert done == "[DONE]"
    comment = energy_comment(answer.text)
    assert comment["outcome"] == "failed"
    assert answer.text.index('"error"') < answer.text.index(": energy")
    assert proxy.receipt(answer.headers["X-Request-Id"])["energy_joules"] > 1


def test_an_error_in_the_backends_stream_is_told_in_the_envelope_and_the_request_has_failed(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", chat("hi [[tokens=9 error_after=2]]", stream=True))
    *_, failure, done = events(answer.text)
    assert set(failure["error"]) == ENVELOPE
    assert failure["error"]["message"] == "a fake error in the stream"
    assert failure["error"]["code"] != 500
    assert done == "[DONE]"
    assert energy_comment(answer.text)["outcome"] == "failed"
    assert answer.text.index('"error"') < answer.text.index(": energy")


def test_an_answer_that_is_not_json_though_it_says_so_is_502(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", chat("hi [[garbage]]"))
    assert answer.status_code == 502
    error(answer)
    assert proxy.receipt(answer.headers["X-Request-Id"])["outcome"] == "failed"


def test_an_answer_cut_off_is_502_with_a_receipt(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", chat("hi [[tokens=50 token_ms=20 cut_after=8]]"))
    assert answer.status_code in (502, 503)
    error(answer)
    receipt = proxy.receipt(answer.headers["X-Request-Id"])
    assert receipt["outcome"] == "failed"
    assert receipt["energy_joules"] > 1


def test_a_body_over_the_limit_is_413(tmp_path: Path) -> None:
    with running(tmp_path, models=MODELS[:1], server={"max_body_bytes": 2000}) as proxy:
        answer = proxy.post("/v1/chat/completions", chat("x" * 5000))
        assert answer.status_code == 413
        error(answer)
        endless = proxy.client.post(
            "/v1/chat/completions",
            content=(b"x" * 100 for _ in range(100)),
            headers={"Content-Type": "application/json"},
        )
        assert endless.status_code == 413
        assert proxy.post("/v1/chat/completions", chat("hi")).status_code == 200


def test_a_killed_backend_is_503_and_comes_back_while_the_others_serve(tmp_path: Path) -> None:
    models = [MODELS[0], MODELS[2]]
    with running(tmp_path, models=models) as proxy:
        pid = proxy.node.registry.states["chat"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        answer = until(lambda: (a := proxy.post("/v1/chat/completions", chat("hi"))).status_code != 200 and a)
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0
        error(answer)
        assert proxy.post("/classify", {"model": "sentiment", "input": "x"}).status_code == 200
        until(lambda: proxy.client.get("/ready").status_code == 200)
        assert proxy.post("/v1/chat/completions", chat("hi")).status_code == 200
        assert proxy.node.registry.states["chat"].restarts == 1


def test_a_backend_that_dies_mid_stream_leaves_a_receipt(tmp_path: Path) -> None:
    with running(tmp_path, models=MODELS[:1]) as proxy:
        answer = proxy.post("/v1/chat/completions", chat("hi [[tokens=50 token_ms=20 die_after=10]]", stream=True))
        assert events(answer.text)[-1] == "[DONE]"
        assert energy_comment(answer.text)["outcome"] == "failed"
        receipt = proxy.receipt(answer.headers["X-Request-Id"])
        assert receipt["energy_joules"] > 1


def test_readiness_names_what_is_missing_and_why(tmp_path: Path) -> None:
    refused = {"name": "big", "backend": {"kind": "vllm", "model": "x", "args": {"refuse": "no such model: x"}}}
    with running(tmp_path, models=[MODELS[2], refused], wait=False) as proxy:
        until(lambda: list(proxy.client.get("/ready").json()["missing"]) == ["big"])
        answer = proxy.client.get("/ready")
        assert answer.status_code == 503
        assert "no such model: x" in answer.json()["missing"]["big"]
        assert proxy.client.get("/health").status_code == 200


def test_without_any_meter_it_serves_and_gives_no_figure(tmp_path: Path) -> None:
    with running(tmp_path, models=MODELS[:1], meters=[]) as proxy:
        answer = proxy.post("/v1/chat/completions", chat("hi"))
        assert answer.status_code == 200
        assert answer.headers["X-Energy-Status"] == "unavailable"
        assert "X-Energy-Joules" not in answer.headers
        assert "X-Carbon-Grams" not in answer.headers
        assert answer.json()["energy"]["energy_joules"] is None
        stream = proxy.post("/v1/chat/completions", chat("hi", stream=True))
        assert stream.headers["X-Energy-Status"] == "unavailable"


def test_without_any_meter_requests_still_leave_the_memory_for_the_store(tmp_path: Path) -> None:
    with running(tmp_path, models=MODELS[:1], meters=[]) as proxy:
        ids = {proxy.post("/v1/chat/completions", chat("hi")).headers["X-Request-Id"] for _ in range(3)}
        until(proxy.settled)
        assert proxy.receipt(ids.copy().pop())["status"] == "unavailable"
        until(lambda: {receipt["id"] for receipt in proxy.stored()} == ids)


def test_a_store_that_cannot_be_used_costs_old_receipts_only_and_is_not_described_to_clients(tmp_path: Path) -> None:
    secret = tmp_path / "private" / "receipts.db"
    with running(tmp_path, models=MODELS[:1], store={"url": f"sqlite:///{secret}"}) as proxy:
        answer = proxy.post("/v1/chat/completions", chat("hi"))
        assert answer.status_code == 200
        assert proxy.receipt(answer.headers["X-Request-Id"])["energy_joules"] > 0
        old = proxy.client.get("/v1/energy/receipts/" + "0" * 32)
        assert (old.status_code, error(old)["code"]) == (503, "store_unavailable")
        assert int(old.headers["Retry-After"]) > 0
        assert "private" not in old.text
