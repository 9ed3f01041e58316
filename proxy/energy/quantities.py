"""Units as types, converted once, at the boundary.

Energies that are divided are integer microjoules, so that shares add up exactly; times are integer nanoseconds of the
host's monotonic clock, which all processes of one host share.
"""

import math
from typing import NewType

Nanoseconds = NewType("Nanoseconds", int)
Microjoules = NewType("Microjoules", int)
Watts = NewType("Watts", float)
Seconds = NewType("Seconds", float)
Joules = NewType("Joules", float)
Grams = NewType("Grams", float)
GramsPerKilowattHour = NewType("GramsPerKilowattHour", float)

JOULES_PER_KILOWATT_HOUR = 3_600_000.0


def microjoules(joules: float) -> Microjoules:
    """Round joules to integer microjoules; raises ValueError for what is not a finite number, in these or in those."""
    return Microjoules(_scaled("energy", joules, 1_000_000))


def joules(energy: Microjoules) -> Joules:
    return Joules(energy / 1_000_000)


def nanoseconds(seconds: float) -> Nanoseconds:
    """Round seconds to integer nanoseconds; raises ValueError for what is not a finite number, in these or in those."""
    return Nanoseconds(_scaled("time", seconds, 1_000_000_000))


def seconds(time: Nanoseconds) -> Seconds:
    return Seconds(time / 1_000_000_000)


def _scaled(what: str, value: float, factor: int) -> int:
    try:
        scaled = float(value) * factor
    except OverflowError as error:  # an integer beyond all floats
        raise ValueError(f"{what} is out of range") from error
    if not math.isfinite(scaled):
        raise ValueError(
            f"{what} is out of range: {value}" if math.isfinite(value) else f"{what} is not a finite number: {value}"
        )
    return round(scaled)
