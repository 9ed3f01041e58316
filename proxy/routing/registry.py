"""The models there are, and which backend serves a request: asked of the data path, told by the supervisor."""

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
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
    reports_steps: Mapping[str, bool]
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
    """The models there are and the state of their backends; the supervisor keeps it up to date by `update`."""

    def __init__(self, plans: Iterable[ModelPlan], kinds: Callable[[str], BackendKind] = kind_of) -> None:
        self._models = {plan.name: _served(plan, kinds) for plan in plans}
        self._aliases = {alias: name for name, model in self._models.items() for alias in model.plan.aliases}
        self._specs = {spec.id: spec for model in self._models.values() for spec in model.plan.replicas}
        self._states: dict[str, BackendStatus] = {}
        self._authorizations = {id: _authorization(spec) for id, spec in self._specs.items()}

    def update(self, status: BackendStatus) -> None:
        """Note a backend's new state."""
        self._states[status.name] = status
        balancer = self._models[self._specs[status.name].name].balancer
        balancer.set_live(status.name, status.state == "ready" and status.url is not None)

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
    def states(self) -> Mapping[str, BackendStatus]:
        """By the backend's own name."""
        return self._states

    def places(self) -> dict[str, tuple[str, ...]]:
        return {id: places(spec) for id, spec in self._specs.items()}

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
        """A live replica of a configured model, its work counted; raises Unavailable. `asked` is the client's name."""
        balancer = self._models[name].balancer
        now = time.monotonic()
        chosen = balancer.choose(now, work=work, affinity=affinity, avoid=avoid)
        if chosen is None:
            raise self._unavailable(name, balancer.retry_in(now))
        return Lease(self._route(chosen, asked), balancer, work)

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

    def up(self, id: str) -> bool:
        """Whether a backend is ready."""
        state = self._states.get(id)
        return state is not None and state.state == "ready"

    def _route(self, id: str, asked: str | None) -> Route:
        spec, state = self._specs[id], self._states[id]
        remote = spec.kind == "remote"
        other = spec.name if asked is not None and asked != spec.name else None  # it was asked for by an alias
        return Route(
            backend=id,
            url=(state.url or "").rstrip("/"),
            model=(spec.model if remote else None) or other,
            authorization=self._authorizations[id],
            reports_steps=self._models[spec.name].reports_steps[id] and state.reports_steps,
            takes_response_id=spec.kind == "vllm" or (remote and spec.steps is not None),
        )

    def _only_model(self, endpoint: Endpoint) -> str:
        able = [name for name, model in self._models.items() if not endpoint.served_by.isdisjoint(model.tasks)]
        if len(able) == 1:
            return able[0]
        names = ", ".join(able) or "none is configured"
        raise InvalidRequest(f"Missing required parameter: 'model' (for this endpoint: {names}).", param="model")

    def _unavailable(self, name: str, retry_in: float | None) -> Unavailable:
        starting = any(self.loading(id) for id in self._models[name].backends)
        what, code = "is not available now", "backend_unavailable"
        if retry_in is not None:
            what = "has failed several times in a row and is left alone for a moment"
        elif starting:
            what, code = "is starting", "backend_starting"
        retry_after = 5 if retry_in is None else max(1, math.ceil(retry_in))
        message = f"The backend of model '{name}' {what}. Try again shortly."
        return Unavailable(message, code=code, retry_after=retry_after)


def unknown_model(name: str, models: Iterable[str]) -> NotFound:
    known = ", ".join(f"'{model}'" for model in models)
    message = f"The model '{name[:128]}' does not exist. There are: {known}."
    return NotFound(message, param="model", code="model_not_found")


def _served(plan: ModelPlan, kinds: Callable[[str], BackendKind]) -> ServedModel:
    """What all its replicas can answer: any of them may be asked."""
    found = {spec.id: kinds(spec.kind) for spec in plan.replicas}
    first, *others = found.values()
    tasks = tuple(task for task in first.tasks if all(task in kind.tasks for kind in others))
    reports = {spec.id: _reports_steps(spec, found[spec.id]) for spec in plan.replicas}
    return ServedModel(plan, tasks, reports, Gate(plan.name, plan.max_in_flight, plan.max_queue), Balancer(found))


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
