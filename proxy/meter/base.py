"""The seam to the hardware: one small protocol, whatever measures."""

from collections.abc import Collection
from typing import NamedTuple, Protocol, runtime_checkable

from proxy.energy.quantities import Microjoules, Watts
from proxy.errors import JoulegateError


class MeterError(JoulegateError):
    """A reading failed, or a meter is not to be had. `why` and `cure` are sentences' parts; `str()` joins them.

    Never replaced by a 0.
    """

    def __init__(self, why: str, cure: str = "") -> None:
        super().__init__(f"{why}; cure: {cure}" if cure else why)
        self.why = why
        self.cure = cure


class MeterProblem(NamedTuple):
    """A meter that this machine could have and has not: `meter` is a kind (`rapl`) or a device (`gpu:1`)."""

    meter: str
    why: str
    cure: str


#: Where a meter that adds up begins to count, in microjoules, so that there is something to drop from.
FIRST_ORIGIN = Microjoules(1_000_000)


def next_origin(origin: Microjoules) -> Microjoules:
    """Where to count on from when nobody knows what was used meanwhile: below all readings so far, hence a new epoch.

    `origin` is where the count last began. (After a million epochs it begins at the top again.)
    """
    return Microjoules(origin - 1) if origin > 0 else FIRST_ORIGIN


class Reading(NamedTuple):
    """A device's cumulative energy since some arbitrary point, and its power now where the hardware says it."""

    energy: Microjoules
    power: Watts | None


class Meter(Protocol):
    """A device's energy meter.

    `device` is our name of the device (`gpu:0`, `host`), `name` the hardware's own; `kind` is one of `nvml-counter`,
    `nvml-power`, `rapl`, `codecarbon`, `replay`; `estimated` is True if and only if it computes instead of measuring;
    `accuracy_ratio` is the meter's own error as a fraction (0.05 is 5 %), None where unknown.
    """

    @property
    def device(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def estimated(self) -> bool: ...
    @property
    def accuracy_ratio(self) -> float | None: ...

    def read(self) -> Reading:
        """Read now; raises MeterError."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class SharedMeter(Protocol):
    """A meter that can also say who uses its device."""

    def foreign_share(self, ours: Collection[int]) -> float | None:
        """The share (0..1) of the device's use since the previous call by processes not in `ours` (process ids).

        None where the hardware or its driver cannot tell; raises MeterError where asking failed.
        """
        ...


@runtime_checkable
class ComparedMeter(Protocol):
    """A meter that checks itself against a second source of the same device."""

    @property
    def disagreement(self) -> float | None:
        """|second source - meter| / meter over the last while (0.05 is 5 %); None until both were seen long enough."""
        ...
