"""The composition root: the one place where the parts are joined into a running node.

Importing this loads no engine: backends are child processes.
"""

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from backends.kinds import kind_of
from backends.spec import BackendKind
from backends.supervisor import BackendStatus, Supervisor
from proxy.accounting import PROXY, Accountant, now
from proxy.api.auth import Authenticator
from proxy.api.context import Context
from proxy.api.edge import EXPOSED, Edge
from proxy.api.pages import create_pages
from proxy.config import Config
from proxy.energy.attribution import DeviceBalance
from proxy.energy.events import BackendState, Event
from proxy.energy.ledger import Ledger
from proxy.energy.receipt import Accounting, Receipt
from proxy.energy.registry import PROXY_BACKEND
from proxy.errors import JoulegateError
from proxy.export.metrics import Metrics
from proxy.export.snapshot import OperationsSnapshot
from proxy.fleet import Fleet
from proxy.learnt import Learnt
from proxy.meter.discover import Discovery, discover
from proxy.meter.sampler import Sampler
from proxy.recorder import Recorder
from proxy.relay.endpoints import ENDPOINTS, PIPELINES, moderations
from proxy.relay.observe import Observation
from proxy.relay.relay import Relay
from proxy.relay.responses import StoredResponses
from proxy.relay.services import Patience, Services, tick
from proxy.relay.upstream import Upstream
from proxy.relay.watch import Watch
from proxy.reload import Reloads, compare
from proxy.routing.intake import Intake
from proxy.routing.registry import Registry
from proxy.settings import carbon_intensity, learnt_path, meter_settings, moderation_terms, receipt_store
from proxy.store.receipts import ReceiptStore

log = logging.getLogger("joulegate")

T = TypeVar("T")
_KEEP_SECONDS = 60.0

#: Requests settle by the meters' beat; this one goes on where every meter fails, or there is none.
_SETTLING_SECONDS = 0.5


class Node:
    """A proxy with its meters and backends: complete alone.

    `asgi` is what a server runs, its lifespan starts and ends everything else; `edge` is for the server's protocol,
    which hands requests of models past ASGI to the relay. `started` is set once requests can come in; the models load
    meanwhile. `failure` is why it could not start.
    """

    def __init__(
        self,
        config: Config,
        *,
        reread: Callable[[], Config] | None = None,
        recorder: Recorder | None = None,
        kinds: Callable[[str], BackendKind] = kind_of,
        discovery: Discovery | None = None,
    ) -> None:
        """`reread` gives the configuration as it is then, or raises ConfigError; None: it never changes.

        `kinds` and `discovery` put other backends and meters in the place of this machine's, for tests.
        """
        self.config = config
        self.started = asyncio.Event()
        self.failure: JoulegateError | OSError | None = None
        self._kinds = kinds
        self.registry = Registry([model.plan() for model in config.models], kinds)
        self.intake = Intake()
        self.discovery = discovery or Discovery([], [])
        self._discover = discovery is None
        self._store = receipt_store(config.store)
        self._intensity = carbon_intensity(config.energy.carbon)
        self._recorder = recorder
        self._began = int(time.time())
        self._reloads = Reloads(reread, self._become)
        self._parts: _Parts | None = None
        self._relays: dict[str, Relay] = {}
        self._observations: set[Observation] = set()
        self._pages = create_pages(self._lifespan, version("joulegate"))
        self.edge = Edge(self._pages, self._relays, *_admission(config), self._pipeline_of)
        self._asgi = self._with_cors(config)

    @property
    def context(self) -> Context | None:
        """What the pages are told of the node, once it is started."""
        found: Context | None = getattr(self._pages.state, "context", None)
        return found

    def asgi(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """The application, as it is configured now."""
        return self._asgi(scope, receive, send)

    def reload(self) -> None:
        """Have the configuration read again and taken on, soon; the log says what came of it."""
        self._reloads.ask()

    async def wait_until_settled(self) -> None:
        """Until every backend is ready or has failed once."""
        await self.registry.settle([*self.registry.specs])

    def _with_cors(self, config: Config) -> ASGIApp:
        """The edge, and CORS around it if pages of other origins may call."""
        if not config.server.cors_origins:
            return self.edge
        return CORSMiddleware(
            self.edge,
            config.server.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )

    @asynccontextmanager
    async def _lifespan(self, pages: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                await self._start(stack)
            except (JoulegateError, OSError) as error:
                self.failure = error
                raise
            self.started.set()
            yield

    async def _start(self, stack: AsyncExitStack) -> None:
        store = self._store
        stack.callback(store.close)
        metrics = Metrics(self.registry.models)
        learnt = Learnt(learnt_path(self.config.store), self.registry.specs)
        accountant = self._accountant(stack, _Sink(store, metrics), learnt)
        supervisor = self._supervisor(stack, accountant)
        fleet = Fleet(self.registry, supervisor, accountant, lambda: self.config.server.drain_seconds)
        stack.push_async_callback(fleet.close)
        await fleet.start()
        sampler = await self._start_meters(stack, accountant, supervisor)
        upstreams = _Upstreams()
        stack.push_async_callback(upstreams.close)
        metrics.watch(partial(self._snapshot, accountant, sampler, store))
        watch = Watch()
        watching = asyncio.create_task(watch.run())
        stack.callback(watching.cancel)
        self._parts = _Parts(
            accountant, fleet, supervisor, sampler, metrics, learnt, upstreams, watch, StoredResponses()
        )
        self._adopt(self.config)
        reloading = asyncio.create_task(self._reloads.run(), name="reloads")
        stack.push_async_callback(_cancelled, reloading)

    async def _become(self, wanted: Config) -> None:
        """Take on another configuration, as far as that can be done while the node runs."""
        assert self._parts is not None
        if self.intake.draining:
            return
        found = compare(self.config, wanted)
        for path in found.restart:
            log.warning("%s: needs a restart; until then it stays as it is", path)
        accountant, learnt, energy = self._parts.accountant, self._parts.learnt, found.config.energy
        intensity = await asyncio.to_thread(carbon_intensity, energy.carbon)
        accountant.adopt(energy.boundary, energy.pue or 1.0, intensity)
        self._adopt(found.config)
        if found.changed:
            log.info("in force for new requests: %s", ", ".join(found.changed))
        await asyncio.to_thread(learnt.keep, accountant.ledger.models())
        failed = await self._parts.fleet.become([model.plan() for model in found.config.models])
        but = f", but not for {', '.join(failed)}: see above" if failed else ""
        log.info("the configuration has been read again and is in force%s", but)

    def _adopt(self, config: Config) -> None:
        """Make new requests go by this configuration; those under way keep what they came in with."""
        parts = self._parts
        assert parts is not None
        self.config = config
        parts.metrics.know(model.name for model in config.models)
        timeouts = config.server.timeouts
        upstream = parts.upstreams.connecting_within(timeouts.connect)
        patience = Patience(timeouts.first_byte, timeouts.total, config.server.keep_alive_seconds)
        parts.watch.keep_to(patience.shortest)
        services = Services(
            parts.accountant,
            self.registry,
            upstream,
            parts.metrics,
            self._observations,
            config.server.max_body_bytes,
            parts.supervisor.suspect,
            self.intake,
            patience,
            parts.watch,
            config.moderator,
            parts.responses,
        )
        endpoints = [*ENDPOINTS.values(), *PIPELINES.values(), moderations(moderation_terms(config))]
        self._relays.update({endpoint.path: Relay(endpoint, services) for endpoint in endpoints})
        self._pages.state.context = Context(
            self.registry,
            parts.accountant,
            self._store,
            upstream,
            parts.responses,
            parts.sampler.status,
            parts.metrics.render if config.server.metrics else None,
            started=self._began,
            intake=self.intake,
        )
        self.edge.go_by(*_admission(config))
        self._asgi = self._with_cors(config)

    def _pipeline_of(self, name: str) -> Relay | None:
        """What answers `/models/{name}`: the first pipeline its backend serves (any of them, if there is none)."""
        model = self.registry.models.get(name)
        paths = [
            endpoint.path
            for endpoint in PIPELINES.values()
            if model is None or not endpoint.served_by.isdisjoint(model.tasks)
        ]
        return self._relays.get(paths[0]) if paths else None

    def _accountant(self, stack: AsyncExitStack, sink: "_Sink", learnt: Learnt) -> Accountant:
        energy = self.config.energy
        terms = Accounting(energy.boundary, energy.pue or 1.0, self._intensity, devices={})
        if self._recorder is not None:
            stack.callback(self._recorder.close)
        accountant = Accountant(
            Ledger(known_only=True),
            terms,
            self.registry.places,
            sinks=[sink],
            record=self._recorder.record if self._recorder else None,
            recall=learnt.recall,
            later=asyncio.get_running_loop().call_soon,
        )
        stack.callback(accountant.close)
        stack.callback(lambda: learnt.keep(accountant.ledger.models()))
        saving = asyncio.create_task(_keep_now_and_then(learnt, accountant))
        stack.callback(saving.cancel)
        return accountant

    def _supervisor(self, stack: AsyncExitStack, accountant: Accountant) -> Supervisor:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="joulegate-")))
        return Supervisor(
            [*self.registry.specs.values()],
            run_dir=run_dir,
            on_change=partial(self._backend_changed, accountant),
            kinds=self._kinds,
        )

    async def _start_meters(self, stack: AsyncExitStack, accountant: Accountant, supervisor: Supervisor) -> Sampler:
        if self._discover:
            self.discovery = await asyncio.to_thread(discover, meter_settings(self.config.energy.meters))
        for problem in self.discovery.problems:
            log.info("no %s meter: %s; cure: %s", problem.meter, problem.why, problem.cure)
        loop = asyncio.get_running_loop()

        def observe(events: Sequence[Event]) -> None:
            tick(self._observations, now())
            accountant.observe(events)

        def emit(events: Sequence[Event]) -> None:
            """From the sampler's thread; what comes after the loop has closed is of no use to anyone."""
            if not loop.is_closed():
                loop.call_soon_threadsafe(observe, events)

        hz = self.config.energy.sample_hz
        sampler = Sampler(self.discovery.meters, emit, hz=hz, our_pids=partial(_our_pids, supervisor))
        sampler.start()
        stack.push_async_callback(asyncio.to_thread, sampler.stop)
        settling = asyncio.create_task(_repeat(partial(observe, ()), _SETTLING_SECONDS))
        stack.callback(settling.cancel)
        return sampler

    def _backend_changed(self, accountant: Accountant, status: BackendStatus) -> None:
        was_loading = status.name in self.registry.states and self.registry.loading(status.name)
        self.registry.update(status)
        if self.registry.loading(status.name) != was_loading:
            devices = self.registry.places[status.name]
            accountant.apply(BackendState(status.name, devices, now(), loading=not was_loading))

    def _snapshot(self, accountant: Accountant, sampler: Sampler, store: ReceiptStore) -> OperationsSnapshot:
        """Of the backends there are: those that have left would multiply the series with every reload."""
        there, models = {*self.registry.specs, PROXY_BACKEND}, self.registry.models.items()
        return OperationsSnapshot(
            devices=[_of(there, balance) for balance in accountant.ledger.devices()],
            meters=sampler.status(),
            backends={(name, id): self.registry.up(id) for name, model in models for id in model.backends},
            queues={name: model.gate.waiting for name, model in models},
            intensity=accountant.terms.intensity,
            step_reports=_among(there, accountant.reports),
            step_reports_lost=_among(there, accountant.reports_lost),
            store=store.health(),
        )


@dataclass(frozen=True, slots=True)
class _Parts:
    """What lives as long as the node, whatever its configuration becomes."""

    accountant: Accountant
    fleet: Fleet
    supervisor: Supervisor
    sampler: Sampler
    metrics: Metrics
    learnt: Learnt
    upstreams: "_Upstreams"
    watch: Watch
    responses: StoredResponses


class _Upstreams:
    """A client of the data path for each time-out to connect that has been configured: requests keep theirs."""

    def __init__(self) -> None:
        self._made: dict[float, Upstream] = {}

    def connecting_within(self, seconds: float) -> Upstream:
        if seconds not in self._made:
            self._made[seconds] = Upstream(connect_seconds=seconds)
        return self._made[seconds]

    async def close(self) -> None:
        for upstream in self._made.values():
            await upstream.close()


def _among(there: Collection[str], counts: Mapping[str, T]) -> dict[str, T]:
    return {backend: count for backend, count in counts.items() if backend in there}


def _of(there: Collection[str], balance: DeviceBalance) -> DeviceBalance:
    return replace(balance, fit_error_ratio=_among(there, balance.fit_error_ratio))


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


def _admission(config: Config) -> tuple[Authenticator, Sequence[str], Sequence[str]]:
    """Who may call: keys, names of hosts, origins of pages."""
    server, auth = config.server, config.auth
    return Authenticator(auth.keys, required=auth.required), server.allowed_hosts, server.cors_origins


async def _keep_now_and_then(learnt: Learnt, accountant: Accountant) -> None:
    """So that a crash costs a minute of learning at most."""
    while True:
        await asyncio.sleep(_KEEP_SECONDS)
        await asyncio.to_thread(learnt.keep, accountant.ledger.models())


class _Sink:
    """Settled receipts go to the store and to the metrics."""

    def __init__(self, store: ReceiptStore, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics

    def settled(self, receipt: Receipt, provisional: Receipt | None) -> None:
        self._store.put(receipt)
        told = provisional.figures.parts.total if provisional and provisional.figures else None
        self._metrics.receipt_settled(receipt, told)

    def still_provisional(self, receipt: Receipt) -> None:
        self._store.put(receipt)


def _our_pids(supervisor: Supervisor) -> Mapping[str, Sequence[int]]:
    return {PROXY: [os.getpid()], **{name: [pid] for name, pid in supervisor.pids().items()}}


async def _repeat(call: Callable[[], None], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        call()
