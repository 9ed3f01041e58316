"""A recording of concurrent requests of all kinds, replayed, says of each what its receipt said."""

import contextlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from proxy.replay import replay
from tests.e2e.harness import Proxy, running, until


def requests() -> list[tuple[str, dict[str, Any], float]]:
    """Paths, bodies and patience (seconds)."""

    def chat(model: str, tokens: int, *, stream: bool) -> dict[str, Any]:
        messages = [{"role": "user", "content": f"one two three [[tokens={tokens} token_ms=5]]"}]
        return {"model": model, "stream": stream, "messages": messages}

    return [
        *(("/v1/chat/completions", chat("chat", 10 + 7 * at, stream=at % 2 == 0), 30.0) for at in range(8)),
        *(("/v1/chat/completions", chat("observed", 10 + 7 * at, stream=at % 2 == 0), 30.0) for at in range(6)),
        *(("/classify", {"model": "sentiment", "input": ["good", "bad [[token_ms=10]]"]}, 30.0) for _ in range(6)),
        *(("/v1/images/generations", {"model": "painter", "prompt": "x [[token_ms=8]]"}, 30.0) for _ in range(4)),
        ("/v1/chat/completions", chat("chat", 2000, stream=False), 0.3),
    ]


def send(proxy: Proxy, path: str, body: dict[str, Any], patience: float) -> None:
    with contextlib.suppress(httpx.TimeoutException):
        assert httpx.post(proxy.url + path, json=body, timeout=patience).status_code == 200


def test_a_recording_replays_to_the_same_figures(tmp_path: Path) -> None:
    trace, work = tmp_path / "run.jsonl", requests()
    with running(tmp_path, record=trace) as proxy, ThreadPoolExecutor(len(work)) as pool:
        for _ in range(3):
            for future in [pool.submit(send, proxy, *each) for each in work]:
                future.result()
        until(proxy.settled, 60)
        until(lambda: [receipt["status"] for receipt in proxy.stored()] == ["settled"] * 3 * len(work))
        receipts = proxy.stored()
    out = io.StringIO()
    replay(trace, out)
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert {row["request"]: told(row) for row in rows if "request" in row} == {row["id"]: told(row) for row in receipts}
    assert {row["residual_joules"] for row in rows if "device" in row} == {0.0}


def told(row: dict[str, Any]) -> tuple[Any, ...]:
    figures = (round(row[name] * 1e6) for name in ("energy_joules", "low_joules", "high_joules"))
    return (*figures, row["outcome"], row["method"])
