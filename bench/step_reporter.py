"""What a step report costs inside the engine: `python -m bench.step_reporter [--batch 256] [--steps 2000]`.

vLLM's part is played by an object with its books (request ids as vLLM makes them, tokens, contexts); everything of
ours is real: the watch in the scheduler, the message, the socket, and a receiver in a process of its own that decodes
every one of them. The figure is the CPU time the engine's thread spends in our code for each step: when steps follow
closely, and when they are so far apart that other work has taken the processor's caches.
"""

import argparse
import asyncio
import json
import multiprocessing
import secrets
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace

from backends.steps import StepReceiver, StepReporter
from backends.vllm.reporter import StepWatch

PAUSES_SECONDS = (0.0005, 0.005)  # between steps, as an engine computes; the receiver works meanwhile


def receive(path: Path, listening: Event, done: Event, cost: "multiprocessing.Queue[tuple[int, int, float]]") -> None:
    """Take every report; then tell how many there were, how many were lost, and the CPU seconds it took."""

    async def main() -> None:
        counts = [0, 0]

        def on_loss(_: str, lost: int) -> None:
            counts[1] += lost

        def on_steps(_: str, steps: object) -> None:
            counts[0] += len(steps)  # type: ignore[arg-type]  # a sequence of reports

        receiver = StepReceiver(path, backends=["bench"], on_steps=on_steps, on_loss=on_loss, on_state=lambda *_: None)
        await receiver.start()
        began = time.process_time()
        listening.set()
        await asyncio.to_thread(done.wait)
        await receiver.close()
        cost.put((counts[0], counts[1], time.process_time() - began))

    asyncio.run(main())


def engine_costs(path: Path, batch: int, steps: int, pause: float) -> list[float]:
    """Microseconds the engine's thread spends in our code, for each step."""
    watch = StepWatch(StepReporter(path, "bench", ("gpu:0",)), ("gpu:0",), overlapping=False)
    names = [f"chatcmpl-{secrets.token_hex(16)}-{secrets.token_hex(4)}" for _ in range(batch)]
    requests = {name: SimpleNamespace(num_computed_tokens=900 + index) for index, name in enumerate(names)}
    costs = []
    for _ in range(steps):
        output = SimpleNamespace(num_scheduled_tokens=dict.fromkeys(names, 1))
        began = time.thread_time_ns()
        watch.scheduled(output, requests)
        watch.executed(output)
        costs.append((time.thread_time_ns() - began) / 1000)
        for request in requests.values():
            request.num_computed_tokens += 1
        time.sleep(pause)
    return sorted(costs)


def measure(batch: int, steps: int, pause: float) -> dict[str, float]:
    """One run; keys name their units."""
    context = multiprocessing.get_context("spawn")
    listening, done = context.Event(), context.Event()
    cost: multiprocessing.Queue[tuple[int, int, float]] = context.Queue()
    with tempfile.TemporaryDirectory(prefix="joulegate-") as folder:
        path = Path(folder) / "run" / "steps.sock"
        receiver = context.Process(target=receive, args=(path, listening, done, cost))
        receiver.start()
        listening.wait()
        costs = engine_costs(path, batch, steps, pause)
        done.set()
        received, lost, seconds = cost.get()
        receiver.join()
    return {
        "batch": batch,
        "pause_milliseconds": pause * 1000,
        "engine_p50_microseconds": costs[len(costs) // 2],
        "engine_p99_microseconds": costs[len(costs) * 99 // 100],
        "receiver_mean_microseconds": seconds / max(1, received) * 1e6,
        "steps_received": received,
        "steps_lost": lost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    rows = [measure(batch, options.steps, pause) for pause in PAUSES_SECONDS for batch in options.batch]
    print(" batch pause ms  engine p50 µs   p99 µs  receiver µs  received  lost")
    for row in rows:
        print("{:6.0f} {:8.1f} {:14.1f} {:8.1f} {:12.1f} {:9.0f} {:5.0f}".format(*row.values()))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
