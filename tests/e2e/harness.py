"""The real proxy on a real socket, with the stand-in engine as its backends and a meter whose truth is known."""

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import uvloop

from backends.kinds import kind_of
from backends.spec import BackendKind
from proxy.api.context import Context
from proxy.app import Node
from proxy.config import parse
from proxy.energy.attribution import DeviceBalance
from proxy.energy.quantities import Microjoules, Watts, microjoules
from proxy.meter.base import Meter, Reading
from proxy.meter.discover import Discovery
from proxy.recorder import Recorder
from proxy.serve import http_server
from tests.backends.fake_kind import FakeKind

T = TypeVar("T")

MODELS = [
    {"name": "chat", "backend": {"kind": "vllm", "model": "fake", "devices": [0]}},
    {"name": "observed", "backend": {"kind": "llamacpp", "model": "fake", "devices": [0], "args": {"no-steps": True}}},
    {"name": "sentiment", "backend": {"kind": "transformers", "model": "fake", "devices": [0]}},
    {"name": "painter", "backend": {"kind": "diffusers", "model": "fake", "devices": [0]}},
]


def stand_ins(kind: str) -> BackendKind:
    """Every engine is the stand-in; as llama.cpp it does not report its steps."""
    if kind == "remote":
        return kind_of(kind)
    tasks = {"transformers": ("classification",), "diffusers": ("image",)}.get(
        kind, ("chat", "embedding", "score", "audio")
    )
    return FakeKind(tasks=tasks, reports_steps=kind != "llamacpp")  # type: ignore[arg-type] # literals through a dict


@dataclass
class SteadyMeter:
    """A device that draws constant power; its counter ticks as NVML's does."""

    device: str = "gpu:0"
    watts: float = 200.0
    name: str = "steady"
    kind: str = "nvml-counter"
    estimated: bool = False
    accuracy_ratio: float | None = 0.05
    tick_seconds: float = 0.02
    began: float = field(default_factory=time.monotonic)

    def read(self) -> Reading:
        ticks = (time.monotonic() - self.began) // self.tick_seconds
        energy: Microjoules = microjoules(ticks * self.tick_seconds * self.watts)
        return Reading(energy, Watts(self.watts))

    def close(self) -> None:
        return None


@dataclass
class Proxy:
    """A running proxy: where it is, and its insides for what no interface tells."""

    url: str
    node: Node
    client: httpx.Client
    loop: asyncio.AbstractEventLoop

    @property
    def context(self) -> Context:
        assert self.node.context is not None
        return self.node.context

    def on_loop(self, call: Callable[[], T]) -> T:
        """Do something where the proxy does everything: on its event loop."""

        async def there() -> T:
            return call()

        return asyncio.run_coroutine_threadsafe(there(), self.loop).result(20)

    def settled(self) -> bool:
        """Whether no request is open or unsettled."""
        return self.on_loop(lambda: self.context.accountant.unsettled == 0)

    def stored(self) -> list[dict[str, Any]]:
        """All receipts in the store, as JSON objects."""
        return [json.loads(row.document) for row in self.context.store.list(limit=1000).receipts]

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    def receipt(self, id: str) -> dict[str, Any]:
        answer = self.client.get(f"/v1/energy/receipts/{id}", params={"wait": "settled"})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def devices(self) -> dict[str, dict[str, Any]]:
        rows = self.client.get("/v1/energy/devices").json()["data"]
        return {row["device"]: row for row in rows}

    def truth(self, model: str = "chat") -> dict[str, Any]:
        """What the stand-in engine of a model knows of itself."""
        found: dict[str, Any] = httpx.get(f"{self.node.registry.states[model].url}/fake/truth").json()
        return found

    def metric(self, name: str, **labels: str) -> float | None:
        """One sample of /metrics; None where there is none with these labels."""
        for line in self.client.get("/metrics").text.splitlines():
            found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
            if found and dict(re.findall(r'(\w+)="([^"]*)"', found[1] or "")).items() >= labels.items():
                return float(found[2])
        return None

    def check_law(self) -> list[DeviceBalance]:
        """The conservation law on every device, now."""
        balances = self.on_loop(self.context.accountant.ledger.devices)
        for balance in balances:
            assert balance.residual == 0, balance
        return balances


def until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait for a condition; its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.02)
    return value


@contextlib.contextmanager
def running(
    tmp_path: Path,
    *,
    models: list[dict[str, Any]] | None = None,
    meters: list[Meter] | None = None,
    record: Path | None = None,
    kinds: Callable[[str], BackendKind] = stand_ins,
    wait: bool = True,
    after_reload: list[dict[str, Any]] | None = None,
    **config: Mapping[str, Any],
) -> Iterator[Proxy]:
    """Run a proxy with stand-in backends; the law is checked when it ends. `after_reload`: its models from then on."""
    document = {"models": models or MODELS, "store": {"url": f"sqlite:///{tmp_path}/receipts.db"}, **config}
    found = [SteadyMeter(), SteadyMeter("host", 50.0, kind="rapl")] if meters is None else meters
    recorder = Recorder(record) if record else None
    node = Node(
        parse(document, source="test"),
        reread=partial(parse, document | {"models": after_reload}, source="test"),
        recorder=recorder,
        kinds=kinds,
        discovery=Discovery(found, []),
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        port = listening.getsockname()[1]
        server = http_server(node)
        loop = runner.get_loop()
        thread = threading.Thread(target=runner.run, args=[server.serve([listening])], daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{port}"
        try:
            with httpx.Client(base_url=url, timeout=30) as client:
                if wait:
                    until(lambda: _ready(client))
                proxy = Proxy(url, node, client, loop)
                yield proxy
                if found:
                    proxy.check_law()
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "the proxy did not stop"


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def events(text: str) -> list[Any]:
    """The data of a stream's events; `[DONE]` as it is."""
    found = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in found]


def energy_comment(text: str) -> dict[str, Any]:
    found = [line for line in text.splitlines() if line.startswith(": energy ")]
    assert len(found) == 1, found
    parsed: dict[str, Any] = json.loads(found[0].removeprefix(": energy "))
    return parsed
