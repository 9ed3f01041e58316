"""What the data path works with; put together in `proxy.app`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from proxy.accounting import Accountant
from proxy.energy.quantities import Nanoseconds
from proxy.relay.alarms import Alarms
from proxy.relay.observe import Observation
from proxy.relay.responses import StoredResponses
from proxy.relay.upstream import Upstream
from proxy.routing.intake import Intake
from proxy.routing.registry import Registry

_SILENT = Nanoseconds(5_000_000_000)


class Observer(Protocol):
    """What the metrics want to hear from the data path."""

    def request_finished(self, model: str, endpoint: str, code: int, seconds: float) -> None: ...
    def first_token(self, model: str, seconds: float) -> None: ...
    def tokens(self, model: str, kind: str, count: int) -> None: ...
    def in_flight(self, model: str, change: int) -> None: ...


class Patience:
    """How long is waited: until a backend's answer begins, for a request in all, and with a silent stream.

    After `keep_alive` seconds without a byte a stream's client is shown that it lives; 0 for never.
    """

    def __init__(self, *, first_byte: float, total: float, keep_alive: float) -> None:
        self.first_byte = Alarms(first_byte)
        self.total = Alarms(total)
        self.silence = Alarms(keep_alive / 2) if keep_alive else None


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
    moderator: str | None
    responses: StoredResponses


def tick(observations: set[Observation], at: Nanoseconds) -> None:
    """Keep long silent requests from holding up the settlement of the others."""
    for observation in observations:
        observation.waiting(at, _SILENT)
