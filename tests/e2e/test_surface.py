"""The rest of the surface: forms, moderations, stored responses, the Hub's paths, and the list of receipts.

Their energy is in `test_figures.py`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from proxy.relay.translations import CATEGORIES
from tests.e2e.harness import MODELS, Proxy, energy_comment, events, running, until
from tests.e2e.test_answers import CHAT, fake_requests
from tests.e2e.test_security import key

PNG = b"\x89PNG\r\n\x1a\nsome\r\n--bytes\x00\xff"


def error_code(answer: httpx.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json()["error"]["code"]


# --- forms ---


def test_a_form_reaches_the_backend_to_the_byte(proxy: Proxy) -> None:
    body = {"prompt": "a hat", "model": "painter", "unknown": "kept"}
    files = {"image": ("cat.png", PNG, "image/png")}
    request = proxy.client.build_request("POST", "/v1/images/edits", data=body, files=files)
    sent = request.read()
    answer = proxy.client.send(request)
    assert answer.status_code == 200, answer.text
    assert answer.json()["energy"]["task"] == "image"
    seen = fake_requests(proxy, "painter")[-1]
    assert seen["headers"]["content-type"] == request.headers["content-type"]
    assert seen["body"] == sent.decode(errors="replace")


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
def test_audio_is_heard(proxy: Proxy, path: str) -> None:
    answer = proxy.client.post(path, data={"model": "chat"}, files={"file": ("a.wav", b"RIFF" * 9)})
    assert answer.json()["text"] == "36 bytes heard by chat"


def test_speech_is_bytes(proxy: Proxy) -> None:
    answer = proxy.post("/v1/audio/speech", {"model": "chat", "input": "hello", "voice": "alloy"})
    assert answer.headers["Content-Type"] == "audio/mpeg"
    assert answer.content == b"ID3hello"


BOUNDED = {"Content-Type": "multipart/form-data; boundary=b"}
FIELD = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'


@pytest.mark.parametrize(
    ("headers", "body", "code"),
    [
        ({"Content-Type": "multipart/form-data"}, b"", "invalid_content_type"),
        ({"Content-Type": "text/plain"}, b"", "invalid_content_type"),
        ({"Content-Type": "application/json"}, b"{}", "invalid_content_type"),
        (BOUNDED, b"", "invalid_form"),
        (BOUNDED, b"garbage", "invalid_form"),
        (BOUNDED, FIELD % (b"model", b"chat"), "invalid_form"),
        (BOUNDED, FIELD % (b"a", b"b") * 200 + b"--b--\r\n", "invalid_form"),
        (BOUNDED, FIELD % (b"model", b"chat") * 2 + b"--b--\r\n", None),
        (BOUNDED, FIELD % (b"model", b"chat" * 200) + b"--b--\r\n", None),
        (BOUNDED, FIELD % (b"model", b"\xff") + b"--b--\r\n", None),
        (BOUNDED, FIELD % (b"stream", b"maybe") + b"--b--\r\n", None),
    ],
)
def test_a_form_that_is_none_reaches_no_backend(
    proxy: Proxy, headers: dict[str, str], body: bytes, code: str | None
) -> None:
    before = proxy.truth()["received"]
    answer = proxy.client.post("/v1/audio/transcriptions", content=body, headers=headers)
    assert error_code(answer) == (400, code)
    assert proxy.truth()["received"] == before


def test_a_remotes_own_name_of_the_model_is_put_into_the_form(proxy: Proxy, tmp_path: Path) -> None:
    url = proxy.node.registry.states["chat"].url
    remote = {"name": "elsewhere", "backend": {"kind": "remote", "url": url, "model": "their-name"}}
    with running(tmp_path, models=[remote]) as other:
        form = {"data": {"model": "elsewhere"}, "files": {"file": ("a.wav", b"RIFF")}}
        answer = other.client.post("/v1/audio/transcriptions", **form)  # type: ignore[arg-type] # one form
        assert answer.json()["text"] == "4 bytes heard by their-name"


# --- moderations ---


def moderate(proxy: Proxy, **body: Any) -> dict[str, Any]:
    answer = proxy.post("/v1/moderations", body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("model", [{}, {"model": "omni-moderation-latest"}, {"model": "sentiment"}])
def test_the_only_classifier_moderates(proxy: Proxy, model: dict[str, str]) -> None:
    found = moderate(proxy, input=["one", "two"], **model)
    assert found["id"].startswith("modr-")
    assert found["model"] == "sentiment"
    assert [row["flagged"] for row in found["results"]] == [False, False]  # POSITIVE is benign
    result = found["results"][0]
    assert result["categories"] == dict.fromkeys((*CATEGORIES, "POSITIVE"), False)
    assert result["category_scores"] == {**dict.fromkeys(CATEGORIES, 0), "POSITIVE": 0.9}
    assert [name for name, types in result["category_applied_input_types"].items() if types] == ["POSITIVE"]
    assert found["energy"]["task"] == "moderation"
    assert found["energy"]["energy_joules"] is not None


def test_the_configuration_says_who_moderates_and_what_is_harmless(tmp_path: Path) -> None:
    backend = {"kind": "transformers", "model": "fake"}
    guard = {"name": "guard", "backend": backend, "moderation": {"benign": ["Negative"], "threshold": 0.85}}
    with running(tmp_path, models=[{"name": "sentiment", "backend": backend}, guard]) as proxy:
        found = moderate(proxy, input=[{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])
        assert found["model"] == "guard"
        (result,) = found["results"]
        assert result["flagged"] is True
        assert [name for name, flagged in result["categories"].items() if flagged] == ["POSITIVE"]


@pytest.mark.parametrize(
    "body", [{}, {"input": []}, {"input": 7}, {"input": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
)
def test_what_cannot_be_moderated_is_refused(proxy: Proxy, body: dict[str, Any]) -> None:
    assert proxy.post("/v1/moderations", body).status_code == 400


# --- stored responses ---


def respond(proxy: Proxy, **more: Any) -> httpx.Response:
    answer = proxy.post("/v1/responses", {"model": "chat", "input": "hi [[tokens=5]]", **more})
    assert answer.status_code == 200, answer.text
    return answer


def test_a_stored_response_is_fetched_cancelled_and_deleted(proxy: Proxy) -> None:
    made = respond(proxy).json()
    assert made["energy"]["energy_joules"] is not None
    path = f"/v1/responses/{made['id']}"
    found = proxy.client.get(path).json()
    assert found["output"] == made["output"]
    assert proxy.client.get(f"{path}/input_items").json()["object"] == "list"
    assert proxy.client.post(f"{path}/cancel").json()["status"] == "cancelled"
    assert proxy.client.delete(path).json()["deleted"] is True
    assert error_code(proxy.client.get(path)) == (404, "response_not_found")


def test_a_streamed_response_tells_its_energy_and_is_stored(proxy: Proxy) -> None:
    text = respond(proxy, stream=True).text
    told = events(text)
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert told[-1]["type"] == "response.completed"
    assert told[-1]["response"]["energy"] == energy_comment(text)
    assert proxy.client.get(f"/v1/responses/{told[-1]['response']['id']}").json()["status"] == "completed"


@pytest.mark.parametrize("id_", ["resp_nope", "..%2f..%2ffake%2frequests", "%2e%2e"])
def test_an_unknown_response_asks_no_backend(proxy: Proxy, id_: str) -> None:
    for method in ("GET", "DELETE"):
        answer = proxy.client.request(method, f"/v1/responses/{id_}")
        assert answer.status_code in {404, 405}
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# --- the Hub's paths and TEI's ---


@pytest.mark.parametrize("path", ["/models/sentiment", "/models/sentiment/pipeline/text-classification"])
def test_a_pipeline_classifies(proxy: Proxy, path: str) -> None:
    answer = proxy.post(path, {"inputs": ["one", "two"], "parameters": {"top_k": 1}})
    assert answer.json() == [[{"label": "POSITIVE", "score": 0.9}]] * 2


def test_a_models_name_may_have_a_slash_encoded_or_not(tmp_path: Path) -> None:
    with running(tmp_path, models=[{**MODELS[2], "name": "org/sentiment"}]) as proxy:
        for name in ("org/sentiment", "org%2Fsentiment"):
            assert proxy.client.get(f"/v1/models/{name}").json()["id"] == "org/sentiment"
            for path in (f"/models/{name}", f"/models/{name}/pipeline/text-classification"):
                assert proxy.post(path, {"inputs": "one"}).json() == [[{"label": "POSITIVE", "score": 0.9}]]


def test_a_pipeline_paints(proxy: Proxy) -> None:
    body = {"inputs": "a cat", "parameters": {"width": 64, "height": 32, "num_inference_steps": 3}}
    answer = proxy.post("/models/painter", body)
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")
    seen = json.loads(fake_requests(proxy, "painter")[-1]["body"])
    assert (seen["model"], seen["size"], seen["num_inference_steps"]) == ("painter", "64x32", 3)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/models/nope", 404),
        ("/models/chat", 404),
        ("/models/chat/pipeline/text-classification", 400),
        ("/models/sentiment/pipeline/nonsense", 404),
        ("/models/", 404),
    ],
)
def test_a_pipeline_that_is_none_is_refused(proxy: Proxy, path: str, status: int) -> None:
    assert proxy.post(path, {"inputs": "one"}).status_code == status


def test_predict_answers_as_tei(proxy: Proxy) -> None:
    row = [{"label": "POSITIVE", "score": 0.9}]
    assert proxy.post("/predict", {"inputs": "one"}).json() == row
    assert proxy.post("/predict", {"inputs": ["one"]}).json() == row
    assert proxy.post("/predict", {"inputs": [["one"], ["two"]]}).json() == [row, row]
    assert proxy.post("/predict", {"inputs": ["one", "a pair"]}).status_code == 400
    assert proxy.post("/predict", {"inputs": []}).status_code == 400


def test_a_backends_nonsense_is_no_answer(proxy: Proxy) -> None:
    answer = proxy.post("/predict", {"inputs": "one [[garbage]]"})
    assert error_code(answer) == (502, "backend_failed")


# --- headers and receipts ---


def test_answers_tell_how_long_they_took(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", CHAT)
    assert int(answer.headers["openai-processing-ms"]) >= 200


def test_receipts_are_listed_page_by_page(proxy: Proxy) -> None:
    ids = [proxy.post("/v1/chat/completions", CHAT).headers["X-Request-Id"] for _ in range(3)]
    until(lambda: {row["id"] for row in proxy.stored()} >= set(ids))
    first = proxy.client.get("/v1/energy/receipts", params={"limit": 2, "model": "chat"}).json()
    assert first["object"] == "list"
    assert first["has_more"] is True
    assert [row["id"] for row in first["data"]] == [ids[2], ids[1]]
    after = {"limit": 1, "model": "chat", "after": first["data"][-1]["id"]}
    second = proxy.client.get("/v1/energy/receipts", params=after).json()
    assert [row["id"] for row in second["data"]] == [ids[0]]
    assert proxy.client.get("/v1/energy/receipts", params={"model": "nope"}).json() == {
        "object": "list",
        "data": [],
        "has_more": False,
    }


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after=nope"])
def test_a_page_that_cannot_be_is_refused(proxy: Proxy, query: str) -> None:
    answer = proxy.client.get(f"/v1/energy/receipts?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == query.partition("=")[0]


def test_the_command_line_lists_what_the_store_holds(tmp_path: Path) -> None:
    config = tmp_path / "joulegate.yaml"
    config.write_text(f"store: {{url: 'sqlite:///{tmp_path}/receipts.db'}}")
    with running(tmp_path, models=MODELS[:1]) as proxy:
        id_ = proxy.post("/v1/chat/completions", CHAT).headers["X-Request-Id"]
        until(proxy.stored)

    def joulegate(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "proxy", "receipts", "--config", str(config), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    listed = json.loads(joulegate("--json").stdout)
    assert [row["id"] for row in listed["data"]] == [id_]
    assert listed["has_more"] is False
    table = joulegate("--model", "chat").stdout
    assert id_ in table
    assert f"{listed['data'][0]['energy_joules']:.6g}" in table
    wrong = joulegate("--after", "nope")
    assert (wrong.returncode, wrong.stderr) == (2, "joulegate: after: there is no receipt 'nope'\n")


def test_keys_see_only_their_own(tmp_path: Path) -> None:
    keys = [key("ann", "sk-ann"), key("bob", "sk-bob"), key("root", "sk-root", admin=True)]
    with running(tmp_path, models=MODELS[:1], auth={"keys": keys}) as proxy:
        ann = {"X-Api-Key": "sk-ann"}
        made = proxy.post("/v1/responses", {"model": "chat", "input": "hi"}, **ann)
        path = f"/v1/responses/{made.json()['id']}"
        until(proxy.stored)
        seen: dict[str, tuple[int, int]] = {}
        for text in ("sk-ann", "sk-bob", "sk-root", ""):
            headers = {"X-Api-Key": text}
            listed = proxy.client.get("/v1/energy/receipts", headers=headers).json()["data"]
            seen[text] = (proxy.client.get(path, headers=headers).status_code, len(listed))
        assert seen == {"sk-ann": (200, 1), "sk-bob": (404, 0), "sk-root": (200, 1), "": (404, 0)}
