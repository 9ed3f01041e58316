"""Who may call, and from where."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import MODELS, Proxy, running

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "a very private question"}]}


def key(name: str, text: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(text.encode()).hexdigest(), **more}


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example"])
def test_a_host_that_is_not_ours_is_refused(proxy: Proxy, host: str) -> None:
    answer = proxy.client.get("/v1/models", headers={"Host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000"])
def test_addresses_and_localhost_are_ours(proxy: Proxy, host: str) -> None:
    assert proxy.client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_pages_of_other_origins_are_refused_and_get_no_cors(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", CHAT, Origin="https://evil.example")
    assert answer.status_code == 403
    assert "Access-Control-Allow-Origin" not in answer.headers
    assert proxy.client.get("/health", headers={"Origin": proxy.url}).status_code == 200


@pytest.mark.parametrize("origin", ["http://[", "null", "http://", "localhost"])
def test_an_origin_that_is_none_is_refused_in_the_envelope(proxy: Proxy, origin: str) -> None:
    answer = proxy.client.get("/v1/models", headers={"Origin": origin})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "origin_not_allowed"


def test_allowed_origins_may_read_the_energy_headers(tmp_path: Path) -> None:
    with running(tmp_path, models=MODELS[:1], server={"cors_origins": ["https://app.example"]}) as proxy:
        answer = proxy.post("/v1/chat/completions", CHAT, Origin="https://app.example")
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
        assert "X-Energy-Joules" in answer.headers["Access-Control-Expose-Headers"]


def test_with_keys_required_strangers_are_401_and_keys_see_their_own(tmp_path: Path) -> None:
    keys = [key("ann", "sk-ann"), key("bob", "sk-bob"), key("root", "sk-root", admin=True)]
    with running(tmp_path, models=MODELS[:1], auth={"required": True, "keys": keys}) as proxy:
        assert proxy.post("/v1/chat/completions", CHAT).status_code == 401
        wrong = proxy.post("/v1/chat/completions", CHAT, Authorization="Bearer sk-wrong")
        assert wrong.status_code == 401
        assert wrong.json()["error"]["code"] == "invalid_api_key"
        answer = proxy.post("/v1/chat/completions", CHAT, Authorization="Bearer sk-ann")
        assert answer.status_code == 200
        path = f"/v1/energy/receipts/{answer.headers['X-Request-Id']}"

        def status(text: str) -> int:
            return proxy.client.get(path, headers={"X-Api-Key": text}).status_code

        assert (status("sk-ann"), status("sk-bob"), status("sk-root")) == (200, 404, 200)


def test_prompts_and_keys_are_never_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    with running(tmp_path, models=MODELS[:1]) as proxy:
        proxy.post("/v1/chat/completions", CHAT, Authorization="Bearer sk-secret-key")
        proxy.post("/v1/chat/completions", {**CHAT, "messages": "a very private question"})
    output = caplog.text + "".join(capfd.readouterr())
    assert "private question" not in output
    assert "sk-secret-key" not in output
    assert "a very private" not in (tmp_path / "receipts.db").read_bytes().decode("latin-1")
