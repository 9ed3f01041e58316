"""From energy to grams of CO2e and to everyday equivalents: pure arithmetic over stated sources."""

import msgspec

from proxy.energy.quantities import JOULES_PER_KILOWATT_HOUR, Grams, GramsPerKilowattHour, Joules

#: US EPA, as the paper uses them since 2024 (Power Hungry Processing, doi 10.1145/3630106.3658542).
SMARTPHONE_CHARGE_KWH = 0.022
CAR_GRAMS_PER_METRE = 388.8 / 1609.344
#: Google's own figure of 2009 for one web search.
WEB_SEARCH_2009_KWH = 0.0003


class Intensity(msgspec.Struct, frozen=True, gc=False):
    """The carbon intensity of a grid: `zone` (ISO code or WORLD), where the figure is from and what time it is for.

    `age_seconds` is known for live sources only.
    """

    grams_per_kwh: GramsPerKilowattHour
    zone: str
    source: str
    as_of: str
    age_seconds: float | None = None


class Equivalents(msgspec.Struct, frozen=True, gc=False):
    """`web_searches_2009` is by Google's figure of that year; `car_metres` by the EPA's average passenger car."""

    smartphone_charges: float
    car_metres: float
    web_searches_2009: float


def kilowatt_hours(energy: Joules) -> float:
    return energy / JOULES_PER_KILOWATT_HOUR


def operational_grams(energy: Joules, intensity: Intensity) -> Grams:
    return Grams(kilowatt_hours(energy) * intensity.grams_per_kwh)


def equivalents(energy: Joules, grams: Grams) -> Equivalents:
    kwh = kilowatt_hours(energy)
    return Equivalents(
        smartphone_charges=kwh / SMARTPHONE_CHARGE_KWH,
        car_metres=grams / CAR_GRAMS_PER_METRE,
        web_searches_2009=kwh / WEB_SEARCH_2009_KWH,
    )
