"""A node that is busy: the real proxy with stand-in engines, and clients that ask for a little of everything."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.e2e.harness import SteadyMeter, running

ASKED = (
    ("/v1/chat/completions", {"model": "chat", "stream": True, "messages": [{"role": "user", "content": "hello"}]}),
    ("/v1/chat/completions", {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}),
    ("/classify", {"model": "sentiment", "input": "a fine film"}),
    ("/v1/images/generations", {"model": "painter", "prompt": "a red apple"}),
)


@dataclass
class ComparedMeter(SteadyMeter):
    """A meter that has a second source to compare itself with."""

    disagreement: float | None = 0.01


class _Load(threading.Thread):
    """Asks, rests (so that the devices are idle at times), and asks again."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._ended = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._ended.wait(0.3):
                for path, body in ASKED:
                    client.post(path, json=body).raise_for_status()

    def stop(self) -> None:
        self._ended.set()
        self.join()


@contextmanager
def busy_node(folder: Path) -> Iterator[str]:
    """`host:port` of a proxy that serves requests and `/metrics`."""
    with running(folder, meters=[ComparedMeter(), SteadyMeter("host", 50.0, kind="rapl")]) as proxy:
        load = _Load(proxy.url)
        load.start()
        try:
            yield proxy.url.removeprefix("http://")
        finally:
            load.stop()
