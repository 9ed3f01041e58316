"""A node that is busy: its metrics move as those of a real one do, and are served over HTTP."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from proxy.energy.quantities import Microjoules
from proxy.export.metrics import Metrics
from proxy.export.snapshot import OperationsSnapshot
from tests.export.nodes import balance, snapshot
from tests.receipts import receipt


class _Load(threading.Thread):
    """Twenty requests a second, each of which costs what the receipts' example does."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__(daemon=True)
        self._metrics = metrics
        self._ended = threading.Event()
        self._done = 0

    def run(self) -> None:
        while not self._ended.wait(0.05):
            self._done += 1
            self._metrics.request_finished("chat", "/v1/chat/completions", 200, 0.4)
            self._metrics.first_token("chat", 0.05)
            self._metrics.tokens("chat", "prompt", 12)
            self._metrics.tokens("chat", "completion", 40)
            self._metrics.receipt_settled(receipt(str(self._done)), Microjoules(12_000_000))

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def snapshot(self) -> OperationsSnapshot:
        requests = self._done * 10_100_000
        return snapshot(balance(requests=requests, counter=100_000_000 + 2 * requests), balance("host"))


@contextmanager
def busy_node() -> Iterator[str]:
    """`host:port` of a node that serves `/metrics`."""
    metrics = Metrics(["chat", "painter"])
    load = _Load(metrics)
    metrics.watch(load.snapshot)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = metrics.render()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Not into the tests' output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        load.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            load.stop()
            server.shutdown()
            serving.join()
