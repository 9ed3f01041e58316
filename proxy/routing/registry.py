"""The models there are, and which backend serves a request: asked of the data path, told by the supervisor."""

import asyncio
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from backends.kinds import kind_of
from backends.spec import BackendKind, BackendSpec, Task
from backends.supervisor import BackendStatus
from proxy.energy.receipt import HOST
from proxy.errors import InvalidRequest, NotFound, Unavailable
from proxy.relay.endpoints import Endpoint
from proxy.routing.admission import Gate
from proxy.routing.balancer import Balancer

#: What keeps requests on one replica: the client's session, the beginning of the prompt, nothing.
Affinity = Literal["none", "session", "prefix"]


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A model as configured: its replicas (one at least, all of its name), and how requests come to them."""

    replicas: tuple[BackendSpec, ...]
    aliases: tuple[str, ...] = ()
    affinity: Affinity = "none"
    max_in_flight: int | None = None
    max_queue: int = 0

    @property
    def name(self) -> str:
        return self.replicas[0].name


@dataclass(frozen=True, slots=True)
class Route:
    """A live backend for one request. `model` is the name the backend has for the model where the request has another.

    `takes_response_id`: the backend is vLLM, whose Responses API ignores `X-Request-Id` but takes a `request_id`.
    """

    backend: str
    url: str
    model: str | None
    authorization: str | None
    reports_steps: bool
    takes_response_id: bool


class Lease:
    """A replica's promise to take one request: `release` it once, after `succeeded` or `failed` if that is known."""

    __slots__ = ("_balancer", "_judged", "_work", "route")

    def __init__(self, route: Route, balancer: Balancer, work: float) -> None:
        self.route = route
        self._balancer = balancer
        self._work = work
        self._judged = False

    def succeeded(self) -> None:
        self._judged = True
        self._balancer.succeeded(self.route.backend)

    def failed(self) -> None:
        self._judged = True
        self._balancer.failed(self.route.backend, time.monotonic())

    def release(self) -> None:
        self._balancer.release(self.route.backend, self._work, judged=self._judged)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A configured model, the tasks it can answer, and what its requests pass: the gate, then the balancer."""

    plan: ModelPlan
    tasks: tuple[Task, ...]
    gate: Gate
    balancer: Balancer

    @property
    def spec(self) -> BackendSpec:
        """Its first replica's."""
        return self.plan.replicas[0]

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(spec.id for spec in self.plan.replicas)


def places(spec: BackendSpec) -> tuple[str, ...]:
    """The devices a backend's work burns energy on: none of ours for a remote that names none."""
    if spec.kind == "remote" and not spec.devices:
        return ()
    return tuple(dict.fromkeys((*spec.device_names, HOST)))


class Registry:
    """The models there are and the state of their backends; the supervisor keeps it up to date by `update`.

    A backend is known from before it is started (`know`) until after it has ended (`forget`). Which of those serve
    which model is said by `serve`, for all models at once, as often as that changes.
    """

    def __init__(self, plans: Sequence[ModelPlan], kinds: Callable[[str], BackendKind] = kind_of) -> None:
        self._kinds = kinds
        self._changed = asyncio.Event()
        self._models: dict[str, ServedModel] = {}
        self._aliases: dict[str, str] = {}
        self._newcomers: set[str] = set()
        # Backends that serve no model any more: with one that is gone and finishes what it has let in, or replaced.
        self._gone: dict[str, ServedModel] = {}
        self._replaced: dict[str, Balancer] = {}
        self._specs: dict[str, BackendSpec] = {}
        self._states: dict[str, BackendStatus] = {}
        self._places: dict[str, tuple[str, ...]] = {}
        self._authorizations: dict[str, str | None] = {}
        self._reports_steps: dict[str, bool] = {}
        self._routes: dict[tuple[str, str | None], Route] = {}  # as long as nothing changes that they say
        for plan in plans:
            for spec in plan.replicas:
                self.know(spec)
        self.serve(plans)
        self._newcomers.clear()

    def know(self, spec: BackendSpec) -> None:
        """There is going to be such a backend; it serves nobody yet."""
        self._routes.clear()
        self._specs[spec.id] = spec
        self._places[spec.id] = places(spec)
        self._authorizations[spec.id] = _authorization(spec)
        self._reports_steps[spec.id] = _reports_steps(spec, self._kinds(spec.kind))

    def forget(self, id: str) -> None:
        """A backend that serves no model has ended."""
        self._routes.clear()
        known = (self._specs, self._states, self._places, self._authorizations, self._reports_steps)
        for table in (*known, self._gone, self._replaced):
            table.pop(id, None)
        self._changed.set()

    def serve(self, plans: Sequence[ModelPlan]) -> None:
        """These are the models from now on, their replicas known. Those that are gone finish what they have let in."""
        before, self._models = self._models, {plan.name: self._served(plan) for plan in plans}
        self._aliases = {alias: plan.name for plan in plans for alias in plan.aliases}
        self._newcomers = (self._newcomers | (self._models.keys() - before.keys())) & self._models.keys()
        for name, model in before.items():
            if name not in self._models:
                self._gone |= dict.fromkeys(model.backends, model)
            else:
                self._replaced |= dict.fromkeys({*model.backends} - {*self._models[name].backends}, model.balancer)

    def busy(self, id: str) -> int:
        """How many requests may still need a backend that serves no model any more."""
        if id in self._gone:
            return self._gone[id].gate.inside
        return self._replaced[id].outstanding(id) if id in self._replaced else 0

    def update(self, status: BackendStatus) -> None:
        """Note a backend's new state."""
        spec = self._specs.get(status.name)
        if spec is None:
            return
        self._routes.clear()
        self._states[status.name] = status
        live = status.state == "ready" and status.url is not None
        for model in (self._models.get(spec.name), self._gone.get(status.name)):
            if model is not None:
                model.balancer.set_live(status.name, live)
        if live:
            self._newcomers.discard(spec.name)
        self._changed.set()

    async def settle(self, ids: Collection[str]) -> None:
        """Wait until each of these backends is ready or has failed once, or is forgotten."""
        await self.until(lambda: not any(id in self._specs and self.loading(id) for id in ids))

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for something that backends' states tell."""
        while not true():
            self._changed.clear()
            await self._changed.wait()

    @property
    def models(self) -> Mapping[str, ServedModel]:
        return self._models

    @property
    def aliases(self) -> Mapping[str, str]:
        """Other names of models."""
        return self._aliases

    @property
    def specs(self) -> Mapping[str, BackendSpec]:
        """Every backend, by its own name."""
        return self._specs

    @property
    def newcomers(self) -> Collection[str]:
        """Models that have come while others were served, and have not been ready yet."""
        return self._newcomers

    @property
    def places(self) -> Mapping[str, tuple[str, ...]]:
        """On which devices each backend works."""
        return self._places

    @property
    def states(self) -> Mapping[str, BackendStatus]:
        """By the backend's own name."""
        return self._states

    def find(self, name: str) -> ServedModel | None:
        """A model, be it one that is leaving and finishes what it has let in."""
        model = self._models.get(name)
        if model is None and self._gone:
            model = next((gone for gone in self._gone.values() if gone.plan.name == name), None)
        return model

    def resolve(self, name: str | None, endpoint: Endpoint) -> str:
        """The configured model a request means; raises NotFound or InvalidRequest."""
        if name is None:
            return self._only_model(endpoint)
        name = self._aliases.get(name, name)
        model = self._models.get(name)
        if model is None:
            raise unknown_model(name, self._models)
        if endpoint.served_by.isdisjoint(model.tasks):
            message = f"The model '{name}' does not serve {endpoint.path}; it serves: {', '.join(model.tasks)}."
            raise InvalidRequest(message, param="model", code="model_not_supported")
        return name

    def lease(
        self,
        name: str,
        *,
        asked: str | None,
        work: float = 1.0,
        affinity: bytes | None = None,
        avoid: Collection[str] = (),
    ) -> Lease:
        """A live replica of a model that let the request in, its work counted; raises Unavailable, or NotFound for a
        model that has left meanwhile. `asked` is the client's name.
        """
        model = self.find(name)
        if model is None:
            raise unknown_model(name, self._models)
        now = time.monotonic()
        chosen = model.balancer.choose(now, work=work, affinity=affinity, avoid=avoid)
        if chosen is None:
            raise self._unavailable(model, model.balancer.retry_in(now))
        return Lease(self._route(chosen, asked), model.balancer, work)

    def missing(self) -> dict[str, str]:
        """The configured models that cannot serve now, and why."""
        return {
            name: "; ".join(dict.fromkeys(_why(self._states.get(id)) for id in model.backends))
            for name, model in self._models.items()
            if not any(self.up(id) for id in model.backends)
        }

    def loading(self, name: str) -> bool:
        """Whether a backend has not been ready, nor failed, since its start."""
        state = self._states.get(name)
        return state is None or state.state == "starting"

    def has_failed(self, id: str, *, starts: int) -> bool:
        """Whether a backend is not ready after so many starts."""
        state = self._states.get(id)
        return state is not None and state.restarts >= starts - 1 and not self.loading(id) and not self.up(id)

    def up(self, id: str) -> bool:
        """Whether a backend is ready."""
        state = self._states.get(id)
        return state is not None and state.state == "ready"

    def reports_steps(self, id: str) -> bool:
        """Whether a backend's engine tells its steps, as far as is known."""
        state = self._states.get(id)
        return self._reports_steps.get(id, False) and (state is None or state.reports_steps)

    def _route(self, id: str, asked: str | None) -> Route:
        key = id, asked
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._new_route(id, asked)
        return route

    def _new_route(self, id: str, asked: str | None) -> Route:
        spec, state = self._specs[id], self._states[id]
        remote = spec.kind == "remote"
        other = spec.name if asked is not None and asked != spec.name else None  # it was asked for by an alias
        return Route(
            backend=id,
            url=(state.url or "").rstrip("/"),
            model=(spec.model if remote else None) or other,
            authorization=self._authorizations[id],
            reports_steps=self.reports_steps(id),
            takes_response_id=spec.kind == "vllm" or (remote and spec.steps is not None),
        )

    def _only_model(self, endpoint: Endpoint) -> str:
        able = [name for name, model in self._models.items() if not endpoint.served_by.isdisjoint(model.tasks)]
        if len(able) == 1:
            return able[0]
        names = ", ".join(able) or "none is configured"
        raise InvalidRequest(f"Missing required parameter: 'model' (for this endpoint: {names}).", param="model")

    def _unavailable(self, model: ServedModel, retry_in: float | None) -> Unavailable:
        starting = any(self.loading(id) for id in model.backends)
        what, code = "is not available now", "backend_unavailable"
        if retry_in is not None:
            what = "has failed several times in a row and is left alone for a moment"
        elif starting:
            what, code = "is starting", "backend_starting"
        retry_after = 5 if retry_in is None else max(1, math.ceil(retry_in))
        message = f"The backend of model '{model.plan.name}' {what}. Try again shortly."
        return Unavailable(message, code=code, retry_after=retry_after)

    def _served(self, plan: ModelPlan) -> ServedModel:
        """With the gate and the balancer it had, if it was there before: they hold those who are in."""
        known = self._models.get(plan.name)
        gate = known.gate if known else Gate(plan.name, plan.max_in_flight, plan.max_queue)
        gate.limit(plan.max_in_flight, plan.max_queue)
        balancer = known.balancer if known else Balancer(())
        balancer.keep(spec.id for spec in plan.replicas)
        for spec in plan.replicas:
            balancer.set_live(spec.id, self.up(spec.id))
        return ServedModel(plan, _tasks([self._kinds(spec.kind) for spec in plan.replicas]), gate, balancer)


def unknown_model(name: str, models: Iterable[str]) -> NotFound:
    known = ", ".join(f"'{model}'" for model in models)
    message = f"The model '{name[:128]}' does not exist. There are: {known}."
    return NotFound(message, param="model", code="model_not_found")


def _tasks(kinds: Sequence[BackendKind]) -> tuple[Task, ...]:
    """What all replicas can answer: any of them may be asked."""
    first, *others = kinds
    return tuple(task for task in first.tasks if all(task in kind.tasks for kind in others))


def _reports_steps(spec: BackendSpec, kind: BackendKind) -> bool:
    return kind.reports_steps or (spec.kind == "remote" and spec.steps is not None)


def _authorization(spec: BackendSpec) -> str | None:
    """A remote's own key; a client's never goes to a backend."""
    key = os.environ.get(spec.api_key_env) if spec.api_key_env else None
    return f"Bearer {key}" if key else None


def _why(state: BackendStatus | None) -> str:
    if state is None:
        return "not started yet"
    return f"{state.state}: {state.error}" if state.error else str(state.state)
