"""What the ledger says of a request and of a device: immutable facts, in microjoules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from proxy.energy.events import Outcome
from proxy.energy.quantities import Microjoules, Nanoseconds, Watts

Method = Literal["measured-steps", "measured-tokens", "measured-window", "estimated"]

#: Best first; several contributing devices or backends give the worst of theirs.
METHODS: tuple[Method, ...] = ("measured-steps", "measured-tokens", "measured-window", "estimated")


class DeviceShare(msgspec.Struct, frozen=True, gc=False):
    """A request's energy on one device.

    `active` is its share of the device while it was served, within `low`..`high`; `marginal` leaves out its equal part
    of the idle power; `full` adds its part of the last hour's idle (None below 60 s of busy time). `meanwhile` is all
    that the device used between the request's start and end.
    """

    active: Microjoules
    low: Microjoules
    high: Microjoules
    marginal: Microjoules
    full: Microjoules | None
    meanwhile: Microjoules


class Attribution(msgspec.Struct, frozen=True, gc=False):
    """One request's (or attempt's) energy by device. `settled` figures never change again.

    On `unmeasured` devices it worked, or may have worked, while no meter was read: what it used there nobody knows.
    """

    request: str
    backend: str
    outcome: Outcome
    settled: bool
    method: Method
    started: Nanoseconds
    ended: Nanoseconds
    devices: Mapping[str, DeviceShare]
    unmeasured: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceBalance:
    """A device's books. `requests + idle + foreign + unattributed + pending == counter`, exactly: `residual` is 0.

    `counter` is the sum of the counter's rises since the start; `fit_error_ratio` is by backend.
    """

    device: str
    name: str
    meter: str
    estimated: bool
    accuracy_ratio: float | None
    counter: Microjoules
    requests: Microjoules
    idle: Microjoules
    foreign: Microjoules
    unattributed: Microjoules
    pending: Microjoules
    power: Watts | None
    idle_power: Watts | None
    last_sample_at: Nanoseconds | None
    fit_error_ratio: Mapping[str, float]

    @property
    def residual(self) -> Microjoules:
        accounts = self.requests + self.idle + self.foreign + self.unattributed + self.pending
        return Microjoules(self.counter - accounts)
