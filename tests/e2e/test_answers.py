"""Answers tell their energy: headers, bodies, and the receipt behind them."""

import json
import re
from typing import Any

import pytest

from tests.e2e.harness import Proxy

FIXED_POINT = re.compile(r"\d+\.\d+")
CHAT = {"model": "chat", "messages": [{"role": "user", "content": "one two three [[tokens=40 token_ms=5]]"}]}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {"model": "chat", "prompt": "one two [[tokens=30 token_ms=5]]"}),
    ("/classify", {"model": "sentiment", "input": ["one two [[token_ms=60]]", "three"]}),
    ("/v1/classify", {"model": "sentiment", "input": "one [[token_ms=60]]"}),
    ("/v1/images/generations", {"model": "painter", "prompt": "a cat [[token_ms=10]]", "num_inference_steps": 8}),
]
ENERGY_KEYS = [
    "object", "id", "client_request_id", "status", "outcome", "model", "task", "energy_joules", "energy_kwh",
    "low_joules", "high_joules", "meter_accuracy_ratio", "marginal_joules", "full_joules", "boundary", "parts",
    "method", "meter", "meters", "attribution_method", "attribution_ratio", "avg_power_watts", "duration_seconds",
    "joules_per_output_token", "carbon", "water_millilitres", "equivalents",
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), CALLS, ids=[path for path, _ in CALLS])
def test_every_answer_has_the_headers(proxy: Proxy, path: str, body: dict[str, Any]) -> None:
    answer = proxy.post(path, body)
    assert answer.status_code == 200, answer.text
    headers = answer.headers
    id_ = headers["X-Request-Id"]
    assert re.fullmatch(r"[0-9a-f]{32}", id_)
    assert headers["X-Energy-Status"] in {"provisional", "settled"}
    assert headers["X-Energy-Method"] == "measured-steps"
    assert headers["X-Energy-Meter"] == "nvml-counter+rapl"
    assert headers["X-Energy-Boundary"] == "node"
    assert FIXED_POINT.fullmatch(headers["X-Energy-Joules"])
    low, high = headers["X-Energy-Interval-Joules"].split("-")
    assert float(low) <= float(headers["X-Energy-Joules"]) <= float(high)
    assert FIXED_POINT.fullmatch(headers["X-Carbon-Grams"])
    assert headers["Carbon-Emissions-Scope-2"] == headers["X-Carbon-Grams"]
    assert re.fullmatch(r"\d+\.\d+;zone=WORLD;source=codecarbon;as_of=\S+", headers["X-Carbon-Intensity"])
    assert headers["Link"] == f'</v1/energy/receipts/{id_}>; rel="energy-receipt"'


@pytest.mark.parametrize(("path", "body"), CALLS, ids=[path for path, _ in CALLS])
def test_bodies_that_are_objects_carry_the_energy_object(proxy: Proxy, path: str, body: dict[str, Any]) -> None:
    answer = proxy.post(path, body)
    energy = answer.json()["energy"]
    assert list(energy) == ENERGY_KEYS
    assert energy["id"] == answer.headers["X-Request-Id"]
    assert f"{energy['energy_joules']:.6f}" == answer.headers["X-Energy-Joules"]
    assert sum(energy["parts"].values()) == pytest.approx(energy["energy_joules"], abs=1e-9)
    assert energy["energy_joules"] > 0


def test_the_settled_receipt_is_within_what_the_meter_measured(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", CHAT)
    receipt = proxy.receipt(answer.headers["X-Request-Id"])
    assert receipt["status"] == "settled"
    assert receipt["outcome"] == "completed"
    assert receipt["duration_seconds"] > 0.2
    # Alone on a GPU of 200 W for its duration; the host has 50 W.
    assert receipt["parts"]["gpu"] == pytest.approx(200 * receipt["duration_seconds"], rel=0.35)
    assert receipt["joules_per_output_token"] == pytest.approx(receipt["energy_joules"] / 40, rel=1e-4)
    assert 0 < receipt["attribution_ratio"] <= 1
    grams = receipt["carbon"]["operational_grams"]
    intensity = receipt["carbon"]["intensity_grams_per_kwh"]
    assert grams == pytest.approx(receipt["energy_joules"] / 3.6e6 * intensity, rel=1e-4)


def test_x_energy_body_off_leaves_the_body_untouched(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", CHAT, **{"X-Energy-Body": "off"})
    assert "energy" not in answer.json()
    assert "X-Energy-Joules" in answer.headers


def test_a_backends_own_energy_claims_are_dropped(proxy: Proxy) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "hi [[energy_headers]]"}]}
    answer = proxy.post("/v1/chat/completions", body)
    assert answer.json()["energy"]["object"] == "energy.receipt"
    assert len(answer.headers.get_list("X-Energy-Joules")) == 1
    assert answer.headers["X-Energy-Joules"] == f"{answer.json()['energy']['energy_joules']:.6f}"


def test_a_clients_own_request_id_is_echoed_and_keys_nothing(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", CHAT, **{"X-Request-Id": "mine-1"})
    assert answer.headers["X-Client-Request-Id"] == "mine-1"
    assert answer.headers["X-Request-Id"] != "mine-1"
    assert answer.json()["energy"]["client_request_id"] == "mine-1"
    assert proxy.client.get("/v1/energy/receipts/mine-1").status_code == 404


def test_an_insane_request_id_is_ignored(proxy: Proxy) -> None:
    answer = proxy.post("/v1/chat/completions", CHAT, **{"X-Request-Id": "a b" * 100})
    assert "X-Client-Request-Id" not in answer.headers


def test_unknown_fields_go_both_ways(proxy: Proxy) -> None:
    proxy.post("/v1/chat/completions", {**CHAT, "top_k": 7, "extra": {"deep": [1, None]}})
    seen = fake_requests(proxy, "chat")[-1]
    body = json.loads(seen["body"]) if isinstance(seen["body"], str) else seen["body"]
    assert body["top_k"] == 7
    assert body["extra"] == {"deep": [1, None]}


def test_a_clients_credentials_never_reach_a_backend(proxy: Proxy) -> None:
    secrets = {"Authorization": "Bearer sk-secret", "Cookie": "session=1", "X-Api-Key": "sk-other"}
    answer = proxy.post("/v1/chat/completions", CHAT, **secrets)
    headers = fake_requests(proxy, "chat")[-1]["headers"]
    assert headers["x-request-id"] == answer.headers["X-Request-Id"]
    assert {"authorization", "cookie", "x-api-key"}.isdisjoint(headers)


def test_a_backend_that_tells_no_steps_is_measured_by_tokens(proxy: Proxy) -> None:
    body = {**CHAT, "model": "observed"}
    answer = proxy.post("/v1/chat/completions", body)
    assert answer.headers["X-Energy-Method"] == "measured-tokens"
    receipt = proxy.receipt(answer.headers["X-Request-Id"])
    assert receipt["energy_joules"] > 0
    assert receipt["method"] == "measured-tokens"


def test_models_are_listed(proxy: Proxy) -> None:
    listed = proxy.client.get("/v1/models").json()
    assert [row["id"] for row in listed["data"]] == ["chat", "observed", "sentiment", "painter"]
    assert listed["object"] == "list"
    one = proxy.client.get("/v1/models/painter").json()
    assert one["object"] == "model"
    assert one["id"] == "painter"


def test_devices_are_listed_with_balanced_books(proxy: Proxy) -> None:
    rows = proxy.devices()
    assert rows["gpu:0"]["meter"] == "nvml-counter"
    assert rows["gpu:0"]["power_watts"] == 200
    for row in rows.values():
        assert row["residual_joules"] == 0


def test_the_documentation_names_the_model_endpoints(proxy: Proxy) -> None:
    document = proxy.client.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    assert proxy.client.get("/docs").status_code == 200


def fake_requests(proxy: Proxy, model: str) -> list[dict[str, Any]]:
    import httpx

    url = proxy.node.registry.states[model].url
    found: list[dict[str, Any]] = httpx.get(f"{url}/fake/requests").json()
    return found


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/nobody", "/v1/nothing", "/v1/chat/completions", "/health"])
def test_every_answer_has_an_id_and_a_time_whatever_it_is(proxy: Proxy, path: str) -> None:
    one, other = proxy.client.get(path), proxy.client.get(path)
    assert re.fullmatch("[0-9a-f]{32}", one.headers["X-Request-Id"])
    assert one.headers["X-Request-Id"] != other.headers["X-Request-Id"]
    assert int(one.headers["openai-processing-ms"]) >= 1


def test_anthropics_clients_find_the_id_by_its_own_name(proxy: Proxy) -> None:
    for body in ({"model": "chat", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}, {}):
        answer = proxy.post("/v1/messages", body)
        assert answer.headers["request-id"] == answer.headers["X-Request-Id"]
