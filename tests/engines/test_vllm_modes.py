"""What the steps say in every way in which vLLM can batch, against what its model was seen to compute.

The witness inside vLLM (inside.py) stands where the model is run. A step's entries must say what it saw: as many
tokens, at the same positions. A sequence that computes t tokens and then holds k has positions k-t to k-1.
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.harness import until
from tests.engines.engines import Engines, expected_tokens

pytestmark = pytest.mark.engines

AT_ONCE = 8
LONG = "a prompt that is longer than a step " * 20
#: Trace times are seconds with nanoseconds; as floats they are off by less than this.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Asked:
    """A request that was answered: its usage, its text, and the entries of its steps."""

    id: str
    usage: dict[str, Any]
    text: str
    entries: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        return sum(int(entry["tokens"]) for entry in self.entries)

    @property
    def falls(self) -> list[int]:
        """How many tokens each loss of what had been computed (a preemption, a wrong guess) cost."""
        lost, held = [], 0
        for entry in self.entries:
            begun = entry["context"] - entry["tokens"]
            if begun < held:
                lost.append(held - begun)
            held = entry["context"]
        return lost


def chat(model: str, words: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": words}]
    return {"model": model, "messages": messages, "ignore_eos": True, "temperature": 0, **fields}


def ask(engines: Engines, body: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
    answer = engines.proxy.client.post("/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    return answer.headers["X-Request-Id"], told["usage"], told["choices"][0]["message"]["content"]


def play(engines: Engines, model: str, max_tokens: int) -> list[Asked]:
    """Several requests of different lengths at once; each must settle by its steps."""
    bodies = [
        chat(model, f"{number} tell me a story " * (3 + number), max_tokens=max_tokens) for number in range(AT_ONCE)
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = list(pool.map(lambda body: ask(engines, body), bodies))
    for id, usage, _ in answers:
        assert usage["completion_tokens"] == max_tokens
        assert engines.until_settled(id)["method"] == "measured-steps"
        assert engines.until_settled(id)["energy_joules"] > 0
    until(engines.proxy.settled)
    return [Asked(id, usage, text, engines.steps_of(id)) for id, usage, text in answers]


def check_against_witness(engines: Engines, backend: str, *, stages: int = 1) -> tuple[list[Any], list[Any]]:
    """Each step is one batch of the model, in order, and is over when its output is there; returns both."""
    engines_steps: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for step in engines.steps(backend):
        engines_steps.setdefault(tuple(device for device in step["devices"] if device != "host"), []).append(step)
    seen = engines.witnessed(backend)
    assert len(seen) == stages * len(engines_steps)
    for steps in engines_steps.values():
        told = [(tokens_of(step), positions_of(step)) for step in steps]
        mine = [batches for batches in seen if [(batch["tokens"], batch["positions"]) for batch in batches] == told]
        assert len(mine) == stages, f"{backend}: no model computed what its {len(steps)} steps say"
        for step, *batches in zip(steps, *mine, strict=True):
            assert step["started"] < step["ended"]
            assert max(batch["ended"] for batch in batches) / 1e9 <= step["ended"] + ROUNDING
    return [step for steps in engines_steps.values() for step in steps], seen


def tokens_of(step: dict[str, Any]) -> int:
    return sum(work["tokens"] for work in step["work"])


def positions_of(step: dict[str, Any]) -> int:
    return sum(sum(range(work["context"] - work["tokens"], work["context"])) for work in step["work"])


@pytest.mark.parametrize("backend", ["tight", "asynchronous"])
def test_what_a_preempted_request_computes_again_is_its_work(modes: Engines, backend: str) -> None:
    before = modes.counter(backend, "num_preemptions_total")
    asked = play(modes, backend, max_tokens=300)
    preemptions = modes.counter(backend, "num_preemptions_total") - before
    assert preemptions > 0
    assert sum(len(request.falls) for request in asked) == preemptions
    for request in asked:
        assert request.tokens == expected_tokens(request.usage) + sum(request.falls)
        assert request.entries[-1]["context"] == request.usage["total_tokens"] - 1
    steps, _ = check_against_witness(modes, backend)
    assert max(map(tokens_of, steps)) <= 128


@pytest.mark.parametrize("backend", ["tight", "asynchronous"])
def test_a_long_prompt_is_computed_in_pieces_and_not_where_it_is_cached(modes: Engines, backend: str) -> None:
    body = chat(backend, LONG, max_tokens=4)
    for cached in (False, True):
        id, usage, _ = ask(modes, body)
        assert usage["prompt_tokens"] > 2 * 128
        assert (usage["prompt_tokens_details"]["cached_tokens"] > 0) == cached
        assert modes.computed(id, expected_tokens(usage)) == expected_tokens(usage)
        pieces = [entry["tokens"] for entry in modes.steps_of(id)]
        assert max(pieces) <= 128
        assert cached or pieces[:2] == [128, 128]


def test_guessed_tokens_are_work_whether_they_are_right_or_wrong(modes: Engines) -> None:
    before = {name: modes.counter("speculative", name) for name in GUESSES}
    asked = play(modes, "speculative", max_tokens=100)
    guessed, right = (modes.counter("speculative", name) - before[name] for name in GUESSES)
    assert guessed > right > 0
    prompts = sum(request.usage["prompt_tokens"] for request in asked)
    answering = sum(len(request.entries) - 1 for request in asked)
    assert sum(request.tokens for request in asked) == prompts + answering + guessed
    assert sum(map(len, (request.falls for request in asked))) > 0
    check_against_witness(modes, "speculative")


GUESSES = ("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total")


def test_two_batches_in_flight_are_told_one_after_the_other(modes: Engines) -> None:
    """A batch is put together while its predecessor is computed, yet no time is told twice."""
    steps, (batches,) = check_against_witness(modes, "asynchronous")
    assert len(steps) > 100
    for step, later in itertools.pairwise(steps):
        assert step["ended"] <= later["started"]
    for step, third in zip(steps, batches[2:], strict=False):
        assert step["ended"] <= third["began"] / 1e9 + ROUNDING
    early = [step for step, later in zip(steps, batches[1:], strict=False) if later["began"] / 1e9 < step["ended"]]
    assert early, "never were two batches in flight"


@pytest.mark.parametrize(("backend", "in_vain"), [("tight", 0), ("asynchronous", 1)])
def test_a_batch_that_was_under_way_when_an_answer_ended_is_its_work(
    modes: Engines, backend: str, in_vain: int
) -> None:
    """Only its end tells the scheduler that no further token is due; the next batch may have been scheduled by then."""
    words = chat(backend, "how does it end?", max_tokens=12, logprobs=True, return_token_ids=True)
    answer = modes.proxy.post("/v1/chat/completions", words).json()
    tokens = answer["choices"][0]["token_ids"]
    ended = modes.proxy.post("/v1/chat/completions", {**words, "stop_token_ids": [tokens[-1]], "max_tokens": 100})
    choice, usage = ended.json()["choices"][0], ended.json()["usage"]
    assert choice["finish_reason"] == "stop"
    assert usage["completion_tokens"] == tokens.index(tokens[-1]) + 1
    assert modes.settled(ended)["method"] == "measured-steps"
    id = ended.headers["X-Request-Id"]
    assert modes.computed(id, expected_tokens(usage) + in_vain) == expected_tokens(usage) + in_vain


def test_engines_of_a_data_parallel_model_have_their_own_gpus(modes: Engines) -> None:
    asked = play(modes, "replicated", max_tokens=50)
    for request in asked:
        assert request.tokens == expected_tokens(request.usage)
    steps, _ = check_against_witness(modes, "replicated")
    assert {tuple(step["devices"]) for step in steps} == {("gpu:0", "host"), ("gpu:1", "host")}
    for request in asked:
        places = {
            tuple(step["devices"]) for step in steps if any(work["request"] == request.id for work in step["work"])
        }
        assert len(places) == 1


def test_batches_of_a_pipeline_are_told_beside_each_other(modes: Engines) -> None:
    """The second piece of a long prompt enters the pipeline before the first has left it."""
    id, usage, _ = ask(modes, chat("pipeline", LONG, max_tokens=4))
    assert modes.computed(id, expected_tokens(usage)) == expected_tokens(usage)
    first, second = [step for step in modes.steps("pipeline") if step["work"][0]["request"] == id][:2]
    assert first["started"] < second["started"] < first["ended"] < second["ended"]
    for request in play(modes, "pipeline", max_tokens=50):
        assert request.tokens == expected_tokens(request.usage)
    steps, _ = check_against_witness(modes, "pipeline", stages=2)
    assert {tuple(step["devices"]) for step in steps} == {("gpu:0", "gpu:1", "host")}
    modes.proxy.check_law()
