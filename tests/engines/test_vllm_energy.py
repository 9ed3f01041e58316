"""Real engines before a real meter: the energy is what NVIDIA's library says, to the microjoule, and follows it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.harness import until
from tests.engines.engines import Engines

pytestmark = pytest.mark.engines

#: What may be read a tick of the counter and two polls late, in seconds.
LATE = 0.02 + 2 * 0.05


def story(max_tokens: int) -> dict[str, Any]:
    words = [{"role": "user", "content": "tell me a story, and make it a long one"}]
    return {"model": "llama", "messages": words, "max_tokens": max_tokens, "ignore_eos": True}


def told(engines: Engines, max_tokens: int) -> dict[str, Any]:
    """The settled receipt of one story."""
    answer = engines.proxy.client.post("/v1/chat/completions", json=story(max_tokens), timeout=300)
    return engines.settled(answer)


def together(engines: Engines, requests: int, max_tokens: int) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(requests) as pool:
        return list(pool.map(lambda _: told(engines, max_tokens), range(requests)))


def seconds_of(engines: Engines, receipts: list[dict[str, Any]]) -> float:
    """How long the steps of these requests took together."""
    ids = {receipt["id"] for receipt in receipts}
    steps = [step for step in engines.steps("llama") if ids & {work["request"] for work in step["work"]}]
    return float(sum(step["ended"] - step["started"] for step in steps))


def microjoules(joules: float) -> int:
    return round(joules * 1_000_000)


def books(engines: Engines) -> dict[str, int]:
    """The accounts of gpu:0 in microjoules, once nothing is under way."""
    until(engines.proxy.settled)
    row = engines.proxy.devices()["gpu:0"]
    return {name: microjoules(row[f"{name}_joules"]) for name in ACCOUNTS}


ACCOUNTS = ("counter", "requests", "idle", "foreign", "unattributed", "pending", "residual")


@contextmanager
def drawing(engines: Engines, watts: float) -> Iterator[None]:
    """The GPU draws this meanwhile, and is idle for a while before and after."""
    idle = engines.gpus.gpus[0].idle_watts
    engines.gpus.watts(idle)
    time.sleep(1)
    engines.gpus.watts(watts)
    yield
    engines.gpus.watts(idle)
    time.sleep(1)


def test_the_accounts_of_a_busy_gpu_add_up_to_its_counter_exactly(engines: Engines) -> None:
    pid = engines.proxy.node.registry.states["llama"].pid
    assert pid
    before, began = books(engines), time.monotonic()
    with drawing(engines, 300):
        together(engines, 1, 20)
        engines.gpus.processes({pid: 60, 1: 30})  # somebody else's process works on it too
        receipts = together(engines, 4, 150)
        engines.gpus.processes({})
    after, ended = books(engines), time.monotonic()
    rise = {name: after[name] - before[name] for name in ACCOUNTS}
    assert rise["counter"] == sum(rise[name] for name in ("requests", "idle", "foreign", "unattributed", "pending"))
    assert after["residual"] == 0
    assert rise["foreign"] > 0
    truth = engines.gpus.energy(began, ended)
    assert abs(rise["counter"] / 1e6 - truth) <= LATE * 300
    for receipt in receipts:
        assert receipt["method"] == "measured-steps"
        assert receipt["meters"]["gpu:0"] == "nvml-counter"
        assert receipt["low_joules"] <= receipt["energy_joules"] <= receipt["high_joules"]


def test_what_all_receipts_say_is_what_the_gpus_account_says(engines: Engines) -> None:
    before = books(engines)["requests"]
    with drawing(engines, 250):
        receipts = together(engines, 6, 100)
    assert sum(microjoules(receipt["parts"]["gpu"]) for receipt in receipts) == books(engines)["requests"] - before


def test_twice_the_power_is_twice_the_joules(engines: Engines) -> None:
    watts = {}
    for power in (200, 400):
        with drawing(engines, power):
            receipts = together(engines, 4, 150)
        watts[power] = sum(receipt["parts"]["gpu"] for receipt in receipts) / seconds_of(engines, receipts)
    assert watts[400] / watts[200] == pytest.approx(2, rel=0.15)
    assert watts[200] == pytest.approx(200, rel=0.25)


def test_a_step_in_power_is_seen_in_the_requests_served_then(engines: Engines) -> None:
    """A long story is told throughout; short ones beside it, in the cheap time and in the dear time."""
    with ThreadPoolExecutor(1) as pool, drawing(engines, 150):
        long = pool.submit(told, engines, 800)
        time.sleep(0.5)
        cheap = told(engines, 120)
        engines.gpus.watts(450)
        dear = told(engines, 120)
        between = long.result()
    rates = [receipt["parts"]["gpu"] / seconds_of(engines, [receipt]) for receipt in (cheap, between, dear)]
    assert rates[2] / rates[0] == pytest.approx(3, rel=0.2)
    assert rates[0] < rates[1]
