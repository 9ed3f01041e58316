"""Which backend serves a model: decided from the backends' last known states, without any I/O."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from backends.kinds import kind_of
from backends.spec import BackendKind, BackendSpec, Task
from backends.supervisor import BackendStatus
from proxy.energy.receipt import HOST
from proxy.errors import InvalidRequest, NotFound, Unavailable
from proxy.relay.endpoints import Endpoint


@dataclass(frozen=True, slots=True)
class Route:
    """A live backend for one request. `model` is the backend's own name of the model where it differs from ours.

    `takes_response_id`: the backend is vLLM, whose Responses API ignores `X-Request-Id` but takes a `request_id`.
    """

    backend: str
    url: str
    model: str | None
    authorization: str | None
    reports_steps: bool
    takes_response_id: bool


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A configured model and the tasks its backend can answer."""

    spec: BackendSpec
    tasks: tuple[Task, ...]
    reports_steps: bool

    @property
    def places(self) -> tuple[str, ...]:
        """The devices its work burns energy on: none of ours for a remote that names none."""
        if self.spec.kind == "remote" and not self.spec.devices:
            return ()
        return tuple(dict.fromkeys((*self.spec.device_names, HOST)))


class Registry:
    """The models there are and the state of their backends; the supervisor keeps it up to date by `update`."""

    def __init__(self, specs: Iterable[BackendSpec], kinds: Callable[[str], BackendKind] = kind_of) -> None:
        self._models = {spec.name: _served(spec, kinds(spec.kind)) for spec in specs}
        self._states: dict[str, BackendStatus] = {}
        self._authorizations = {name: _authorization(model.spec) for name, model in self._models.items()}

    def update(self, status: BackendStatus) -> None:
        self._states[status.name] = status

    @property
    def models(self) -> Mapping[str, ServedModel]:
        return self._models

    @property
    def states(self) -> Mapping[str, BackendStatus]:
        return self._states

    def places(self) -> dict[str, tuple[str, ...]]:
        return {name: model.places for name, model in self._models.items()}

    def resolve(self, name: str | None, endpoint: Endpoint) -> str:
        """The configured model a request means; raises NotFound or InvalidRequest."""
        if name is None:
            return self._only_model(endpoint)
        model = self._models.get(name)
        if model is None:
            raise unknown_model(name, self._models)
        if endpoint.served_by.isdisjoint(model.tasks):
            message = f"The model '{name}' does not serve {endpoint.path}; it serves: {', '.join(model.tasks)}."
            raise InvalidRequest(message, param="model", code="model_not_supported")
        return name

    def route(self, name: str) -> Route:
        """A live backend for a configured model; raises Unavailable."""
        state = self._states.get(name)
        if state is None or state.state != "ready" or state.url is None:
            raise _not_ready(name, state)
        model = self._models[name]
        remote = model.spec.kind == "remote"
        return Route(
            backend=name,
            url=state.url.rstrip("/"),
            model=model.spec.model if remote else None,
            authorization=self._authorizations[name],
            reports_steps=model.reports_steps and state.reports_steps,
            takes_response_id=model.spec.kind == "vllm" or (remote and model.spec.steps is not None),
        )

    def missing(self) -> dict[str, str]:
        """The configured models that cannot serve now, and why."""
        return {
            name: _why(self._states.get(name))
            for name in self._models
            if name not in self._states or self._states[name].state != "ready"
        }

    def _only_model(self, endpoint: Endpoint) -> str:
        able = [name for name, model in self._models.items() if not endpoint.served_by.isdisjoint(model.tasks)]
        if len(able) == 1:
            return able[0]
        names = ", ".join(able) or "none is configured"
        raise InvalidRequest(f"Missing required parameter: 'model' (for this endpoint: {names}).", param="model")


def unknown_model(name: str, models: Iterable[str]) -> NotFound:
    known = ", ".join(f"'{model}'" for model in models)
    message = f"The model '{name[:128]}' does not exist. There are: {known}."
    return NotFound(message, param="model", code="model_not_found")


def _served(spec: BackendSpec, kind: BackendKind) -> ServedModel:
    reports = kind.reports_steps or (spec.kind == "remote" and spec.steps is not None)
    return ServedModel(spec, tuple(kind.tasks), reports)


def _authorization(spec: BackendSpec) -> str | None:
    """A remote's own key; a client's never goes to a backend."""
    key = os.environ.get(spec.api_key_env) if spec.api_key_env else None
    return f"Bearer {key}" if key else None


def _why(state: BackendStatus | None) -> str:
    if state is None:
        return "not started yet"
    return f"{state.state}: {state.error}" if state.error else str(state.state)


def _not_ready(name: str, state: BackendStatus | None) -> Unavailable:
    starting = state is None or state.state == "starting"
    what = "is starting" if starting else "is not available now"
    code = "backend_starting" if starting else "backend_unavailable"
    return Unavailable(f"The backend of model '{name}' {what}. Try again shortly.", code=code)
