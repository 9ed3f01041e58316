"""The events the ledger lives on, and nothing else: all it knows came in as one of these.

They are the in-memory form of the trace format; `proxy/trace.py` reads and writes that form. Structs, since thousands
are made in a second: they cost a tenth of frozen dataclasses, and the garbage collector, which they need not, nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from proxy.energy.quantities import Microjoules, Nanoseconds, Watts

Outcome = Literal["completed", "cancelled", "failed", "unfinished"]
Source = Literal["engine", "relay"]

#: A participant with this id is not a request the proxy gave: its share goes to `unattributed`.
UNKNOWN_REQUEST = ""


class Device(msgspec.Struct, frozen=True, gc=False):
    """A device with an energy meter. `estimated` marks a meter that computes instead of measuring."""

    device: str
    name: str
    meter: str
    estimated: bool = False
    accuracy_ratio: float | None = None


class Sample(msgspec.Struct, frozen=True, gc=False):
    """One reading of a device's cumulative energy, and of its power where there is one."""

    device: str
    at: Nanoseconds
    energy: Microjoules
    power: Watts | None = None


class Step(msgspec.Struct, frozen=True, gc=False):
    """One unit of batched execution: who worked (column-wise, one entry per participant), how much, where and when.

    `requests[i]` computed `tokens[i]` and held a context of `contexts[i]` at the step's end. A request may stand in
    several entries. `source` is `relay` for virtual steps that the proxy inferred from what it forwarded.
    """

    backend: str
    devices: tuple[str, ...]
    started: Nanoseconds
    ended: Nanoseconds
    requests: Sequence[str]
    tokens: Sequence[int]
    contexts: Sequence[int]
    source: Source = "engine"


class Start(msgspec.Struct, frozen=True, gc=False):
    """A request (or one attempt of it) was sent to a backend."""

    request: str
    at: Nanoseconds
    backend: str


class Finish(msgspec.Struct, frozen=True, gc=False):
    request: str
    at: Nanoseconds
    outcome: Outcome


class Processes(msgspec.Struct, frozen=True, gc=False):
    """Who else used the device since the previous such event: `foreign_share` of its use was not ours (0..1).

    `backend_shares` (optional, the host's) gives each of our backends' part of the whole use, from its CPU time.
    """

    device: str
    at: Nanoseconds
    foreign_share: float
    backend_shares: Mapping[str, float] = msgspec.field(default_factory=dict)


class Model(msgspec.Struct, frozen=True, gc=False):
    """Coefficients of a backend's cost model on a device: a prior, or what an earlier run had learnt."""

    backend: str
    device: str
    coefficients: Mapping[str, float]


class Loss(msgspec.Struct, frozen=True, gc=False):
    """So many step reports of a backend were lost since the previous such event."""

    backend: str
    reports: int


class BackendState(msgspec.Struct, frozen=True, gc=False):
    """A backend begins (`loading=True`) or ends loading or warming up: energy meanwhile is not idle."""

    backend: str
    devices: tuple[str, ...]
    at: Nanoseconds
    loading: bool


Event = Device | Sample | Step | Start | Finish | Processes | Model | Loss | BackendState
