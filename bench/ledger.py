"""How fast the ledger is: `python -m bench.ledger`.

Feeds made-up engine steps of several batch sizes, with samples at 20 Hz, requests that come and go, and a provisional
figure for each, to the live ledger, and reports request-steps (participants of steps) per second of CPU time.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from proxy.energy.events import Device, Event, Finish, Sample, Start, Step
from proxy.energy.ledger import Ledger
from proxy.energy.quantities import Microjoules, Nanoseconds, Watts

BATCHES = (1, 2, 8, 32, 128, 256)
STEPS_PER_SECOND = 100
TOKENS_PER_REQUEST = 200
_SECOND = 1_000_000_000


def history(batch: int, seconds: float) -> list[Event]:
    """A full engine: as soon as a request ends another takes its place."""
    rng = np.random.default_rng(batch)
    left = rng.integers(1, TOKENS_PER_REQUEST, batch)
    contexts = rng.integers(100, 2000, batch)
    names = [f"request-{i:032x}" for i in range(batch)]
    number, energy = batch, 0.0
    events: list[Event] = [
        Device("gpu:0", "made up", "replay"),
        *(Start(name, Nanoseconds(0), "chat") for name in names),
    ]
    times = [Nanoseconds(round(i * _SECOND / STEPS_PER_SECOND)) for i in range(round(seconds * STEPS_PER_SECOND) + 1)]
    for index, (began, ended) in enumerate(pairwise(times)):
        if index % (STEPS_PER_SECOND // 20) == 0:
            events.append(Sample("gpu:0", began, Microjoules(round(energy)), Watts(400.0)))
        contexts += 1
        left -= 1
        tokens = np.where(contexts % TOKENS_PER_REQUEST == 1, 64, 1)
        events.append(Step("chat", ("gpu:0",), began, ended, list(names), tokens.tolist(), contexts.tolist()))
        energy += (1.0 + 0.01 * batch + 0.008 * tokens.sum()) * 1e6 * rng.normal(1, 0.02)
        for slot in np.flatnonzero(left <= 0).tolist():
            events.append(Finish(names[slot], ended, "completed"))
            names[slot] = f"request-{number:032x}"
            number += 1
            left[slot], contexts[slot] = TOKENS_PER_REQUEST, rng.integers(100, 2000)
            events.append(Start(names[slot], ended, "chat"))
    return events


def seconds_of_cpu(events: list[Event]) -> float:
    ledger = Ledger(known_only=True)
    began = time.process_time()
    for event in events:
        ledger.apply(event)
        if isinstance(event, Finish):
            ledger.attribution(event.request, event.at)
            ledger.drain()
    ledger.close()
    return time.process_time() - began


def measure(batch: int, request_steps: int) -> dict[str, float]:
    seconds = max(request_steps / batch / STEPS_PER_SECOND, 2.0)
    events = history(batch, seconds)
    entries = sum(len(event.requests) for event in events if isinstance(event, Step))
    took = min(seconds_of_cpu(events) for _ in range(3))
    return {
        "batch": batch,
        "request_steps_per_second": entries / took,
        "microseconds_per_step": took / (entries / batch) * 1e6,
        "part_of_a_core_at_100_steps_per_second": took / seconds,
    }


def _lines(rows: list[dict[str, float]]) -> Iterator[str]:
    yield f"{'batch':>6} {'request-steps/s':>16} {'µs per step':>12} {'of a core':>10}"
    for row in rows:
        batch, rate, each, part = row.values()
        yield f"{batch:>6.0f} {rate:>16,.0f} {each:>12.1f} {part:>10.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--request-steps", type=int, default=400_000)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    rows = [measure(batch, min(arguments.request_steps, batch * 20_000)) for batch in BATCHES]
    print("\n".join(_lines(rows)))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
