"""The configuration: every field typed, unknown fields refused, errors that name the field's path."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from backends.spec import BackendSpec, Kind
from proxy.energy.receipt import Boundary
from proxy.energy.registry import PROXY_BACKEND
from proxy.errors import ConfigError
from proxy.routing.registry import Affinity, ModelPlan

#: How many may wait for a model that has a max_in_flight and no max_queue.
_DEFAULT_QUEUE = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:-]{0,127}")


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Timeouts(_Section):
    """Seconds: to connect to a backend, until its answer begins, and for a request in all, its wait included."""

    connect: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5.0
    first_byte: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    total: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3600.0


class Server(_Section):
    """Where the proxy listens. `allowed_hosts` adds names to those a Host header may give (names, not IPs)."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"  # an empty one would be every address there is
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    allowed_hosts: list[str] = []
    cors_origins: list[str] = []
    max_body_bytes: Annotated[int, Field(ge=1024)] = 32 * 1024 * 1024
    metrics: bool = True
    timeouts: Timeouts = Timeouts()
    drain_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    keep_alive_seconds: Annotated[float, Field(ge=0, le=3600)] = 30.0  # a stream's longest silence; 0: as long as it is


class Key(_Section):
    """A client's key, known by the SHA-256 of its text only."""

    name: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    admin: bool = False


class Auth(_Section):
    required: bool = False
    keys: list[Key] = []

    @model_validator(mode="after")
    def _keys_when_required(self) -> "Auth":
        if self.required and not self.keys:
            raise ValueError("required is true but there are no keys: nobody could use this proxy")
        return self


class Store(_Section):
    url: str = "sqlite:///joulegate.db"


class Carbon(_Section):
    source: Literal["static", "codecarbon"] = "codecarbon"
    country: str | None = None
    region: str | None = None
    grams_per_kwh: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _static_needs_a_figure(self) -> "Carbon":
        if self.source == "static" and self.grams_per_kwh is None:
            raise ValueError("source: static needs grams_per_kwh")
        return self


class Meters(_Section):
    """Which meters may be used. `estimate` is CodeCarbon's guess for a host that has no meter."""

    nvml: bool = True
    rapl: bool = True
    rapl_root: Path = Path("/sys/class/powercap")
    estimate: bool = True
    replay: Path | None = None


class Energy(_Section):
    sample_hz: Annotated[float, Field(gt=0, le=1000)] = 20.0
    boundary: Boundary = "node"
    pue: Annotated[float, Field(ge=1, le=10)] | None = None
    carbon: Carbon = Carbon()
    meters: Meters = Meters()

    @model_validator(mode="after")
    def _facility_needs_pue(self) -> "Energy":
        if self.boundary == "facility" and self.pue is None:
            raise ValueError(
                "boundary: facility needs pue, the power usage effectiveness of the building (such as 1.12)"
            )
        return self


class Backend(_Section):
    kind: Kind
    model: str | None = None
    devices: list[Annotated[int, Field(ge=0)]] = []
    args: dict[str, Any] = {}
    python: str | None = None
    trust_remote_code: bool = False
    url: Annotated[str, Field(pattern=r"^https?://")] | None = None
    api_key_env: str | None = None
    steps: str | None = None
    startup_seconds: Annotated[float, Field(gt=0)] = 600.0

    @model_validator(mode="after")
    def _model_or_url(self) -> "Backend":
        if self.kind == "remote" and self.url is None:
            raise ValueError("kind: remote needs url, such as http://10.0.0.5:8000")
        if self.kind != "remote" and self.model is None:
            raise ValueError(f"kind: {self.kind} needs model, a path or the name of a model")
        if self.kind != "remote" and self.url is not None:
            raise ValueError("url belongs to kind: remote")
        if self.url is not None and not _has_host(self.url):
            raise ValueError(f"url should name a host, such as http://10.0.0.5:8000, not {self.url}")
        return self


def _has_host(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0  # reading the port checks it
    except ValueError:
        return False


class Moderation(_Section):
    """How a classifier moderates: `benign` are its labels for what is harmless, `threshold` the score that flags."""

    benign: Annotated[list[str], Field(min_length=1)] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5


class Model(_Section):
    """A model and what serves it: one `backend`, or `replicas` that share the work.

    `moderation`: this classifier answers `/v1/moderations`; the only classifier does so unasked.
    """

    name: str
    backend: Backend | None = None
    replicas: Annotated[list[Backend], Field(min_length=1, max_length=64)] | None = None
    aliases: Annotated[list[str], Field(max_length=64)] = []
    affinity: Affinity = "none"
    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    max_queue: Annotated[int, Field(ge=0)] | None = None
    moderation: bool | Moderation = False

    @model_validator(mode="after")
    def _plain_names(self) -> "Model":
        for name in (self.name, *self.aliases):
            if not _NAME.fullmatch(name):
                raise ValueError("name must be letters, digits and . _ / : - (at most 128)")
            if name == PROXY_BACKEND:
                raise ValueError(f"name must not be {PROXY_BACKEND!r}: in the books that is the proxy's own work")
        return self

    @model_validator(mode="after")
    def _backend_or_replicas(self) -> "Model":
        if (self.backend is None) == (self.replicas is None):
            raise ValueError("needs either backend or replicas, a list of backends")
        if self.max_queue is not None and self.max_in_flight is None:
            raise ValueError("max_queue needs max_in_flight: without it nobody waits")
        return self

    def specs(self) -> tuple[BackendSpec, ...]:
        """Its backends, each to be supervised on its own."""
        backends = self.replicas if self.backend is None else [self.backend]
        return tuple(_spec(self.name, number, backend) for number, backend in enumerate(backends or (), start=1))

    def plan(self) -> ModelPlan:
        queue = _DEFAULT_QUEUE if self.max_queue is None else self.max_queue
        return ModelPlan(self.specs(), tuple(self.aliases), self.affinity, self.max_in_flight, queue)


def _spec(name: str, replica: int, backend: Backend) -> BackendSpec:
    fields = backend.model_dump()
    return BackendSpec(name=name, replica=replica, **{**fields, "devices": tuple(fields["devices"])})


def _starter_models() -> list[Model]:
    """What is served when there is no configuration: one small model of each kind, on the CPU."""
    return [
        Model(name="smollm2", backend=Backend(kind="llamacpp", model="starter:smollm2")),
        Model(name="sentiment", backend=Backend(kind="transformers", model="starter:sentiment")),
        Model(name="painter", backend=Backend(kind="diffusers", model="starter:painter")),
    ]


class Config(_Section):
    server: Server = Server()
    auth: Auth = Auth()
    store: Store = Store()
    energy: Energy = Energy()
    models: list[Model] = Field(default_factory=_starter_models)

    @model_validator(mode="after")
    def _names_differ(self) -> "Config":
        backends = [spec.id for model in self.models for spec in model.specs()]
        names = backends + [alias for model in self.models for alias in model.aliases]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models: the name {name!r} stands twice")
        return self

    @model_validator(mode="after")
    def _one_moderator(self) -> "Config":
        moderators = [model.name for model in self.models if model.moderation]
        if len(moderators) > 1:
            raise ValueError(f"models: only one can say moderation, not {', '.join(moderators)}")
        return self

    @property
    def moderator(self) -> str | None:
        """The model that answers `/v1/moderations` where a request names none."""
        return next((model.name for model in self.models if model.moderation), None)


class _Loader(yaml.SafeLoader):
    """YAML without its trap: a key that stands twice is refused, where YAML's readers let the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) and key.value != "<<" else None
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands twice", key.start_mark)
            if name is not None:
                seen.add(name)
        return super().construct_mapping(node, deep)


def load(path: Path) -> Config:
    """Read a YAML file; raises ConfigError with one line that names the file, the field and what it should be."""
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:  # a date that is none
        raise ConfigError(f"{path}: not YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    return parse({} if document is None else document, source=str(path))


def parse(document: object, *, source: str) -> Config:
    """Validate a parsed document; raises ConfigError."""
    if not isinstance(document, dict):
        raise ConfigError(f"{source}: should be a mapping of server, auth, store, energy and models")
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{source}: " + "; ".join(_explain(dict(item)) for item in error.errors())) from error


def _explain(item: dict[str, Any]) -> str:
    """One problem of pydantic's as `path: what it should be`."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"]).lstrip(".")
    reason = "there is no such field" if item["type"] == "extra_forbidden" else str(item["msg"])
    reason = reason.removeprefix("Value error, ")
    return f"{path}: {reason}" if path else reason
