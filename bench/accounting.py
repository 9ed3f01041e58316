"""What accounting costs a request: `python -m bench.accounting`.

Drives the real accountant as the relay does, for short chat requests to a backend that reports no steps: opened, one
attempt, its virtual step at the answer's end, the provisional receipt, and its settlement after the windows it
touched; with a GPU and a host meter at 20 Hz, the proxy's own share of the host, the metrics and the store's queue. The
clock is made up, so that a run is the same at any speed of the machine; what is counted is CPU time of this thread.
"""

import argparse
import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from proxy import accounting
from proxy.accounting import Accountant, Ticket
from proxy.energy.carbon import Intensity
from proxy.energy.events import Device, Event, Processes, Sample
from proxy.energy.ledger import Ledger
from proxy.energy.quantities import GramsPerKilowattHour, Microjoules, Nanoseconds, microjoules
from proxy.energy.receipt import Accounting, Receipt, Request, Tokens
from proxy.export.metrics import Metrics
from proxy.relay.observe import Observation

_SECOND = 1_000_000_000
_BEAT = _SECOND // 20
_PROCESSES_EVERY = 10
_SAMPLES_BEHIND = 2_000_000
GPU = Device("gpu:0", "made up", "replay", accuracy_ratio=0.05)
HOST = Device("host", "made up", "codecarbon", estimated=True)


@dataclass(frozen=True, slots=True)
class Load:
    """So many requests a second, so many at a time, each answered with so many tokens."""

    requests: int
    rate: float
    in_flight: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Microseconds of CPU per request: in all, of it on the way of the request, and when the meters are read."""

    load: Load
    microseconds: float
    answering: float
    settling: float
    harness: float
    unsettled: int
    residual: int


class Clock:
    """Made-up monotonic time."""

    def __init__(self) -> None:
        self.at = Nanoseconds(1_000 * _SECOND)

    def __call__(self) -> Nanoseconds:
        return self.at


class Sinks:
    """The metrics, and as much of the store as the event loop sees: a dict of what waits to be written."""

    def __init__(self) -> None:
        self._metrics = Metrics(["chat"])
        self._waiting: dict[str, Receipt] = {}

    def settled(self, receipt: Receipt, provisional: Receipt | None) -> None:
        self.still_provisional(receipt)
        told = provisional.figures.parts.total if provisional and provisional.figures else None
        self._metrics.receipt_settled(receipt, told)

    def still_provisional(self, receipt: Receipt) -> None:
        self._waiting[receipt.request.id] = receipt
        if len(self._waiting) >= 200:
            self._waiting = {}


class Node:
    """The books of a proxy with one GPU and one model, whose requests are answered elsewhere in the program."""

    def __init__(self, clock: Clock) -> None:
        intensity = Intensity(GramsPerKilowattHour(56.0), "FRA", "static", "2023")
        terms = Accounting("node", 1.0, intensity, devices={})
        self.accountant = Accountant(Ledger(known_only=True), terms, {"chat": ("gpu:0", "host")}, sinks=[Sinks()])
        self._clock = clock
        self._beats = 0
        self.accountant.observe([GPU, HOST])

    def ask(self) -> tuple[Ticket, Observation]:
        request = Request(secrets.token_hex(16), "chat", "chat", "/v1/chat/completions", 1.7e9)
        ticket = self.accountant.open(request)
        attempt = ticket.attempt("chat")
        accountant = self.accountant

        def emit(started: Nanoseconds, ended: Nanoseconds, tokens: int, context: int) -> None:
            accountant.virtual_step("chat", attempt, started, ended, tokens, context)

        return ticket, Observation(emit, self._clock(), 400)

    def answer(self, ticket: Ticket, observation: Observation) -> Receipt:
        tokens = Tokens(prompt=100, completion=20)
        observation.end(self._clock(), tokens, None)
        return ticket.finish("completed", tokens)

    def beat(self) -> None:
        """What the sampler hands over: both meters' readings of a moment ago, now and then the processes."""
        self._beats += 1
        at = Nanoseconds(self._clock() - _SAMPLES_BEHIND)
        gpu = microjoules(300.0 * (self._beats // 2) / 10)  # its counter ticks at 10 Hz
        events: list[Event] = [Sample("gpu:0", at, gpu), Sample("host", at, Microjoules(40 * at // 1_000))]
        if self._beats % _PROCESSES_EVERY == 0:
            events.append(Processes("host", at, 0.1, {"proxy": 0.4, "chat": 0.3}))
        self.accountant.observe(events)


class Idle:
    """Does nothing, to see what the loop around the accountant costs."""

    def ask(self) -> tuple[None, None]:
        return None, None

    def answer(self, ticket: None, observation: None) -> None: ...

    def beat(self) -> None: ...


def drive(node: "Node | Idle", clock: Clock, load: Load) -> tuple[float, float]:
    """Seconds of CPU in all, and of them while the meters were read."""
    between = Nanoseconds(round(_SECOND / load.rate))
    beat_at, beating = clock() + _BEAT, 0.0
    flying: deque[tuple[Ticket, Observation]] = deque()
    ask: Callable[[], tuple[Ticket, Observation]] = node.ask  # type: ignore[assignment]  # or nothing, of an Idle
    answer: Callable[[Ticket, Observation], object] = node.answer  # type: ignore[assignment]  # likewise
    began = time.thread_time()
    for _ in range(load.requests):
        clock.at = Nanoseconds(clock.at + between)
        if clock.at >= beat_at:
            beat_at += _BEAT
            since = time.thread_time()
            node.beat()
            beating += time.thread_time() - since
        flying.append(ask())
        if len(flying) > load.in_flight:
            answer(*flying.popleft())
    while flying:
        answer(*flying.popleft())
    return time.thread_time() - began, beating


def measure(load: Load) -> Cost:
    clock, usual = Clock(), accounting.now
    accounting.now = clock
    try:
        return _measured(load, clock)
    finally:
        accounting.now = usual


def _measured(load: Load, clock: Clock) -> Cost:
    harness, _ = drive(Idle(), clock, load)
    node = Node(clock)
    drive(node, clock, Load(round(load.rate), load.rate, load.in_flight))  # a second to warm up
    total, settling = drive(node, clock, load)
    each = 1e6 / load.requests
    residual = max(abs(balance.residual) for balance in node.accountant.ledger.devices())
    return Cost(
        load, (total - harness) * each, (total - settling - harness) * each, settling * each, harness * each,
        node.accountant.unsettled, residual,
    )  # fmt: skip


def _lines(costs: list[Cost]) -> Iterator[str]:
    heads = ("requests/s", 10), ("in flight", 9), ("µs each", 8), ("answering", 9), ("settling", 8), ("unsettled", 9)
    yield " ".join(f"{head:>{width}}" for head, width in (*heads, ("residual", 8)))
    for cost in costs:
        load = cost.load
        yield (
            f"{load.rate:>10.0f} {load.in_flight:>9} {cost.microseconds:>8.1f} {cost.answering:>9.1f} "
            f"{cost.settling:>8.1f} {cost.unsettled:>9} {cost.residual:>8}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    loads = [Load(arguments.requests, rate, flying) for rate, flying in ((200.0, 4), (5_000.0, 32), (5_000.0, 256))]
    costs = [min((measure(load) for _ in range(3)), key=lambda cost: cost.microseconds) for load in loads]
    print("\n".join(_lines(costs)))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()
