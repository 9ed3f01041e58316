"""The backends of a node: made those that the configuration wants, one reload after the other, nobody's request lost.

`proxy.routing.changes` decides what is to happen; here it is done. What starts is told to all who must know it before
its first step; what leaves gets no new requests, has `drain_seconds` for those it has, and is ended.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from backends.spec import BackendSpec, seat
from backends.steps import LoadingState, StepReceiver, StepReport
from backends.supervisor import Supervisor
from proxy.accounting import Accountant
from proxy.routing.changes import Changes, Swap, changes, swapped
from proxy.routing.registry import ModelPlan, Registry

log = logging.getLogger("joulegate.fleet")

_LOOK_SECONDS = 0.05
#: So many starts a backend has before it is said to have failed.
_STARTS = 2
#: For requests that are broken off, to notice it.
_BREAKING_SECONDS = 5.0


class StepSockets:
    """Where backends report their steps: the supervisor's socket for our own processes, any other for somebody else's.

    One of ours is told its id. A server that we did not start knows itself by its place in the configuration.
    """

    def __init__(self, accountant: Accountant, supervisor: Supervisor) -> None:
        self._accountant = accountant
        self._supervisor = supervisor
        self._receivers: dict[Path, StepReceiver] = {}
        self._ids: dict[Path, dict[str, str]] = {}  # by socket and by the name in the reports

    async def open(self, spec: BackendSpec) -> None:
        """See to it that a backend can report. Raises OSError where its socket cannot be made."""
        path = self._path(spec)
        self._ids.setdefault(path, {})[spec.id] = spec.id
        if path in self._receivers:
            return
        receiver = self._receiver(path, self._ids[path])
        await receiver.start()
        self._receivers[path] = receiver

    def name(self, plans: Sequence[ModelPlan]) -> None:
        """These are served now."""
        for plan in plans:
            for place, spec in enumerate(plan.replicas, start=1):
                if spec.steps is not None:
                    self._ids.setdefault(Path(spec.steps), {})[seat(plan.name, place)] = spec.id

    async def forget(self, spec: BackendSpec) -> None:
        """A backend has ended; a socket that is nobody's any more is closed."""
        path = self._path(spec)
        ids = self._ids[path]
        for name in [name for name, id in ids.items() if id == spec.id]:
            del ids[name]
        if not ids and path != self._supervisor.steps_socket:
            await self._close(path)

    async def close(self) -> None:
        for path in [*self._receivers]:
            await self._close(path)

    def _path(self, spec: BackendSpec) -> Path:
        return self._supervisor.steps_socket if spec.steps is None else Path(spec.steps)

    async def _close(self, path: Path) -> None:
        del self._ids[path]
        receiver = self._receivers.pop(path, None)
        if receiver is not None:
            await receiver.close()

    def _receiver(self, path: Path, ids: dict[str, str]) -> StepReceiver:
        def steps(name: str, reports: Sequence[StepReport]) -> None:
            self._accountant.steps(ids[name], reports)

        return StepReceiver(
            path,
            backends=ids.keys(),
            on_steps=steps,
            on_loss=lambda name, reports: self._accountant.lost(ids[name], reports),
            on_state=_ignore_state,
            on_unable=lambda name, why: self._supervisor.unwatched(ids[name], why),
        )


def _ignore_state(backend: str, state: LoadingState) -> None:
    """The supervisor knows from the health check when a backend has loaded; its own word adds nothing."""


class Fleet:
    """All backends of a node. `become` makes them others; only one such call at a time.

    `drain_seconds` is asked each time: it may be configured anew.
    """

    def __init__(
        self, registry: Registry, supervisor: Supervisor, accountant: Accountant, drain_seconds: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._supervisor = supervisor
        self._accountant = accountant
        self._drain_seconds = drain_seconds
        self._sockets = StepSockets(accountant, supervisor)
        self._used = set(registry.specs)
        self._leaving: dict[asyncio.Task[None], BackendSpec] = {}

    async def start(self) -> None:
        """Begin to start the registry's backends. Raises OSError where they could not report their steps."""
        for spec in self._registry.specs.values():
            await self._sockets.open(spec)
        self._sockets.name(self._plans)
        await self._supervisor.start()

    async def become(self, wanted: Sequence[ModelPlan]) -> list[str]:
        """Serve these models. Returns when what was to start is ready or has failed; what leaves may take longer.

        The backends that could not be had as wanted.
        """
        todo = changes(self._plans, wanted, self._used)
        self._used |= {spec.id for spec in todo.starting}
        for spec in todo.starting:
            self._registry.know(spec)
        self._serve(todo.plans)
        for spec in todo.leaving:
            self._let_go(spec)
        _tell(todo)
        failed = await asyncio.gather(*map(self._join, todo.joining), *map(self._swap, todo.swaps))
        return [id for id in failed if id is not None]

    async def close(self) -> None:
        """Wait for nobody any more, and end every backend."""
        leaving = [*self._leaving]
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        await self._supervisor.close()
        await self._sockets.close()

    @property
    def _plans(self) -> list[ModelPlan]:
        return [model.plan for model in self._registry.models.values()]

    def _serve(self, plans: Sequence[ModelPlan]) -> None:
        self._registry.serve(plans)
        self._sockets.name(plans)

    # --- what comes ---

    async def _join(self, spec: BackendSpec) -> str | None:
        await self._begin(spec)
        return spec.id if await self._trouble(spec.id) else None

    async def _swap(self, swap: Swap) -> str | None:
        """Let the new one take over, unless it fails while the old one serves."""
        old, new = swap.old.id, swap.new.id
        await self._begin(swap.new)
        error = await self._trouble(new)
        if error and self._registry.up(old):
            log.error("%s: does not work with its new settings: %s; it goes on with the old ones", old, error)
            await self._end(swap.new)
            return old
        self._serve(swapped(self._plans, swap))
        self._let_go(swap.old)
        log.info("%s: takes over from %s", new, old)
        return new if error else None

    async def _begin(self, spec: BackendSpec) -> None:
        await self._room_for(spec)
        deaf: OSError | None = None
        try:
            await self._sockets.open(spec)
        except OSError as error:
            deaf = error
        self._accountant.introduce(spec.id)
        self._supervisor.add(spec)
        if deaf is not None:
            self._supervisor.unwatched(spec.id, f"the socket for them cannot be opened: {deaf}")

    async def _room_for(self, spec: BackendSpec) -> None:
        """Wait until those that leave have left its accelerators, whose memory may not hold both."""
        tasks = [task for task, gone in self._leaving.items() if not {*gone.devices}.isdisjoint(spec.devices)]
        if tasks:
            log.info("%s: waits for those that leave its devices", spec.id)
            await asyncio.wait(tasks)

    async def _trouble(self, id: str) -> str:
        """Wait until a backend is ready or has failed, twice: its port may have been taken. Why it has, "" if not."""
        registry = self._registry
        await registry.until(lambda: registry.up(id) or registry.has_failed(id, starts=_STARTS))
        if registry.up(id):
            return ""
        await registry.until(lambda: registry.states[id].pid is None)  # only then is it known why
        return registry.states[id].error or "it has failed"

    # --- what goes ---

    def _let_go(self, spec: BackendSpec) -> None:
        task = asyncio.create_task(self._drain(spec), name=f"drain of {spec.id}")
        self._leaving[task] = spec
        task.add_done_callback(self._leaving.pop)

    async def _drain(self, spec: BackendSpec) -> None:
        seconds = self._drain_seconds()
        await self._idle(spec.id, seconds)
        if left := self._registry.busy(spec.id):
            log.warning("%s: %d requests did not finish within %g s and are broken off", spec.id, left, seconds)
        await self._end(spec)
        log.info("%s: has left", spec.id)

    async def _idle(self, id: str, within: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while self._registry.busy(id):  # noqa: ASYNC110 - an event would cost every request, a look only reloads
                    await asyncio.sleep(_LOOK_SECONDS)

    async def _end(self, spec: BackendSpec) -> None:
        await self._supervisor.remove(spec.id)
        await asyncio.sleep(_LOOK_SECONDS)  # its last reports are on their way
        await self._idle(spec.id, _BREAKING_SECONDS)  # requests that are broken off book their end
        await self._sockets.forget(spec)
        self._registry.forget(spec.id)


def _tell(todo: Changes) -> None:
    for what, specs in (("starting", todo.joining), ("leaving", todo.leaving)):
        if specs:
            log.info("%s: %s", what, _names(specs))
    for swap in todo.swaps:
        log.info("%s: has other settings; starting %s to take over", swap.old.id, swap.new.id)


def _names(specs: Collection[BackendSpec]) -> str:
    return ", ".join(spec.id for spec in specs)
