"""The receipt of a request: the shares of all its attempts, drawn together within the configured boundary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from proxy.energy.attribution import METHODS, Attribution, DeviceShare, Method
from proxy.energy.carbon import Equivalents, Intensity, equivalents, operational_grams
from proxy.energy.events import Device, Outcome
from proxy.energy.quantities import Grams, Joules, Microjoules, Seconds, joules

Boundary = Literal["gpu", "node", "facility"]
Status = Literal["provisional", "settled", "pending", "unavailable"]
HOST = "host"


class Request(msgspec.Struct, frozen=True, gc=False):
    """What the proxy knows of a request besides its energy. `created` is Unix time; `key` names the caller's key."""

    id: str
    model: str
    task: str
    endpoint: str
    created: float
    client_request_id: str | None = None
    key: str | None = None


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """As the backend's own usage says; None where it does not."""

    prompt: int | None = None
    completion: int | None = None
    cached: int | None = None


class Provenance(msgspec.Struct, frozen=True, gc=False):
    """What is the same for all receipts of the same devices: their meters, in order, and how sure each is."""

    meters: Mapping[str, str]
    estimated: bool
    accuracy_ratios: Mapping[str, float] | None
    """None where one of the meters does not know its own."""


@dataclass(frozen=True, slots=True)
class Accounting:
    """How figures are drawn: the boundary, its PUE, the grid's intensity and the devices there are."""

    boundary: Boundary
    pue: float
    intensity: Intensity
    devices: Mapping[str, Device]
    _provenance: dict[tuple[str, ...], Provenance] = field(default_factory=dict, init=False, compare=False, repr=False)

    def within(self, device: str) -> bool:
        return device != HOST or self.boundary != "gpu"

    @property
    def factor(self) -> float:
        return self.pue if self.boundary == "facility" else 1.0

    def provenance(self, names: tuple[str, ...]) -> Provenance:
        """Of these devices together."""
        known = self._provenance.get(names)
        if known is None:
            known = self._provenance[names] = self._find_provenance(names)
        return known

    def _find_provenance(self, names: tuple[str, ...]) -> Provenance:
        devices = [self.devices[name] for name in sorted(names, key=lambda name: (name == HOST, name))]
        ratios = {each.device: each.accuracy_ratio for each in devices if each.accuracy_ratio is not None}
        return Provenance(
            meters={each.device: each.meter for each in devices},
            estimated=all(each.estimated for each in devices),
            accuracy_ratios=ratios if len(ratios) == len(devices) else None,
        )


class Parts(msgspec.Struct, frozen=True, gc=False):
    """Microjoules; they sum to the receipt's energy exactly."""

    gpu: Microjoules
    host: Microjoules
    overhead: Microjoules
    wasted: Microjoules

    @property
    def total(self) -> Microjoules:
        return Microjoules(self.gpu + self.host + self.overhead + self.wasted)


class Figures(msgspec.Struct, frozen=True, gc=False):
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

    @property
    def energy(self) -> Joules:
        return joules(self.parts.total)

    @property
    def equivalents(self) -> Equivalents:
        return equivalents(self.energy, self.operational)

    @property
    def meter(self) -> str:
        return "+".join(dict.fromkeys(self.meters.values()))


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """The energy, carbon and provenance of one request; `figures` is None where there is no meter for it."""

    request: Request
    status: Status
    outcome: Outcome
    duration: Seconds
    tokens: Tokens
    boundary: Boundary
    intensity: Intensity
    figures: Figures | None = None


def receipt(request: Request, attempts: Sequence[Attribution], tokens: Tokens, accounting: Accounting) -> Receipt:
    """Join a request's attempts (in order, the last is the one that answered; at least one) into its receipt."""
    last = attempts[-1]
    figures = _figures(attempts, accounting)
    settled = last.settled and (len(attempts) == 1 or all(attempt.settled for attempt in attempts))
    status: Status = "unavailable" if figures is None else "settled" if settled else "provisional"
    duration = Seconds(max(last.ended - attempts[0].started, 0) / 1e9)
    return Receipt(
        request, status, last.outcome, duration, tokens, accounting.boundary, accounting.intensity, figures
    )  # fmt: skip


def _figures(attempts: Sequence[Attribution], accounting: Accounting) -> Figures | None:
    """None where a device within the boundary was used and not measured: half a figure would be a false one."""
    shares = _shares(attempts, accounting)
    if not shares or _lacks_a_meter(attempts, accounting):
        return None
    low = high = marginal = full = 0
    is_full = True
    for _, share in shares:
        low, high, marginal = low + share.low, high + share.high, marginal + share.marginal
        if share.full is None:
            is_full = False
        else:
            full += share.full
    parts = _parts(shares, attempts, accounting)
    provenance, factor = accounting.provenance(tuple([name for name, _ in shares])), accounting.factor
    return Figures(
        parts,
        _scaled(low, factor),
        _scaled(high, factor),
        _scaled(marginal, factor),
        _scaled(full, factor) if is_full else None,
        _accuracy(shares, provenance.accuracy_ratios),
        _method(attempts, provenance),
        provenance.meters,
        _attribution_ratio(shares),
        operational_grams(joules(parts.total), accounting.intensity),
    )


def _lacks_a_meter(attempts: Sequence[Attribution], accounting: Accounting) -> bool:
    return any(any(map(accounting.within, attempt.unmeasured)) for attempt in attempts if attempt.unmeasured)


_Shares = Sequence[tuple[str, DeviceShare]]


def _shares(attempts: Sequence[Attribution], accounting: Accounting) -> _Shares:
    if accounting.boundary != "gpu" and len(attempts) == 1:
        return list(attempts[0].devices.items())
    return [(name, share) for attempt in attempts for name, share in attempt.devices.items() if accounting.within(name)]


def _parts(shares: _Shares, attempts: Sequence[Attribution], accounting: Accounting) -> Parts:
    """What attempts before the last one used is wasted."""
    gpu = host = wasted = 0
    for name, share in shares if len(attempts) == 1 else _shares(attempts[-1:], accounting):
        if name == HOST:
            host += share.active
        else:
            gpu += share.active
    if len(attempts) > 1:
        wasted = sum(share.active for _, share in shares) - gpu - host
    overhead = round((accounting.factor - 1.0) * (gpu + host + wasted)) if accounting.factor != 1.0 else 0
    return Parts(Microjoules(gpu), Microjoules(host), Microjoules(overhead), Microjoules(wasted))


def _scaled(energy: int, factor: float) -> Microjoules:
    return Microjoules(energy if factor == 1.0 else round(energy * factor))


def _accuracy(shares: _Shares, ratios: Mapping[str, float] | None) -> float | None:
    """The meters' own errors, weighted by energy; None where one of them does not know its own."""
    if ratios is None:
        return None
    weighted, total = 0.0, 0
    for name, share in shares:
        weighted += ratios[name] * share.active
        total += share.active
    return weighted / total if total else max(ratios.values())


def _method(attempts: Sequence[Attribution], provenance: Provenance) -> Method:
    """The worst of the attempts' methods; `estimated` if and only if every contributing meter is an estimate."""
    if provenance.estimated:
        return "estimated"
    if len(attempts) == 1 and attempts[0].method != "estimated":
        return attempts[0].method
    split: list[Method] = [attempt.method for attempt in attempts if attempt.method != "estimated"]
    return max(split, key=METHODS.index, default="measured-window")


def _attribution_ratio(shares: _Shares) -> float | None:
    """Of what the accelerators used meanwhile, the request's part; of the host's where there are no accelerators."""
    active = meanwhile = 0
    for _, share in [each for each in shares if each[0] != HOST] or shares:
        active += share.active
        meanwhile += share.meanwhile
    return active / meanwhile if meanwhile > 0 else None
