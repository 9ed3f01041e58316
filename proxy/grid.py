"""The carbon intensity of the grid: where the figure comes from, and what it is for.

Figures by country, region and cloud region are those that ship inside CodeCarbon: its data files are read once, at
start; no tracker runs, nothing goes over the network and nobody's address is looked up. A source that changes with
time implements `IntensitySource` too: it refreshes itself in the background and `current()` gives the newest figure
with its age.
"""

import csv
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import pycountry

from proxy.energy.carbon import Intensity
from proxy.energy.quantities import GramsPerKilowattHour

WORLD = "WORLD"
#: The zone of a static figure that was configured without a country.
CUSTOM = "CUSTOM"

#: CodeCarbon takes its world average from the IEA's report of 2019, whose figures are those of 2018.
_WORLD_AS_OF = "2018"
#: The cloud providers' table says no year.
_UNDATED = "undated"
_GRAMS_PER_KWH_OF_POUND_PER_MWH = 0.45359237
#: Source names of CodeCarbon's mix of Canadian provinces, by the names of its table of sources.
_SOURCES = {
    "coal": "coal",
    "petroleum": "petroleum",
    "naturalGas": "natural_gas",
    "nuclear": "nuclear",
    "hydro": "hydroelectricity",
    "tidal": "hydroelectricity",
    "wind": "wind",
    "solar": "solar",
    "biomass": "biomass",
}


class IntensitySource(Protocol):
    """Where the grid's carbon intensity comes from. `current` is called per receipt: it must not block."""

    def current(self) -> Intensity: ...


@dataclass(frozen=True, slots=True)
class FixedIntensity:
    """One figure for good: a static one, or a yearly mean."""

    intensity: Intensity

    def current(self) -> Intensity:
        return self.intensity


def intensity_source(
    source: str, *, country: str | None = None, region: str | None = None, grams_per_kwh: float | None = None
) -> IntensitySource:
    """The configured source: `static` or `codecarbon`. ValueError says in one line what a field should be."""
    if source == "static":
        return FixedIntensity(_static(grams_per_kwh, country))
    if source == "codecarbon":
        return FixedIntensity(codecarbon_intensity(country, region))
    raise ValueError(f"source: should be static or codecarbon, not {source!r}")


def codecarbon_intensity(country: str | None = None, region: str | None = None) -> Intensity:
    """CodeCarbon's figure (g CO2e/kWh) for a region, a country or, with neither, the world.

    `country` is an ISO 3166 code (FRA or FR). `region` is a US state, a Canadian or Chinese province (its name or ISO
    3166-2 code), a Nordic bidding zone (SE3) or a Google Cloud region (europe-west9). ValueError if there is no figure.
    """
    alpha_3 = None if country is None else _alpha_3(country)
    if region is not None:
        return _regional(region, alpha_3)
    return _world() if alpha_3 is None else _national(alpha_3)


def _static(grams_per_kwh: float | None, country: str | None) -> Intensity:
    if grams_per_kwh is None or not 0 <= grams_per_kwh < float("inf"):
        raise ValueError("grams_per_kwh: source static needs grams of CO2e per kWh, such as 56.0")
    zone = CUSTOM if country is None else _alpha_3(country)
    return Intensity(GramsPerKilowattHour(grams_per_kwh), zone=zone, source="static", as_of="configured")


def _alpha_3(country: str) -> str:
    code = country.strip().upper()
    countries = pycountry.countries
    known = countries.get(alpha_2=code) if len(code) == 2 else countries.get(alpha_3=code)
    if known is None:
        raise ValueError(f"country: should be an ISO 3166-1 code such as FRA (or FR), not {country!r}")
    return str(known.alpha_3)


def _world() -> Intensity:
    return _figure(_data("carbon_intensity_per_source.json")["world_average"], WORLD, _WORLD_AS_OF)


def _national(alpha_3: str) -> Intensity:
    mix = _data("global_energy_mix.json").get(alpha_3)
    if mix is None or mix.get("carbon_intensity") is None:
        raise ValueError(
            f"country: CodeCarbon has no figure for {alpha_3}; set source: static and your grid's grams_per_kwh"
        )
    return _figure(mix["carbon_intensity"], alpha_3, mix["year"])


def _regional(region: str, alpha_3: str | None) -> Intensity:
    for lookup in (_google_cloud, _nordic, _subdivision):
        found = lookup(region, alpha_3)
        if found is not None:
            return found
    raise ValueError(
        f"region: no figure for {region!r}{f' in {alpha_3}' if alpha_3 else ''}; should be a US state, a Canadian or"
        " Chinese province (such as US-CA), a Nordic bidding zone (such as SE3) or a Google Cloud region (such as"
        " europe-west9); without region the country's figure serves"
    )


def _google_cloud(region: str, alpha_3: str | None) -> Intensity | None:
    with (_package() / "data/cloud/impact.csv").open(encoding="utf-8-sig", newline="") as table:
        for row in csv.DictReader(table):
            if row["region"] == region.strip().lower() and alpha_3 in {None, row["countryIsoCode"]}:
                return _figure(float(row["impact"]), f"{row['provider']}:{row['region']}", _UNDATED)
    return None


def _nordic(region: str, alpha_3: str | None) -> Intensity | None:
    zone = region.strip().upper()
    row = _data("nordic_emissions.json")["data"].get(zone)
    if row is None or (alpha_3 is not None and _alpha_3(zone[:2]) != alpha_3):
        return None
    return _figure(row["emission_factor"], zone, row["year"])


def _subdivision(region: str, alpha_3: str | None) -> Intensity | None:
    code = region.strip().upper()
    if alpha_3 is None:
        # An ISO 3166-2 code names its country itself.
        known = pycountry.countries.get(alpha_2=code.partition("-")[0]) if "-" in code else None
        alpha_3 = known.alpha_3 if known else None
    lookups = {"USA": _us_state, "CAN": _canadian_province, "CHN": _chinese_province}
    lookup = lookups.get(alpha_3 or "")
    return lookup(region) if lookup else None


def _us_state(region: str) -> Intensity | None:
    table = _data("2023/usa_emissions.json")
    code = region.strip().upper().removeprefix("US-")
    for name, row in table.items():
        state = row.get("regionCode")
        if state and name not in {"_unit", "usa"} and (state == code or name == _plain(region)):
            pounds = GramsPerKilowattHour(row["emissions"] * _GRAMS_PER_KWH_OF_POUND_PER_MWH)
            return _figure(pounds, f"US-{state}", table["_source"]["year"])
    return None


def _canadian_province(region: str) -> Intensity | None:
    """Life-cycle factors of all its sources, like the countries' figures (CodeCarbon itself counts combustion only)."""
    province = _iso_subdivision("CA", region)
    mix = _data("2023/canada_energy_mix.json").get(_plain(province.name)) if province else None
    if province is None or mix is None:
        return None
    factors = _data("carbon_intensity_per_source.json")
    known = {source: mix[source] for source in _SOURCES if source in mix}
    grams = sum(part * factors[_SOURCES[source]] for source, part in known.items()) / sum(known.values())
    return _figure(grams, province.code, "2023")


def _chinese_province(region: str) -> Intensity | None:
    for code, row in _data("2023/china_provincial_emissions.json")["data"].items():
        if region.strip().upper() in {code, code.removeprefix("CN-")} or _plain(region) in row["names"]:
            return _figure(row["emission_factor"], code, row["year"])
    return None


def _iso_subdivision(alpha_2: str, region: str) -> Any:
    code = region.strip().upper().removeprefix(f"{alpha_2}-")
    for subdivision in pycountry.subdivisions:
        if subdivision.country_code != alpha_2:
            continue
        if subdivision.code == f"{alpha_2}-{code}" or _plain(subdivision.name) == _plain(region):
            return subdivision
    return None


def _figure(grams_per_kwh: float, zone: str, as_of: str | int) -> Intensity:
    """One decimal, here and not in the presentation: grams can then be checked against the intensity beside them."""
    return Intensity(
        GramsPerKilowattHour(round(float(grams_per_kwh), 1)), zone=zone, source="codecarbon", as_of=str(as_of)
    )


def _plain(name: str) -> str:
    """Lower case, single spaces, no accents: `Québec` is `quebec`."""
    letters = unicodedata.normalize("NFKD", " ".join(name.lower().split()))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _data(name: str) -> Mapping[str, Any]:
    with (_package() / "data/private_infra" / name).open(encoding="utf-8") as file:
        data: Mapping[str, Any] = json.load(file)
    return data


def _package() -> Path:
    """Where CodeCarbon's files lie; it is not imported, which would take its trackers with it."""
    spec = find_spec("codecarbon")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("source: codecarbon is not installed (pip install codecarbon), or set source: static")
    return Path(spec.submodule_search_locations[0])
