"""Loading a proxy and reading what it cost: CPU seconds of its process tree, requests, latencies, memory."""

import asyncio
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

BODY = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "Tell me of all good things, please."}]})
_LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer sk-none"
{headers}
wrk.body = [==[{body}]==]
done = function(summary, latency, requests)
  io.write(string.format("RESULT %d %d %d %d %d %d\\n", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.timeout))
end
"""


@dataclass(frozen=True)
class Load:
    """One run: `cpu_seconds` is of the proxy and all its children; latencies are seconds, memory bytes."""

    requests: int
    seconds: float
    cpu_seconds: float
    p50: float
    p99: float
    errors: int
    rss: int

    @property
    def per_cpu_second(self) -> float:
        return self.requests / self.cpu_seconds if self.cpu_seconds else float("nan")


def cpu_seconds(root: psutil.Process) -> float:
    """CPU time of a process and its living descendants."""
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


def memory(root: psutil.Process) -> int:
    return sum(process.memory_info().rss for process in (root, *root.children(recursive=True)))


@dataclass(frozen=True)
class Target:
    """What is loaded: where it listens, its process (None: it is not watched), and headers that it wants."""

    url: str
    process: psutil.Process | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def wrk(target: Target, connections: int, seconds: float, cpu: int | None) -> Load:
    """Plain requests over `connections` connections, by one thread of wrk."""
    watched = target.process
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in target.headers.items())
        script.write(_LUA.replace("{headers}", headers).replace("{body}", BODY))
        script.flush()
        pinned = [] if cpu is None else ["taskset", "-c", str(cpu)]
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{seconds:.0f}s",
            "-s",
            script.name,
            f"{target.url}/v1/chat/completions",
        ]
        before = cpu_seconds(watched) if watched else 0.0
        shown = subprocess.run([*pinned, *command], capture_output=True, text=True, check=True).stdout
        used = cpu_seconds(watched) - before if watched else 0.0
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+) (\d+)", shown)
    assert found, shown
    requests, micros, p50, p99, status, broken = map(int, found.groups())
    return Load(requests, micros / 1e6, used, p50 / 1e6, p99 / 1e6, status + broken, memory(watched) if watched else 0)


@dataclass(frozen=True)
class StreamLoad:
    """Streams: chunks carried, the proxy's CPU seconds, and the median time to the first chunk in seconds."""

    chunks: int
    cpu_seconds: float
    first_chunk_p50: float

    @property
    def chunks_per_cpu_second(self) -> float:
        return self.chunks / self.cpu_seconds if self.cpu_seconds else float("nan")


def streams(target: Target, connections: int, seconds: float, spread: float) -> StreamLoad:
    """Streamed requests, one after the other on each of `connections` connections, by an asyncio client.

    The connections begin at times spread over `spread` seconds: with 0 all streams begin, and send, together.
    """
    watched = target.process
    before = cpu_seconds(watched) if watched else 0.0
    chunks, firsts = asyncio.run(_streams(target, connections, seconds, spread))
    used = cpu_seconds(watched) - before if watched else 0.0
    firsts.sort()
    return StreamLoad(chunks, used, firsts[len(firsts) // 2] if firsts else float("nan"))


async def _streams(target: Target, connections: int, seconds: float, spread: float) -> tuple[int, list[float]]:
    until = time.perf_counter() + seconds
    firsts: list[float] = []
    delays = [spread * number / connections for number in range(connections)]
    counts = await asyncio.gather(*(_one_connection(target, delay, until, firsts) for delay in delays))
    return sum(counts), firsts


async def _one_connection(target: Target, delay: float, until: float, firsts: list[float]) -> int:
    await asyncio.sleep(delay)
    host, port = target.url.removeprefix("http://").split(":")
    body = json.dumps({**json.loads(BODY), "stream": True}).encode()
    own = "".join(f"{name}: {value}\r\n" for name, value in target.headers.items())
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer sk-none\r\n{own}Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    chunks = 0
    while time.perf_counter() < until:
        began = time.perf_counter()
        writer.write(head + body)
        await reader.readuntil(b"\r\n\r\n")
        first = True
        while data := await _chunk(reader):
            if first:
                firsts.append(time.perf_counter() - began)
                first = False
            chunks += data.count(b"data: ")
    writer.close()
    return chunks


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    size = int((await reader.readline()).strip() or b"0", 16)
    return (await reader.readexactly(size + 2))[:-2]


def wait_until_serving(target: Target, process: subprocess.Popen[bytes], log: Path, seconds: float = 90.0) -> None:
    """Until a chat request is answered; raises RuntimeError with the end of its log if it does not come up."""
    deadline = time.monotonic() + seconds
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-none", **target.headers}
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if (
                httpx.post(f"{target.url}/v1/chat/completions", content=BODY, headers=headers, timeout=5).status_code
                == 200
            ):
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError("it did not come up: " + log.read_text(errors="replace")[-400:])
