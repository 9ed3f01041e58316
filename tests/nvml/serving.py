"""What happens to answers of the real proxy while things happen to its GPU; runs in the lab's process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxy.meter.discover import MeterSettings, discover
from tests.e2e.harness import MODELS, Proxy, running, until
from tests.nvml.scenarios import Log, be_impatient
from tests.nvml.stub import NvmlStub

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "one two three [[tokens=40 token_ms=5]]"}]}
GPU_ONLY = MeterSettings(rapl=False, estimate=False)


@dataclass(frozen=True)
class Answer:
    """A chat answer given during a fault, and its receipt once the GPU was well again and all had settled."""

    status_code: int
    headers: dict[str, str]
    energy: dict[str, Any]
    receipt: dict[str, Any]
    meter_up: float | None


def ask(proxy: Proxy) -> tuple[int, dict[str, str], dict[str, Any]]:
    answer = proxy.post("/v1/chat/completions", CHAT)
    return answer.status_code, {name.lower(): value for name, value in answer.headers.items()}, answer.json()["energy"]


def settled(proxy: Proxy, id_: str) -> dict[str, Any]:
    until(lambda: proxy.receipt(id_)["status"] == "settled")
    return proxy.receipt(id_)


def through_faults(stub: NvmlStub, directory: str, faults: list[tuple[str, int]]) -> tuple[list[Answer], str]:
    """The answers during each fault, one after the other, and the log. The law is checked when the proxy ends."""
    be_impatient()
    answers = []
    with Log() as log, running(Path(directory), models=MODELS[:1], meters=list(discover(GPU_ONLY, {}).meters)) as proxy:
        for what, code in faults:
            stub.fault(what, code)
            until(lambda: proxy.metric("joulegate_meter_up", device="gpu:0") == 0)
            status, headers, energy = ask(proxy)
            up = proxy.metric("joulegate_meter_up", device="gpu:0")
            stub.fault(what, 0)
            until(lambda: proxy.metric("joulegate_meter_up", device="gpu:0") == 1)
            answers.append(Answer(status, headers, energy, settled(proxy, energy["id"]), up))
        return answers, log.text


def without_a_sensor(directory: str) -> Answer:
    """The answer of a proxy whose machine's only GPU cannot be metered."""
    meters = list(discover(GPU_ONLY, {}).meters)
    with running(Path(directory), models=MODELS[:1], meters=meters) as proxy:
        status, headers, energy = ask(proxy)
        return Answer(status, headers, energy, proxy.receipt(energy["id"]), proxy.metric("joulegate_meter_up"))
