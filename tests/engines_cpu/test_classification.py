"""The Transformers engine server: vLLM's schema, batching, and step reports that equal the work."""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.transformers.batching import MOST_PADDED_PER_TOKEN, pick
from tests.engines_cpu.conftest import Server, error_of, new_id

LONGEST = 64  # positions of the tiny model


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[dict[str, Any]]:
    """Texts, their token ids, and their logits, each computed alone by Transformers itself."""
    answers: list[dict[str, Any]] = json.loads((tiny / "classifier" / "expected.json").read_text())
    return answers


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_one_text_is_answered_as_vllm_does(classifier: Server, expected: list[dict[str, Any]], path: str) -> None:
    request = new_id()
    answer = classifier.post(path, {"model": "sentiment", "input": expected[0]["text"]}, request).json()
    probabilities = softmax(expected[0]["logits"])
    label = ["NEGATIVE", "NEUTRAL", "POSITIVE"][probabilities.index(max(probabilities))]
    tokens = len(expected[0]["ids"])
    assert answer.pop("created") > 1_700_000_000
    assert answer == {
        "id": f"classify-{request}",
        "object": "list",
        "model": "sentiment",
        "data": [{"index": 0, "label": label, "probs": pytest.approx(probabilities, abs=1e-5), "num_classes": 3}],
        "usage": {
            "prompt_tokens": tokens,
            "total_tokens": tokens,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
        },
    }


@pytest.mark.parametrize("key", ["text", "ids"])
def test_several_inputs_are_answered_in_order_and_padding_changes_nothing(
    classifier: Server, expected: list[dict[str, Any]], key: str
) -> None:
    answer = classifier.post("/classify", {"input": [item[key] for item in expected]}).json()
    for index, (item, data) in enumerate(zip(expected, answer["data"], strict=True)):
        assert data["index"] == index
        assert data["probs"] == pytest.approx(softmax(item["logits"]), abs=1e-5)
    assert answer["usage"]["prompt_tokens"] == sum(len(item["ids"]) for item in expected)


def test_token_ids_are_taken_as_they_are(classifier: Server, expected: list[dict[str, Any]]) -> None:
    answer = classifier.post("/classify", {"input": expected[1]["ids"]}).json()
    assert answer["data"][0]["probs"] == pytest.approx(softmax(expected[1]["logits"]), abs=1e-5)


@pytest.mark.parametrize("field", ["use_activation", "activation"])
def test_raw_scores_on_demand(classifier: Server, expected: list[dict[str, Any]], field: str) -> None:
    answer = classifier.post("/classify", {"input": expected[2]["text"], field: False}).json()
    assert answer["data"][0]["probs"] == pytest.approx(expected[2]["logits"], abs=1e-4)


def test_special_tokens_can_be_left_out(classifier: Server, expected: list[dict[str, Any]]) -> None:
    answer = classifier.post("/classify", {"input": expected[0]["text"], "add_special_tokens": False}).json()
    assert answer["usage"]["prompt_tokens"] == len(expected[0]["ids"]) - 2


# --- length ---


def test_an_input_longer_than_the_model_is_refused(classifier: Server) -> None:
    response = classifier.post("/classify", {"input": "film " * LONGEST})
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == ("input", "context_length_exceeded")
    assert f"{LONGEST + 2}" in error["message"]


@pytest.mark.parametrize(("asked", "kept"), [(-1, LONGEST), (10, 10), (LONGEST, LONGEST)])
def test_a_long_input_is_truncated_when_asked(classifier: Server, asked: int, kept: int) -> None:
    body = {"input": "film " * LONGEST, "truncate_prompt_tokens": asked}
    assert classifier.post("/classify", body).json()["usage"]["prompt_tokens"] == kept


def test_either_side_can_be_cut_off(classifier: Server) -> None:
    words = ["film"] * 40 + ["cat"] * 40

    def probs(text: str, **more: Any) -> list[float]:
        answer = classifier.post("/classify", {"input": text, "add_special_tokens": False, **more}).json()
        return list(answer["data"][0]["probs"])

    cut: Callable[[str], list[float]] = lambda side: probs(  # noqa: E731  # a def would say it in four lines
        " ".join(words), truncate_prompt_tokens=40, truncation_side=side
    )
    assert cut("left") == pytest.approx(probs("cat " * 40), abs=1e-5)
    assert cut("right") == pytest.approx(probs("film " * 40), abs=1e-5)


@pytest.mark.parametrize("asked", [0, -2, LONGEST + 1, "all"])
def test_a_truncation_that_makes_no_sense_is_refused(classifier: Server, asked: object) -> None:
    response = classifier.post("/classify", {"input": "film", "truncate_prompt_tokens": asked})
    assert response.status_code == 400
    assert error_of(response)["param"] == "truncate_prompt_tokens"


# --- bad input ---


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": []},
        {"input": None},
        {"input": 3},
        {"input": ["film", 3]},
        {"input": [["film"]]},
        {"input": [[]]},
        {"input": [-1]},
        {"input": [10**6]},
        {"input": {"text": "film"}},
        {"messages": [{"role": "user", "content": "film"}]},
    ],
)
def test_a_wrong_input_is_refused_by_name(classifier: Server, body: dict[str, Any]) -> None:
    response = classifier.post("/classify", body)
    assert response.status_code == 400
    assert error_of(response)["param"] == "input"


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"{", "application/json"), (b"\xff", "application/json"), (b"[]", "application/json"), (b"{}", "text/plain")],
)
def test_what_is_no_json_object_is_refused(classifier: Server, content: bytes, kind: str) -> None:
    response = classifier.http.post("/classify", content=content, headers={"Content-Type": kind})
    assert response.status_code == 400
    error_of(response)


def test_another_model_is_not_found(classifier: Server) -> None:
    response = classifier.post("/classify", {"model": "other", "input": "film"})
    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/classify", 405), ("POST", "/v1/secrets", 404)])
def test_unknown_paths_and_methods_are_told_in_the_envelope(
    classifier: Server, method: str, path: str, status: int
) -> None:
    response = classifier.http.request(method, path)
    assert response.status_code == status
    error_of(response)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_beyond_the_limit_is_refused(classifier: Server, declared: bool) -> None:
    body = json.dumps({"input": "x" * (8 * 2**20)}).encode()
    chunks = iter([body[: len(body) // 2], body[len(body) // 2 :]])
    response = classifier.http.post(
        "/classify", content=body if declared else chunks, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413
    error_of(response)


# --- step reports ---


def test_each_sequence_is_a_participant_with_its_padded_tokens(
    classifier: Server, expected: list[dict[str, Any]]
) -> None:
    request = new_id()
    before = time.monotonic_ns()
    classifier.post("/classify", {"input": [expected[2]["ids"], expected[2]["ids"][:-2]]}, request)
    after = time.monotonic_ns()
    (step,) = classifier.recorder.wait_for(request, 1)
    padded = len(expected[2]["ids"])
    assert (step.requests, step.tokens, step.contexts) == ([request] * 2, [padded] * 2, [0, 0])
    assert step.devices == ("host",)
    assert before < step.started < step.ended < after


def test_requests_that_wait_share_passes_and_none_is_lost(classifier: Server) -> None:
    blocker, waiting = new_id(), [new_id() for _ in range(12)]
    with ThreadPoolExecutor(16) as pool:
        long = pool.submit(classifier.post, "/classify", {"input": [[4] * LONGEST] * 2000}, blocker)
        classifier.recorder.wait_for(blocker, 1)
        short = [pool.submit(classifier.post, "/classify", {"input": [5, 6, 7]}, request) for request in waiting]
        answers = [future.result() for future in [long, *short]]
    assert [answer.status_code for answer in answers] == [200] * 13
    passes = classifier.recorder.wait_for(blocker, math.ceil(2000 / 64))
    assert sum(step.requests.count(blocker) for step in passes) == 2000
    assert all(sum(step.tokens) <= 8192 for step in passes)
    shared = [classifier.recorder.wait_for(request, 1) for request in waiting]
    assert all(len(steps) == 1 for steps in shared)
    assert max(len(set(steps[0].requests)) for steps in shared) > 1
    assert classifier.recorder.lost == 0


def test_a_client_that_hangs_up_takes_its_waiting_work_along(classifier: Server) -> None:
    blocker, gone, last = new_id(), new_id(), new_id()
    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(classifier.post, "/classify", {"input": [[4] * LONGEST] * 1900}, blocker)
        classifier.recorder.wait_for(blocker, 1)
        body = {"input": [[4] * LONGEST] * 100}
        with pytest.raises(httpx.ReadTimeout):
            classifier.http.post("/classify", json=body, headers={"X-Request-Id": gone}, timeout=0.1)
        classifier.post("/classify", {"input": [5]}, last)
        long.result()
    classifier.recorder.wait_for(last, 1)
    assert classifier.recorder.of(gone) == []


def test_more_than_may_wait_is_refused_with_a_time_to_come_back(classifier: Server) -> None:
    blocker = new_id()
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(classifier.post, "/classify", {"input": [[4] * LONGEST] * 2048}, blocker)
        classifier.recorder.wait_for(blocker, 1)
        response = classifier.post("/classify", {"input": [[4]] * 2048})
        long.result()
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert error_of(response)["code"] == "queue_full"


def test_more_inputs_than_ever_fit_are_refused(classifier: Server) -> None:
    response = classifier.post("/classify", {"input": [[4]] * 2049})
    assert response.status_code == 400
    assert error_of(response)["param"] == "input"


@pytest.mark.parametrize("given_id", ["", "client's own", "g" * 32])
def test_work_without_an_id_of_the_proxy_is_reported_as_nobodys(classifier: Server, given_id: str) -> None:
    before = len(classifier.recorder.of(""))
    response = classifier.http.post("/classify", json={"input": [5]}, headers={"X-Request-Id": given_id})
    assert response.status_code == 200
    assert classifier.recorder.wait_for("", before + 1)[-1].requests == [""]


def test_health_says_that_the_model_is_being_loaded(classifier: Server) -> None:
    assert classifier.statuses == [503, 200]


def test_loading_and_warm_up_are_told_before_the_first_request(classifier: Server) -> None:
    begun, ended = classifier.recorder.states
    assert (begun.loading, ended.loading) == (True, False)
    warm_up = classifier.recorder.of("")[0]
    assert begun.at < warm_up.started < warm_up.ended < ended.at


def test_no_text_reaches_the_log(classifier: Server) -> None:
    classifier.post("/classify", {"input": "xyzzy " * 100})
    classifier.post("/classify", {"input": "xyzzy " * 100, "truncate_prompt_tokens": -1})
    classifier.post("/classify", {"input": ["xyzzy", 3]})
    assert "xyzzy" not in classifier.log.read_text()


# --- the choice of a batch ---


@given(
    sizes=st.lists(st.integers(1, 512), min_size=1, max_size=100),
    most_tokens=st.integers(1, 8192),
    most_sequences=st.integers(1, 64),
)
def test_a_batch_has_the_oldest_and_keeps_every_bound(sizes: list[int], most_tokens: int, most_sequences: int) -> None:
    chosen = pick(sizes, most_tokens, most_sequences)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    assert len(chosen) <= most_sequences
    lengths = [sizes[index] for index in chosen]
    padded = max(lengths) * len(lengths)
    assert padded <= max(most_tokens, sizes[0])
    assert padded <= MOST_PADDED_PER_TOKEN * sum(lengths)


@given(count=st.integers(1, 100), most_sequences=st.integers(1, 100))
def test_equal_lengths_fill_a_batch(count: int, most_sequences: int) -> None:
    assert pick([7] * count, 7 * count, most_sequences) == list(range(min(count, most_sequences)))
