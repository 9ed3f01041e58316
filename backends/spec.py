"""What a backend is, as plain data; importing this loads no engine."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

Kind = Literal["llamacpp", "transformers", "diffusers", "vllm", "remote"]
Task = Literal["chat", "classification", "image", "embedding", "score", "audio"]


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """One backend as configured. `name` is the public name of the model it serves; replicas of a model share it.

    `devices` are GPU indices as NVML counts them; none means the CPU. `args` are passed to the engine. `python` is the
    interpreter of an environment of its own. `url`, `api_key_env` and `steps` (socket path) belong to `remote`.
    `replica` and `generation` say which one it is: a backend that takes over from another is of the next generation.
    """

    name: str
    kind: Kind
    model: str | None = None
    devices: tuple[int, ...] = ()
    args: Mapping[str, Any] = field(default_factory=dict)
    python: str | None = None
    trust_remote_code: bool = False
    url: str | None = None
    api_key_env: str | None = None
    steps: str | None = None
    startup_seconds: float = 600.0
    replica: int = 1
    generation: int = 1

    @property
    def seat(self) -> str:
        """The model's name, with the replica's number from the second on; what takes over from it has the same."""
        return seat(self.name, self.replica)

    @property
    def id(self) -> str:
        """The name of the backend itself, which no other has while the proxy lives."""
        return self.seat if self.generation == 1 else f"{self.seat}@{self.generation}"

    def is_set_like(self, other: "BackendSpec") -> bool:
        """Whether the two differ in nothing but which one they are."""
        mine, theirs = (replace(spec, args={}, replica=1, generation=1) for spec in (self, other))
        # Not by ==, to which 1, 1.0 and True are the same; to an engine's flags they are not.
        return mine == theirs and _text(self.args) == _text(other.args)

    @property
    def device_names(self) -> tuple[str, ...]:
        """The accelerators its steps run on, as the ledger names them; the host for a backend on the CPU."""
        return tuple(f"gpu:{index}" for index in self.devices) or ("host",)


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a backend's process: the command, what is added to its environment, and where its health is told.

    `reports_steps` is False where the engine that is installed cannot tell its steps though its kind could.
    """

    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    health_path: str = "/health"
    reports_steps: bool = True


class BackendKind(Protocol):
    """What each folder under `backends/` offers: `backends.<kind>.KIND`, torch-free to import."""

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that a backend of this kind can serve."""
        ...

    @property
    def reports_steps(self) -> bool:
        """Whether its engine tells its steps; otherwise the relay's observation makes virtual ones."""
        ...

    def launch(self, spec: BackendSpec, port: int, socket: Path) -> Launch | None:
        """The process to start, listening on 127.0.0.1:`port` and reporting steps to `socket`; None for a remote.

        Raises BackendError (one line, naming the cure) when it cannot be started here.
        """
        ...


class BackendError(Exception):
    """A backend cannot be started or has failed; the message is one line that names the cause and the cure."""


def seat(name: str, replica: int) -> str:
    """What the backends are called that are, one after the other, this replica of a model."""
    return name if replica == 1 else f"{name}-{replica}"


def _text(args: Mapping[str, Any]) -> str:
    return json.dumps(args, sort_keys=True, default=str)
