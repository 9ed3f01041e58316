"""What the exporters read: the state of a node at one instant, immutable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from proxy.energy.attribution import DeviceBalance
from proxy.energy.carbon import Intensity


class MeterState(Protocol):
    """One meter as the sampler tells it; `disagreement` is a ratio, None where there is nothing to compare with."""

    @property
    def device(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def up(self) -> bool: ...
    @property
    def disagreement(self) -> float | None: ...


class StoreState(Protocol):
    """Whether receipts can be written, how many wait, and how many never will be."""

    @property
    def up(self) -> bool: ...
    @property
    def waiting(self) -> int: ...
    @property
    def dropped(self) -> int: ...


@dataclass(frozen=True, slots=True)
class OperationsSnapshot:
    """`backends` says by model and backend whether that can serve, `queues` by model how many requests wait.

    Step reports are counts since the start, by backend.
    """

    devices: Sequence[DeviceBalance]
    meters: Sequence[MeterState]
    backends: Mapping[tuple[str, str], bool]
    intensity: Intensity
    queues: Mapping[str, int] = field(default_factory=dict)
    step_reports: Mapping[str, int] = field(default_factory=dict)
    step_reports_lost: Mapping[str, int] = field(default_factory=dict)
    store: StoreState | None = None
