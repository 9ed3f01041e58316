"""The law, end to end: what the meter counted is what the accounts hold, whatever happened meanwhile."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.harness import running, until


def bodies(number: int) -> tuple[str, dict[str, Any]]:
    kind = number % 4
    if kind == 0:
        return "/classify", {"model": "sentiment", "input": [f"one two {number} [[token_ms=15]]"] * 3}
    if kind == 1:
        prompt = f"a cat {number} [[token_ms=8]]"
        return "/v1/images/generations", {"model": "painter", "prompt": prompt, "n": 2, "num_inference_steps": 6}
    model = "observed" if kind == 2 else "chat"
    content = f"hello {number} [[tokens=30 token_ms=6]]"
    body = {"model": model, "stream": number % 8 > 3, "messages": [{"role": "user", "content": content}]}
    return "/v1/chat/completions", body


async def crowd(url: str, size: int) -> list[str]:
    """Many requests of all kinds at once, every fifth given up midway; returns the ids of those answered."""
    ids: list[str] = []

    async def one(client: httpx.AsyncClient, number: int) -> None:
        path, body = bodies(number)
        patience = 0.15 if number % 5 == 0 else 30
        with contextlib.suppress(httpx.TimeoutException):
            answer = await client.post(path, json=body, timeout=patience)
            assert answer.status_code == 200, answer.text
            ids.append(answer.headers["X-Request-Id"])

    async with httpx.AsyncClient(base_url=url) as client:
        await asyncio.gather(*(one(client, number) for number in range(size)))
    return ids


def test_receipts_and_the_other_accounts_equal_the_meters_delta_exactly(tmp_path: Path) -> None:
    with running(tmp_path, energy={"boundary": "node"}) as proxy:
        proxy.check_law()
        ids = asyncio.run(crowd(proxy.url, 60))
        proxy.check_law()
        until(proxy.settled)
        balances = {balance.device: balance for balance in proxy.check_law()}
        stored = proxy.stored()
        for device, part in (("gpu:0", "gpu"), ("host", "host")):
            receipts = sum(round(receipt["parts"][part] * 1e6) for receipt in stored)
            assert receipts == balances[device].requests > 0
        assert {"cancelled", "completed"} <= {receipt["outcome"] for receipt in stored}
        assert set(ids) <= {receipt["id"] for receipt in stored}


def test_the_metrics_tell_the_same(tmp_path: Path) -> None:
    with running(tmp_path) as proxy:
        asyncio.run(crowd(proxy.url, 20))
        until(proxy.settled)
        for device in ("gpu:0", "host"):
            assert proxy.metric("joulegate_conservation_residual_joules", device=device) == 0
        chat = proxy.metric("joulegate_energy_joules_total", model="chat", task="chat", part="gpu")
        assert chat is not None
        assert chat > 0
        assert proxy.metric("joulegate_backend_up", model="chat") == 1
        reports = proxy.metric("joulegate_step_reports_total", backend="chat")
        assert reports is not None
        assert reports >= 25
