"""What the pages may ask of the running node."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request

from proxy.accounting import Accountant
from proxy.routing.registry import Registry


class StoredReceipts(Protocol):
    """Where receipts are found when memory no longer has them: their `energy` object and whose they are."""

    def get(self, id: str) -> "StoredReceipt | None": ...


class StoredReceipt(Protocol):
    @property
    def key(self) -> str | None: ...
    @property
    def object(self) -> dict[str, Any]: ...


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
    store: StoredReceipts
    meters: Callable[[], Sequence[MeterUp]]
    render_metrics: Callable[[], bytes] | None
    started: int


def context(request: Request) -> Context:
    """A FastAPI dependency: the context of the running node."""
    found: Context = request.app.state.context
    return found
