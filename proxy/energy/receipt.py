"""The receipt of a request: the shares of all its attempts, drawn together within the configured boundary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from proxy.energy.attribution import METHODS, Attribution, DeviceShare, Method
from proxy.energy.carbon import Equivalents, Intensity, equivalents, operational_grams
from proxy.energy.events import Device, Outcome
from proxy.energy.quantities import Grams, Joules, Microjoules, Seconds, joules, seconds

Boundary = Literal["gpu", "node", "facility"]
Status = Literal["provisional", "settled", "pending", "unavailable"]
HOST = "host"


@dataclass(frozen=True, slots=True)
class Request:
    """What the proxy knows of a request besides its energy. `created` is Unix time; `key` names the caller's key."""

    id: str
    model: str
    task: str
    endpoint: str
    created: float
    client_request_id: str | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """As the backend's own usage says; None where it does not."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None


@dataclass(frozen=True, slots=True)
class Accounting:
    """How figures are drawn: the boundary, its PUE, the grid's intensity and the devices there are."""

    boundary: Boundary
    pue: float
    intensity: Intensity
    devices: Mapping[str, Device]

    def within(self, device: str) -> bool:
        return device != HOST or self.boundary != "gpu"

    @property
    def factor(self) -> float:
        return self.pue if self.boundary == "facility" else 1.0


@dataclass(frozen=True, slots=True)
class Parts:
    """Microjoules; they sum to the receipt's energy exactly."""

    gpu: Microjoules
    host: Microjoules
    overhead: Microjoules
    wasted: Microjoules

    @property
    def total(self) -> Microjoules:
        return Microjoules(self.gpu + self.host + self.overhead + self.wasted)


@dataclass(frozen=True, slots=True)
class Figures:
    """A receipt's energy within the boundary: all of it measured (or estimated, as `method` says)."""

    parts: Parts
    low: Microjoules
    high: Microjoules
    marginal: Microjoules
    full: Microjoules | None
    accuracy_ratio: float | None
    method: Method
    meters: Mapping[str, str]
    attribution_ratio: float | None
    operational: Grams
    equivalents: Equivalents

    @property
    def energy(self) -> Joules:
        return joules(self.parts.total)

    @property
    def meter(self) -> str:
        return "+".join(dict.fromkeys(self.meters.values()))


@dataclass(frozen=True, slots=True)
class Receipt:
    """The energy, carbon and provenance of one request; `figures` is None where there is no meter for it."""

    request: Request
    status: Status
    outcome: Outcome
    duration: Seconds
    tokens: Tokens
    boundary: Boundary
    intensity: Intensity
    figures: Figures | None = field(default=None)


def receipt(request: Request, attempts: Sequence[Attribution], tokens: Tokens, accounting: Accounting) -> Receipt:
    """Join a request's attempts (in order, the last is the one that answered; at least one) into its receipt."""
    last = attempts[-1]
    figures = _figures(attempts, accounting)
    settled = all(attempt.settled for attempt in attempts)
    status: Status = "unavailable" if figures is None else "settled" if settled else "provisional"
    return Receipt(
        request=request,
        status=status,
        outcome=last.outcome,
        duration=Seconds(max(0.0, seconds(last.ended) - seconds(attempts[0].started))),
        tokens=tokens,
        boundary=accounting.boundary,
        intensity=accounting.intensity,
        figures=figures,
    )


def _figures(attempts: Sequence[Attribution], accounting: Accounting) -> Figures | None:
    shares = _shares(attempts, accounting)
    if not shares:
        return None
    parts = _parts(attempts, accounting)
    energy = joules(parts.total)
    operational = operational_grams(energy, accounting.intensity)
    factor = accounting.factor
    meters = {name: accounting.devices[name].meter for name, _ in shares}
    return Figures(
        parts=parts,
        low=_scaled(sum(share.low for _, share in shares), factor),
        high=_scaled(sum(share.high for _, share in shares), factor),
        marginal=_scaled(sum(share.marginal for _, share in shares), factor),
        full=_full([share for _, share in shares], factor),
        accuracy_ratio=_accuracy(shares, accounting),
        method=_method(attempts, meters, accounting),
        meters=dict(sorted(meters.items(), key=lambda item: (item[0] == HOST, item[0]))),
        attribution_ratio=_attribution_ratio(
            [share for name, share in shares if name != HOST] or [s for _, s in shares]
        ),
        operational=operational,
        equivalents=equivalents(energy, operational),
    )


def _shares(attempts: Sequence[Attribution], accounting: Accounting) -> list[tuple[str, DeviceShare]]:
    return [(name, share) for attempt in attempts for name, share in attempt.devices.items() if accounting.within(name)]


def _parts(attempts: Sequence[Attribution], accounting: Accounting) -> Parts:
    served = _shares(attempts[-1:], accounting)
    gpu = sum(share.active for name, share in served if name != HOST)
    host = sum(share.active for name, share in served if name == HOST)
    wasted = sum(share.active for _, share in _shares(attempts[:-1], accounting))
    overhead = round((accounting.factor - 1.0) * (gpu + host + wasted))
    return Parts(Microjoules(gpu), Microjoules(host), Microjoules(overhead), Microjoules(wasted))


def _scaled(energy: int, factor: float) -> Microjoules:
    return Microjoules(energy if factor == 1.0 else round(energy * factor))


def _full(shares: Sequence[DeviceShare], factor: float) -> Microjoules | None:
    total = 0
    for share in shares:
        if share.full is None:
            return None
        total += share.full
    return _scaled(total, factor)


def _accuracy(shares: Sequence[tuple[str, DeviceShare]], accounting: Accounting) -> float | None:
    """The meters' own errors, weighted by energy; None where one of them does not know its own."""
    weighted = 0.0
    total = 0
    for name, share in shares:
        ratio = accounting.devices[name].accuracy_ratio
        if ratio is None:
            return None
        weighted += ratio * share.active
        total += share.active
    return weighted / total if total else max(accounting.devices[name].accuracy_ratio or 0.0 for name, _ in shares)


def _method(attempts: Sequence[Attribution], meters: Mapping[str, str], accounting: Accounting) -> Method:
    """The worst of the attempts' methods; `estimated` if and only if every contributing meter is an estimate."""
    if all(accounting.devices[name].estimated for name in meters):
        return "estimated"
    split: list[Method] = [attempt.method for attempt in attempts if attempt.method != "estimated"]
    return max(split, key=METHODS.index, default="measured-window")


def _attribution_ratio(shares: Sequence[DeviceShare]) -> float | None:
    meanwhile = sum(share.meanwhile for share in shares)
    return sum(share.active for share in shares) / meanwhile if meanwhile > 0 else None
