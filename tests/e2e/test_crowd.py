"""A thousand streams at once, a third of them cut midway: nothing leaks, and every microjoule has its receipt."""

import asyncio
import gc
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.harness import MODELS, Proxy, running, until

STREAMS = 1_000
CUT_EVERY = 3
CUT = len(range(0, STREAMS, CUT_EVERY))
#: Both ends of the proxy are in this process, and something besides.
_FILES = 2 * STREAMS + 500
#: Health checks and our own looks come and go.
_BESIDES = 3
#: The last receipts stay in memory, to be read at once.
_KEPT = ("proxy.energy.receipt.", "proxy.energy.carbon.")


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for the sockets; children inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _FILES:
        pytest.skip(f"a process may open {hard} files here; the test needs {_FILES} (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, _FILES), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def crowd(proxy: Proxy, size: int) -> dict[str, Any]:
    """By request id what its client saw last: the energy comment, or None where it hung up."""
    parts = urlsplit(proxy.url)
    command = [sys.executable, "-m", "tests.e2e.crowd", str(parts.hostname), str(parts.port), str(size), str(CUT_EVERY)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def held(proxy: Proxy) -> dict[str, int]:
    """What a leak would add to: files of this process, tasks of the proxy, connections of the backend."""
    tasks = proxy.on_loop(lambda: len(asyncio.all_tasks()))
    return {"files": len(os.listdir("/proc/self/fd")), "tasks": tasks, "connections": proxy.truth()["connections"]}


def objects() -> Counter[str]:
    """The living objects of the proxy's own classes."""
    gc.collect()
    classes = (type(found) for found in gc.get_objects())
    return Counter(f"{c.__module__}.{c.__qualname__}" for c in classes if str(c.__module__).startswith("proxy."))


def receipts(proxy: Proxy) -> dict[str, dict[str, Any]]:
    """All that are stored, page by page."""
    found: dict[str, dict[str, Any]] = {}
    after = None
    while (page := proxy.context.store.list(limit=1000, after=after)).receipts:
        found.update({row.id: json.loads(row.document) for row in page.receipts})
        after = page.receipts[-1].id
    return found


def test_a_thousand_streams_a_third_cut_leave_nothing_behind(tmp_path: Path, many_files: None) -> None:
    with running(tmp_path, models=MODELS[:1]) as proxy:
        crowd(proxy, 20)  # what is made once is made
        until(proxy.settled)
        until(lambda: proxy.truth()["connections"] <= _BESIDES)  # the idle ones are closed
        before, before_objects = held(proxy), objects()
        started = proxy.truth()["cancelled"]

        seen = crowd(proxy, STREAMS)

        assert len(seen) == STREAMS
        assert sum(comment is None for comment in seen.values()) == CUT
        until(lambda: proxy.truth()["active"] == 0)
        assert proxy.truth()["cancelled"] == started + CUT
        until(proxy.settled)
        until(lambda: all(now <= before[what] + _BESIDES for what, now in held(proxy).items()), 30)
        grown = objects() - before_objects
        assert not {name for name, more in grown.items() if more > STREAMS // 10 and not name.startswith(_KEPT)}, grown

        until(lambda: seen.keys() <= receipts(proxy).keys())
        stored = receipts(proxy)
        for id_, comment in seen.items():
            receipt = stored[id_]
            assert receipt["status"] == "settled"
            assert receipt["outcome"] == ("cancelled" if comment is None else "completed")
            assert comment is None or comment["id"] == id_
            assert 0 < receipt["low_joules"] <= receipt["energy_joules"] <= receipt["high_joules"]
        for balance in proxy.check_law():
            part = "gpu" if balance.device == "gpu:0" else "host"
            charged = sum(round(receipt["parts"][part] * 1e6) for receipt in stored.values())
            assert charged == balance.requests > 0
