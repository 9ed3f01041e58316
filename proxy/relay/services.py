"""What the data path works with; put together in `proxy.app`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from proxy.accounting import Accountant
from proxy.energy.quantities import Nanoseconds
from proxy.energy.receipt import Tokens
from proxy.relay.observe import Observation
from proxy.relay.responses import StoredResponses
from proxy.relay.upstream import Upstream
from proxy.relay.watch import Watch
from proxy.routing.intake import Intake
from proxy.routing.registry import Registry

_SILENT = Nanoseconds(5_000_000_000)


class Observer(Protocol):
    """What the metrics want to hear from the data path."""

    def request_finished(self, model: str, endpoint: str, code: int, seconds: float) -> None: ...
    def first_token(self, model: str, seconds: float) -> None: ...
    def tokens(self, model: str, tokens: Tokens) -> None: ...
    def in_flight(self, model: str, change: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: until a backend's answer begins, for a request in all, and a stream's longest silence (0: any)."""

    first_byte: float
    total: float
    silence: float

    @property
    def shortest(self) -> float:
        return min(self.first_byte, self.total, self.silence or self.total)


@dataclass(frozen=True, slots=True)
class Services:
    """`observations` are the virtual steps under way, `suspect` has a backend's health checked now, `moderator` is the
    model that moderates where a request names none, `responses` says where stored responses are.
    """

    accountant: Accountant
    registry: Registry
    upstream: Upstream
    observer: Observer
    observations: set[Observation]
    max_body_bytes: int
    suspect: Callable[[str], None]
    intake: Intake
    patience: Patience
    watch: Watch
    moderator: str | None
    responses: StoredResponses


def tick(observations: set[Observation], at: Nanoseconds) -> None:
    """Keep long silent requests from holding up the settlement of the others."""
    for observation in observations:
        observation.waiting(at, _SILENT)
