"""What the pages may ask of the running node."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastapi import Request

from proxy.accounting import Accountant
from proxy.relay.responses import StoredResponses
from proxy.relay.upstream import Upstream
from proxy.routing.intake import Intake
from proxy.routing.registry import Registry
from proxy.store.receipts import ReceiptStore


class MeterUp(Protocol):
    """One meter's state as the sampler tells it."""

    @property
    def device(self) -> str: ...
    @property
    def up(self) -> bool: ...
    @property
    def error(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Context:
    """The parts of the node behind the pages; `render_metrics` gives Prometheus' text, or None where switched off."""

    registry: Registry
    accountant: Accountant
    store: ReceiptStore
    upstream: Upstream
    responses: StoredResponses
    meters: Callable[[], Sequence[MeterUp]]
    render_metrics: Callable[[], bytes] | None
    started: int
    intake: Intake


def context(request: Request) -> Context:
    """A FastAPI dependency: the context of the running node."""
    found: Context = request.app.state.context
    return found
