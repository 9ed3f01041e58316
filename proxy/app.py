"""The composition root: the one place where the parts are joined into a running node.

Importing this loads no engine: backends are child processes.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from proxy.api.auth import Authenticator
from proxy.api.context import Context
from proxy.api.edge import Edge
from proxy.api.pages import create_pages
from proxy.config import Config
from proxy.export.metrics import Metrics
from proxy.meter.discover import Discovery
from proxy.relay.observe import Observation
from proxy.relay.relay import Relay, Services
from proxy.relay.upstream import Upstream
from proxy.routing.registry import Registry
from proxy.store import ReceiptStore

log = logging.getLogger("joulegate")


class Node:
    """A proxy with its meters and backends: complete alone.

    `asgi` is what a server runs; its lifespan starts and ends everything else. `started` is set once requests can
    come in; the models load meanwhile.
    """

    def __init__(self, config: Config, *, record: Path | None = None) -> None:
        self.config = config
        self.started = asyncio.Event()
        self.registry = Registry(model.spec() for model in config.models)
        self.discovery = Discovery([], [])
        self._intensity = carbon_intensity(config.energy.carbon)
        self._record = record
        self._observations: set[Observation] = set()
        self._changed = asyncio.Event()
        self._relays: dict[str, Relay] = {}
        pages = create_pages(self._lifespan, version("joulegate"))
        self.asgi: ASGIApp = self._around(pages)

    async def wait_until_settled(self) -> None:
        """Until every backend is ready or has failed once."""
        while any(self._loading(name) for name in self.registry.models):
            self._changed.clear()
            await self._changed.wait()

    def _loading(self, name: str) -> bool:
        state = self.registry.states.get(name)
        return state is None or state.state == "starting"

    def _around(self, pages: FastAPI) -> ASGIApp:
        server, auth = self.config.server, self.config.auth
        authenticator = Authenticator(auth.keys, required=auth.required)
        edge: ASGIApp = Edge(pages, self._relays, authenticator, server.allowed_hosts, server.cors_origins)
        if not server.cors_origins:
            return edge
        exposed = ["X-Request-Id", "X-Client-Request-Id", "Link", "Carbon-Emissions-Scope-2", *_EXPOSED]
        return CORSMiddleware(
            edge, server.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=exposed
        )

    @asynccontextmanager
    async def _lifespan(self, pages: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="joulegate-")))
            store = ReceiptStore(self.config.store.url)
            stack.callback(store.close)
            metrics = Metrics(self.registry.models)
            accountant = self._accountant(stack, [_Sink(store, metrics)])
            upstream = Upstream()
            stack.push_async_callback(upstream.close)
            self._open_relays(
                Services(
                    accountant, self.registry, upstream, metrics, self._observations, self.config.server.max_body_bytes
                )
            )
            supervisor = await self._start_backends(stack, run_dir, accountant, metrics)
            sampler = await self._start_meters(stack, accountant, supervisor)
            metrics.observe(partial(self._snapshot, accountant, sampler))
            render = metrics.render if self.config.server.metrics else None
            pages.state.context = Context(
                self.registry, accountant, store, sampler.status, render, started=int(time.time())
            )
            self.started.set()
            yield
