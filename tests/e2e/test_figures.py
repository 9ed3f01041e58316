"""The figures of every endpoint, plain and streamed, fit together: within a receipt, between a receipt and the headers,
and between what is told at once and what settles.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.harness import MODELS, Proxy, energy_comment, events, running

SAID = [{"role": "user", "content": "one two three [[tokens=12 token_ms=5]]"}]
CHAT = {"model": "chat", "messages": SAID}
TEXT = "one two [[tokens=12 token_ms=5]]"
INPUTS = ["one two [[token_ms=20]]", "three"]
PICTURE = {"image": ("cat.png", b"\x89PNG some", "image/png")}
SOUND = {"file": ("a.wav", b"RIFF")}


@dataclass(frozen=True)
class Case:
    """A request; the task of its receipt; the tokens it makes (None where that is no notion); whether there is a body
    for its figures. `form` are files: then `body` are a form's fields.
    """

    path: str
    body: dict[str, Any]
    task: str
    tokens: int | None = None
    shows: bool = True
    form: dict[str, Any] | None = None


PLAIN = [
    Case("/v1/chat/completions", CHAT, "chat", 12),
    Case("/v1/chat/completions", {**CHAT, "n": 3}, "chat", 36),
    Case("/v1/chat/completions", {**CHAT, "model": "observed"}, "chat", 12),
    Case("/v1/completions", {"model": "chat", "prompt": TEXT}, "completion", 12),
    Case("/v1/responses", {"model": "chat", "input": TEXT}, "chat", 12),
    Case("/v1/messages", {**CHAT, "max_tokens": 12}, "chat", 12),
    Case("/v1/messages/count_tokens", CHAT, "tokenization"),
    Case("/v1/embeddings", {"model": "chat", "input": INPUTS}, "embedding"),
    Case("/v1/moderations", {"input": INPUTS}, "moderation"),
    Case("/classify", {"model": "sentiment", "input": INPUTS}, "classification"),
    Case("/v1/classify", {"model": "sentiment", "input": INPUTS}, "classification"),
    Case("/pooling", {"model": "chat", "input": INPUTS}, "embedding"),
    Case("/score", {"model": "chat", "text_1": "one", "text_2": INPUTS}, "score"),
    Case("/rerank", {"model": "chat", "query": "one", "documents": INPUTS}, "score"),
    Case("/v1/rerank", {"model": "chat", "query": "one", "documents": INPUTS}, "score"),
    Case("/tokenize", {"model": "chat", "prompt": "one"}, "tokenization"),
    Case("/detokenize", {"model": "chat", "tokens": [1, 2]}, "tokenization"),
    Case("/v1/images/generations", {"model": "painter", "prompt": "a cat", "n": 2}, "image"),
    Case("/v1/images/edits", {"model": "painter", "prompt": "a hat"}, "image", form=PICTURE),
    Case("/v1/audio/transcriptions", {"model": "chat"}, "audio", form=SOUND),
    Case("/v1/audio/translations", {"model": "chat"}, "audio", form=SOUND),
    Case("/v1/audio/speech", {"model": "chat", "input": "hello", "voice": "alloy"}, "audio", shows=False),
    Case("/predict", {"inputs": "one"}, "classification", shows=False),
    Case("/models/sentiment", {"inputs": INPUTS}, "classification", shows=False),
    Case("/models/sentiment/pipeline/text-classification", {"inputs": INPUTS}, "classification", shows=False),
    Case("/models/painter", {"inputs": "a cat"}, "image", shows=False),
    Case("/models/painter/pipeline/text-to-image", {"inputs": "a cat"}, "image", shows=False),
]
USAGE = {"stream_options": {"include_usage": True}}
#: With where in the stream's events the figures stand, if they do.
STREAMED: list[tuple[Case, Callable[[list[Any]], Any] | None]] = [
    (Case("/v1/chat/completions", CHAT, "chat", 12), None),
    (Case("/v1/chat/completions", {**CHAT, **USAGE}, "chat", 12), lambda told: told[-2]["energy"]),
    (Case("/v1/chat/completions", {**CHAT, **USAGE, "n": 2}, "chat", 24), lambda told: told[-2]["energy"]),
    (Case("/v1/chat/completions", {**CHAT, "model": "observed"}, "chat", 12), None),
    (Case("/v1/completions", {"model": "chat", "prompt": TEXT}, "completion", 12), None),
    (
        Case("/v1/completions", {"model": "chat", "prompt": TEXT, **USAGE}, "completion", 12),
        lambda told: told[-2]["energy"],
    ),
    (Case("/v1/responses", {"model": "chat", "input": TEXT}, "chat", 12), lambda told: told[-1]["response"]["energy"]),
    (Case("/v1/messages", {**CHAT, "max_tokens": 12}, "chat", 12), lambda told: told[-2]["energy"]),
    (Case("/v1/images/generations", {"model": "painter", "prompt": "a cat"}, "image"), lambda told: told[-1]["energy"]),
]


def named(cases: Iterable[Case]) -> list[str]:
    return [f"{case.path} {' '.join(case.body.keys() - {'model'})} {case.body.get('model', '')}" for case in cases]


def ask(proxy: Proxy, case: Case, **more: Any) -> httpx.Response:
    headers = {"X-Request-Id": "mine"}
    if case.form is None:
        answer = proxy.client.post(case.path, json={**case.body, **more}, headers=headers)
    else:
        answer = proxy.client.post(case.path, data=case.body, files=case.form, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def microjoules(joules: float) -> int:
    return round(joules * 1e6)


def check_figures(energy: dict[str, Any], case: Case) -> None:
    """What must hold within any receipt of a completed request within the boundary `node`."""
    joules, parts = energy["energy_joules"], energy["parts"]
    assert (energy["object"], energy["outcome"], energy["task"]) == ("energy.receipt", "completed", case.task)
    assert energy["client_request_id"] == "mine"
    assert sum(map(microjoules, parts.values())) == microjoules(joules)
    assert min(parts.values()) >= 0
    assert (parts["overhead"], parts["wasted"]) == (0, 0)
    assert 0 <= energy["low_joules"] <= joules <= energy["high_joules"]
    assert 0 <= energy["marginal_joules"] <= joules
    assert energy["full_joules"] is None  # there has been no minute of work
    assert energy["energy_kwh"] == pytest.approx(joules / 3.6e6, rel=1e-4)
    assert energy["duration_seconds"] > 0
    assert energy["avg_power_watts"] == pytest.approx(joules / energy["duration_seconds"], rel=1e-3, abs=1e-3)
    assert energy["attribution_method"] == energy["method"]
    assert energy["meter"] == "+".join(energy["meters"].values()) == "nvml-counter+rapl"
    assert 0 <= energy["attribution_ratio"] <= 1
    if case.tokens is not None:
        assert energy["joules_per_output_token"] == pytest.approx(joules / case.tokens, rel=1e-4)
    check_carbon(energy)


def check_carbon(energy: dict[str, Any]) -> None:
    carbon, kwh = energy["carbon"], energy["energy_joules"] / 3.6e6
    assert carbon["operational_grams"] == pytest.approx(kwh * carbon["intensity_grams_per_kwh"], rel=1e-4)
    assert (carbon["grams_co2e"], carbon["embodied_grams"]) == (carbon["operational_grams"], None)
    equal = energy["equivalents"]
    assert equal["smartphone_charges"] == pytest.approx(kwh / 0.022, rel=1e-4)
    assert equal["car_metres"] == pytest.approx(carbon["grams_co2e"] / 388.8 * 1609.344, rel=1e-4)
    assert equal["web_searches_2009"] == pytest.approx(kwh / 0.0003, rel=1e-4)


def check_provenance(headers: Mapping[str, str], energy: dict[str, Any]) -> None:
    """What the head of any answer tells, plain or streamed."""
    assert headers["X-Request-Id"] == energy["id"]
    assert headers["X-Client-Request-Id"] == "mine"
    assert headers["Link"] == f'</v1/energy/receipts/{energy["id"]}>; rel="energy-receipt"'
    told = headers["X-Energy-Method"], headers["X-Energy-Meter"], headers["X-Energy-Boundary"]
    assert told == (energy["method"], energy["meter"], energy["boundary"])
    grid = energy["carbon"]
    found = re.fullmatch(r"(\d+\.\d+);zone=(\w+);source=(\w+);as_of=(\w+)", headers["X-Carbon-Intensity"])
    assert found
    assert float(found[1]) == grid["intensity_grams_per_kwh"]
    assert found.groups()[1:] == (grid["zone"], grid["source"], grid["as_of"])


def check_headers(headers: Mapping[str, str], energy: dict[str, Any]) -> None:
    """An answer's head has the figures of its receipt."""
    check_provenance(headers, energy)
    assert headers["X-Energy-Status"] == energy["status"]
    assert headers["X-Energy-Joules"] == f"{energy['energy_joules']:.6f}"
    assert headers["X-Energy-Interval-Joules"] == f"{energy['low_joules']:.6f}-{energy['high_joules']:.6f}"
    assert headers["X-Carbon-Grams"] == headers["Carbon-Emissions-Scope-2"]
    assert float(headers["X-Carbon-Grams"]) == pytest.approx(energy["carbon"]["grams_co2e"], rel=1e-5)


def check_settled(proxy: Proxy, id_: str, case: Case) -> dict[str, Any]:
    """The receipt that settles is one like the others, of a request that did some work."""
    receipt = proxy.receipt(id_)
    assert (receipt["id"], receipt["status"]) == (id_, "settled")
    check_figures(receipt, case)
    assert receipt["energy_joules"] > 0
    return receipt


@pytest.mark.parametrize("case", PLAIN, ids=named(PLAIN))
def test_a_plain_answers_figures_fit_together(proxy: Proxy, case: Case) -> None:
    answer = ask(proxy, case)
    settled = check_settled(proxy, answer.headers["X-Request-Id"], case)
    if case.shows:
        energy = answer.json()["energy"]
        check_figures(energy, case)
        check_headers(answer.headers, energy)
    else:
        check_provenance(answer.headers, settled)
        low, high = map(float, answer.headers["X-Energy-Interval-Joules"].split("-"))
        assert low <= float(answer.headers["X-Energy-Joules"]) <= high


@pytest.mark.parametrize(("case", "shown"), STREAMED, ids=named(case for case, _ in STREAMED))
def test_a_streams_figures_fit_together(proxy: Proxy, case: Case, shown: Callable[[list[Any]], Any] | None) -> None:
    answer = ask(proxy, case, stream=True)
    assert answer.headers["X-Energy-Status"] == "pending"
    assert answer.headers.keys().isdisjoint(
        {"x-energy-joules", "x-energy-interval-joules", "x-carbon-grams", "carbon-emissions-scope-2"}
    )
    energy = energy_comment(answer.text)
    check_figures(energy, case)
    check_provenance(answer.headers, energy)
    told = events(answer.text)
    if shown is not None:
        assert shown(told) == energy
    carried = [event for event in told if '"energy.receipt"' in str(event).replace("'", '"')]
    assert len(carried) == (0 if shown is None else 1)
    blocks = answer.text.rstrip("\n").split("\n\n")
    assert blocks[-2].startswith(": energy ")
    check_settled(proxy, energy["id"], case)


@pytest.mark.parametrize("boundary", ["gpu", "facility"])
def test_the_boundary_says_what_is_counted(tmp_path: Path, boundary: str) -> None:
    pue = 1.25
    with running(tmp_path, models=MODELS[:1], energy={"boundary": boundary, "pue": pue}) as proxy:
        receipt = proxy.receipt(ask(proxy, PLAIN[0]).headers["X-Request-Id"])
        parts = receipt["parts"]
        assert receipt["boundary"] == boundary
        assert parts["gpu"] > 0
        assert (parts["host"] > 0) == (boundary == "facility")
        rest = parts["gpu"] + parts["host"] + parts["wasted"]
        due = rest * (pue - 1) if boundary == "facility" else 0
        assert parts["overhead"] == pytest.approx(due, abs=2e-6)
        assert microjoules(receipt["energy_joules"]) == sum(map(microjoules, parts.values()))
        assert receipt["low_joules"] <= receipt["energy_joules"] <= receipt["high_joules"]
        check_carbon(receipt)
