"""The composition root: the one place where the parts are joined into a running node.

Importing this loads no engine: backends are child processes.
"""

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from backends.kinds import kind_of
from backends.spec import BackendKind
from backends.steps import LoadingState, StepReceiver
from backends.supervisor import BackendStatus, Supervisor
from proxy.accounting import PROXY, Accountant, now
from proxy.api.auth import Authenticator
from proxy.api.context import Context
from proxy.api.edge import Edge
from proxy.api.pages import create_pages
from proxy.config import Config
from proxy.energy.events import BackendState, Event
from proxy.energy.ledger import Ledger
from proxy.energy.receipt import Accounting, Receipt
from proxy.errors import JoulegateError
from proxy.export.metrics import Metrics
from proxy.export.snapshot import OperationsSnapshot
from proxy.learnt import Learnt
from proxy.meter.discover import Discovery, discover
from proxy.meter.sampler import Sampler
from proxy.recorder import Recorder
from proxy.relay.endpoints import ENDPOINTS, PIPELINES, moderations
from proxy.relay.observe import Observation
from proxy.relay.relay import Patience, Relay, Services, tick
from proxy.relay.responses import StoredResponses
from proxy.relay.upstream import Upstream
from proxy.routing.intake import Intake
from proxy.routing.registry import Registry
from proxy.settings import carbon_intensity, learnt_path, meter_settings, moderation_terms, receipt_store
from proxy.store.receipts import ReceiptStore

log = logging.getLogger("joulegate")

_KEEP_SECONDS = 60.0

#: Requests settle by the meters' beat; this one goes on where every meter fails, or there is none.
_SETTLING_SECONDS = 0.5

#: Headers of ours that a page of another origin may read, where such pages are allowed at all.
_EXPOSED = [
    "X-Request-Id", "X-Client-Request-Id", "X-Energy-Joules", "X-Energy-Interval-Joules", "X-Energy-Method",
    "X-Energy-Meter", "X-Energy-Boundary", "X-Energy-Status", "X-Carbon-Grams", "X-Carbon-Intensity",
    "Carbon-Emissions-Scope-2", "Link", "openai-processing-ms",
]  # fmt: skip


class Node:
    """A proxy with its meters and backends: complete alone.

    `asgi` is what a server runs; its lifespan starts and ends everything else. `started` is set once requests can
    come in; the models load meanwhile. `failure` is why it could not start.
    """

    def __init__(
        self,
        config: Config,
        *,
        recorder: Recorder | None = None,
        kinds: Callable[[str], BackendKind] = kind_of,
        discovery: Discovery | None = None,
    ) -> None:
        """`kinds` and `discovery` put other backends and meters in the place of this machine's, for tests."""
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
        self._changed = asyncio.Event()
        self.context: Context | None = None
        self._relays: dict[str, Relay] = {}
        self._observations: set[Observation] = set()
        self.asgi = self._around(create_pages(self._lifespan, version("joulegate")))

    async def wait_until_settled(self) -> None:
        """Until every backend is ready or has failed once."""
        while any(map(self.registry.loading, self.registry.specs)):
            self._changed.clear()
            await self._changed.wait()

    def _around(self, pages: FastAPI) -> ASGIApp:
        server, auth = self.config.server, self.config.auth
        authenticator = Authenticator(auth.keys, required=auth.required)
        edge = Edge(pages, self._relays, authenticator, server.allowed_hosts, server.cors_origins, self._pipeline_of)
        if not server.cors_origins:
            return edge
        return CORSMiddleware(
            edge,
            server.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )

    @asynccontextmanager
    async def _lifespan(self, pages: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                pages.state.context = self.context = await self._start(stack)
            except (JoulegateError, OSError) as error:
                self.failure = error
                raise
            self.started.set()
            yield

    async def _start(self, stack: AsyncExitStack) -> Context:
        store = self._store
        stack.callback(store.close)
        metrics = Metrics(self.registry.models)
        accountant = self._accountant(stack, _Sink(store, metrics))
        supervisor = await self._start_backends(stack, accountant)
        sampler = await self._start_meters(stack, accountant, supervisor)
        timeouts = self.config.server.timeouts
        upstream = Upstream(connect_seconds=timeouts.connect)
        stack.push_async_callback(upstream.close)
        responses = StoredResponses()
        services = Services(
            accountant,
            self.registry,
            upstream,
            metrics,
            self._observations,
            self.config.server.max_body_bytes,
            supervisor.suspect,
            self.intake,
            Patience(timeouts.first_byte, timeouts.total),
            self.config.moderator,
            responses,
        )
        endpoints = [*ENDPOINTS.values(), *PIPELINES.values(), moderations(moderation_terms(self.config))]
        self._relays.update({endpoint.path: Relay(endpoint, services) for endpoint in endpoints})
        metrics.watch(partial(self._snapshot, accountant, sampler, store))
        render = metrics.render if self.config.server.metrics else None
        return Context(
            self.registry,
            accountant,
            store,
            upstream,
            responses,
            sampler.status,
            render,
            started=int(time.time()),
            intake=self.intake,
        )

    def _pipeline_of(self, name: str) -> Relay | None:
        """What answers `/models/{name}`: the first pipeline its backend serves (any of them, if there is none)."""
        model = self.registry.models.get(name)
        paths = [
            endpoint.path
            for endpoint in PIPELINES.values()
            if model is None or not endpoint.served_by.isdisjoint(model.tasks)
        ]
        return self._relays.get(paths[0]) if paths else None

    def _accountant(self, stack: AsyncExitStack, sink: "_Sink") -> Accountant:
        energy = self.config.energy
        terms = Accounting(energy.boundary, energy.pue or 1.0, self._intensity, devices={})
        if self._recorder is not None:
            stack.callback(self._recorder.close)
        learnt = Learnt(learnt_path(self.config.store), self.registry.specs)
        accountant = Accountant(
            Ledger(known_only=True),
            terms,
            self.registry.places(),
            sinks=[sink],
            record=self._recorder.record if self._recorder else None,
            recall=learnt.recall,
        )
        stack.callback(accountant.close)
        stack.callback(lambda: learnt.keep(accountant.ledger.models()))
        saving = asyncio.create_task(_keep_now_and_then(learnt, accountant))
        stack.callback(saving.cancel)
        return accountant

    async def _start_backends(self, stack: AsyncExitStack, accountant: Accountant) -> Supervisor:
        run_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="joulegate-")))
        specs = list(self.registry.specs.values())
        supervisor = Supervisor(
            specs, run_dir=run_dir, on_change=partial(self._backend_changed, accountant), kinds=self._kinds
        )
        sockets = {supervisor.steps_socket: [spec.id for spec in specs if spec.steps is None]}
        sockets |= {Path(spec.steps): [spec.id] for spec in specs if spec.steps is not None}
        for path, names in sockets.items():
            receiver = StepReceiver(
                path,
                backends=names,
                on_steps=accountant.steps,
                on_loss=accountant.lost,
                on_state=_ignore_state,
                on_unable=supervisor.unwatched,
            )
            await receiver.start()
            stack.push_async_callback(receiver.close)
        await supervisor.start()
        stack.push_async_callback(supervisor.close)
        return supervisor

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
        self._changed.set()
        if self.registry.loading(status.name) != was_loading:
            devices = self.registry.places()[status.name]
            accountant.apply(BackendState(status.name, devices, now(), loading=not was_loading))

    def _snapshot(self, accountant: Accountant, sampler: Sampler, store: ReceiptStore) -> OperationsSnapshot:
        return OperationsSnapshot(
            devices=accountant.ledger.devices(),
            meters=sampler.status(),
            backends={(spec.name, id): self.registry.up(id) for id, spec in self.registry.specs.items()},
            queues={name: model.gate.waiting for name, model in self.registry.models.items()},
            intensity=accountant.terms.intensity,
            step_reports=accountant.reports,
            step_reports_lost=accountant.reports_lost,
            store=store.health(),
        )


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


def _ignore_state(backend: str, state: LoadingState) -> None:
    """The supervisor knows from the health check when a backend has loaded; its own word adds nothing."""
