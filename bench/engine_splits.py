"""What each split says about the same requests of a real engine: `python -m bench.engine_splits [--trace TRACE]`.

Without a trace it makes one: vLLM (its CPU build, see tests/engines/environment.py) with a tiny model behind the real
proxy, long prompts with short answers and short prompts with long answers at the same time, before a meter that reads
200 W. There is no truth to compare with here, as there is in `bench.attribution`: the table shows how far apart the
rules are for requests that anybody could send.
"""

import argparse
import io
import json
import statistics
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from backends.kinds import kind_of
from bench.attribution.peers import PEERS, Observation
from proxy.energy.events import Finish, Sample, Start, Step
from proxy.replay import replay
from proxy.trace import read_events
from tests.e2e.harness import running, until
from tests.engines.engines import STARTUP_SECONDS, model
from tests.engines.environment import tiny_models

DEVICE = "gpu:0"
MIX = {"long prompt, short answer": (1500, 12), "short prompt, long answer": (20, 400)}
REQUESTS_EACH, AT_ONCE = 12, 8


def record(folder: Path) -> Path:
    """Play the mix to a real engine; the trace of it."""
    trace = folder / "trace.jsonl"
    served = [model("llama", tiny_models() / "llama", {"max-model-len": 4096, "enable-prefix-caching": False})]
    with running(folder, models=served, kinds=kind_of, record=trace, wait=False) as proxy:
        until(lambda: proxy.client.get("/ready").status_code == 200, STARTUP_SECONDS)

        def ask(job: tuple[int, int, int]) -> None:
            number, prompt, answer = job
            body = {"model": "llama", "prompt": [number % 400] + [7] * (prompt - 1), "max_tokens": answer}
            proxy.client.post("/v1/completions", json={**body, "ignore_eos": True}, timeout=600).raise_for_status()

        jobs = [(number, *shape) for number in range(REQUESTS_EACH) for shape in MIX.values()]
        ask((0, 50, 50))  # the first request of all warms the engine up
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(ask, jobs))
        until(proxy.settled, 60)
    return trace


def observe(trace: Path) -> Observation:
    """A recorded run as a peer could have seen it."""
    events = [event for _, event in read_events(trace)]
    started = {event.request: event.at / 1e9 for event in events if isinstance(event, Start)}
    ended = {event.request: event.at / 1e9 for event in events if isinstance(event, Finish)}
    steps = [event for event in events if isinstance(event, Step) and DEVICE in event.devices and event.requests]
    samples = [event for event in events if isinstance(event, Sample) and event.device == DEVICE]
    number = {name: index for index, name in enumerate(started)}
    joules = np.array([sample.energy / 1e6 for sample in samples])
    changed = np.append(True, np.diff(joules) > 0)
    tokens = np.array([count for step in steps for count in step.tokens], dtype=float)
    return Observation(
        requests=list(started),
        request_started=np.array(list(started.values())),
        request_ended=np.array([ended[name] for name in started]),
        step_started=np.array([step.started / 1e9 for step in steps]),
        step_ended=np.array([step.ended / 1e9 for step in steps]),
        entry_step=np.repeat(np.arange(len(steps)), [len(step.requests) for step in steps]),
        entry_request=np.array([number[name] for step in steps for name in step.requests]),
        tokens=tokens,
        output_tokens=np.ones_like(tokens),  # prompts are short enough to be computed in one step, which samples one
        counter_seconds=np.array([sample.at / 1e9 for sample in samples])[changed],
        counter_joules=joules[changed],
    )


def ours(trace: Path) -> dict[str, float]:
    """Joules of each request on the device, as `joulegate replay` attributes them."""
    out = io.StringIO()
    replay(trace, out)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    return {line["request"]: line["devices"].get(DEVICE, 0.0) for line in lines if "request" in line}


def kind_of_request(seen: Observation, index: int) -> str:
    mine = seen.entry_request == index
    prompt, answer = seen.tokens[mine].max(), mine.sum()
    return next((name for name, shape in MIX.items() if (prompt, answer) == shape), "")


def compare(trace: Path) -> list[dict[str, Any]]:
    """Mean joules of a request of each kind, by each split, and the sum over all requests."""
    seen = observe(trace)
    by_us = ours(trace)
    splits = {"Joulegate": np.array([by_us.get(name, 0.0) for name in seen.requests])}
    splits |= {name: split(seen) for name, split in PEERS.items()}
    kinds = [kind_of_request(seen, index) for index in range(len(seen.requests))]
    rows = []
    for name, joules in splits.items():
        groups: dict[str, list[float]] = defaultdict(list)
        for kind, value in zip(kinds, joules.tolist(), strict=True):
            groups[kind].append(value)
        means = {kind: statistics.mean(groups[kind]) for kind in MIX}
        rows.append({"split": name, **means, "sum": float(joules.sum())})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="a recorded run of the mix, in place of a new one")
    parser.add_argument("--keep", type=Path, help="copy the new trace here")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="joulegate-") as folder:
        trace = options.trace or record(Path(folder))
        if options.keep:
            options.keep.write_bytes(trace.read_bytes())
        rows = compare(trace)
    print(f"{'joules of a request, mean':38}" + "".join(f"{kind:>28}" for kind in MIX) + f"{'all together':>14}")
    for row in rows:
        print(f"{row['split']:38}" + "".join(f"{row[kind]:28.2f}" for kind in MIX) + f"{row['sum']:14.1f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
