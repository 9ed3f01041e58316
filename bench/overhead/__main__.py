"""`python -m bench.overhead [--quick] [--json FILE]`: Joulegate and every installed peer, alternating, in one run."""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bench.overhead.load import StreamLoad, Target, streams, wait_until_serving, wrk
from bench.overhead.peers import ALL, JOULEGATE, Peer
from bench.overhead.ports import free_port
from bench.overhead.upstream import StreamingUpstream, static_upstream

CHUNKS = 100
STREAMS = 48
_SPREAD_SECONDS = 0.5


@contextlib.contextmanager
def started(peer: Peer, upstream: int, cpu: int | None) -> Iterator[Target]:
    """A running proxy in front of an upstream, pinned to one processor."""
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        log = folder / "log"
        pinned = [] if cpu is None else ["taskset", "-c", str(cpu)]
        command = [*pinned, *peer.command(folder, port, upstream)]
        with log.open("wb") as out:
            environment = {**os.environ, **peer.environment, "PYTHONPATH": str(Path.cwd())}
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            target = Target(f"http://127.0.0.1:{port}", psutil.Process(process.pid), peer.headers(upstream))
            wait_until_serving(target, process, log)
            yield target
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()


def stream_server(port: int, pause: float, cpu: int | None) -> None:
    _pin(cpu)
    asyncio.run(StreamingUpstream(CHUNKS, pause).serve(port))


@contextlib.contextmanager
def streaming_upstream(pause: float, cpu: int | None) -> Iterator[int]:
    port = free_port()
    process = multiprocessing.Process(target=stream_server, args=(port, pause, cpu), daemon=True)
    process.start()
    try:
        yield port
    finally:
        process.terminate()
        process.join()


def measure_plain(peers: list[Peer], rounds: int, seconds: float, cpu: int | None, other: int | None) -> dict[str, Any]:
    """Per peer and number of connections: requests per CPU-second and latencies, medians over the rounds."""
    upstream = free_port()
    results: dict[str, dict[str, list[dict[str, float]]]] = {peer.name: {} for peer in peers}
    with static_upstream(upstream, other), contextlib.ExitStack() as stack:
        running = {peer.name: stack.enter_context(started(peer, upstream, cpu)) for peer in peers}
        targets = {"direct": Target(f"http://127.0.0.1:{upstream}"), **running}
        results["direct"] = {}
        for _ in range(rounds):
            for connections in (1, 8, 32, 128):
                for name, target in targets.items():
                    load = wrk(target, connections, seconds, other)
                    row = {"rps": load.requests / load.seconds, "per_cpu_second": load.per_cpu_second, "p50": load.p50,
                           "p99": load.p99, "errors": load.errors, "rss": load.rss}  # fmt: skip
                    results[name].setdefault(str(connections), []).append(row)
    return {name: {c: _median(rows) for c, rows in by.items()} for name, by in results.items()}


def _pin(cpu: int | None) -> None:
    """Let this process run on one processor only."""
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})


def measure_streams(
    peers: list[Peer], rounds: int, seconds: float, cpu: int | None, other: int | None
) -> dict[str, Any]:
    """Per peer: streamed chunks per CPU-second and the time to the first chunk, medians over the rounds.

    Of streams that begin apart, and (`together_`) all at once.
    """
    results: dict[str, list[dict[str, float]]] = {peer.name: [] for peer in peers}
    with streaming_upstream(0.005, other) as upstream, contextlib.ExitStack() as stack:
        running = {peer.name: stack.enter_context(started(peer, upstream, cpu)) for peer in peers}
        results["direct"] = []
        _pin(other)
        for _ in range(rounds):
            for name, target in {"direct": Target(f"http://127.0.0.1:{upstream}"), **running}.items():
                apart, together = (streams(target, STREAMS, seconds, spread) for spread in (_SPREAD_SECONDS, 0.0))
                results[name].append({**_stream_row(apart), **_stream_row(together, "together_")})
    return {name: _median(rows) for name, rows in results.items()}


def _stream_row(load: StreamLoad, prefix: str = "") -> dict[str, float]:
    return {
        f"{prefix}chunks_per_cpu_second": load.chunks_per_cpu_second,
        f"{prefix}first_chunk_p50": load.first_chunk_p50,
    }


def _median(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def table(plain: dict[str, Any], streamed: dict[str, Any]) -> Table:
    shown = Table(title="Cost of a proxy (medians; added = proxied minus direct)")
    for column in (
        "proxy",
        "req / CPU-s (c=32)",
        "× ours",
        "added p50 c=1",
        "p99 c=32",
        "chunks / CPU-s (begun apart)",
        "(together)",
        "added first chunk",
        "RSS MB",
    ):
        shown.add_column(column, justify="right")
    ours = plain[JOULEGATE.name]["32"]["per_cpu_second"]
    for name, row in plain.items():
        if name == "direct":
            continue
        added = (row["1"]["p50"] - plain["direct"]["1"]["p50"]) * 1e6
        stream = streamed.get(name)
        shown.add_row(
            name,
            f"{row['32']['per_cpu_second']:,.0f}",
            f"{row['32']['per_cpu_second'] / ours:.2f}",
            f"{added:,.0f} µs",
            f"{row['32']['p99'] * 1e3:,.1f} ms",
            f"{stream['chunks_per_cpu_second']:,.0f}" if stream else "-",
            f"{stream['together_chunks_per_cpu_second']:,.0f}" if stream else "-",
            _added_first_chunk(stream, streamed["direct"]) if stream else "-",
            f"{row['128']['rss'] / 2**20:,.0f}",
        )
    return shown


def _added_first_chunk(stream: dict[str, float], direct: dict[str, float]) -> str:
    return f"{(stream['first_chunk_p50'] - direct['first_chunk_p50']) * 1e6:,.0f} µs"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of short runs")
    parser.add_argument("--rounds", type=int, default=5, help="alternations; figures are medians over them")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run")
    parser.add_argument("--only", nargs="*", help="names of the peers to run")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    peers = [peer for peer in ALL if not options.only or peer.name in options.only]
    for peer in [peer for peer in peers if peer.missing()]:
        console.print(f"missing: {peer.name} ({peer.missing()})", markup=False)
        peers.remove(peer)
    rounds, seconds = (1, 2.0) if options.quick else (options.rounds, options.seconds)
    cpu, other = (0, 1) if (os.cpu_count() or 1) > 1 else (None, None)
    plain = measure_plain(peers, rounds, seconds, cpu, other)
    for peer in [peer for peer in peers if peer.cannot_stream]:
        console.print(f"no streams: {peer.name} ({peer.cannot_stream})", markup=False)
    streamed = measure_streams([peer for peer in peers if not peer.cannot_stream], rounds, seconds, cpu, other)
    console.print(table(plain, streamed))
    if options.json:
        machine = {"processor": platform.processor(), "python": platform.python_version(), "cpus": os.cpu_count()}
        result = {"machine": machine, "rounds": rounds, "plain": plain, "streams": streamed}
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
