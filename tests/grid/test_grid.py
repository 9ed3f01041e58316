"""The grid's carbon intensity, from the data that CodeCarbon ships."""

import subprocess
import sys

import pytest

from proxy.energy.carbon import Intensity
from proxy.energy.quantities import GramsPerKilowattHour
from proxy.grid import codecarbon_intensity, intensity_source


def intensity(grams: float, zone: str, as_of: str, source: str = "codecarbon") -> Intensity:
    return Intensity(GramsPerKilowattHour(grams), zone=zone, source=source, as_of=as_of)


def test_nothing_configured_is_the_world_average() -> None:
    assert codecarbon_intensity() == intensity(475.0, "WORLD", "2018")


@pytest.mark.parametrize("code", ["FRA", "FR", "fra", " fr "])
def test_a_country_by_either_iso_code(code: str) -> None:
    assert codecarbon_intensity(code) == intensity(56.0, "FRA", "2023")


@pytest.mark.parametrize(
    ("country", "region", "zone", "as_of"),
    [
        ("USA", "California", "US-CA", "2023"),
        ("US", "CA", "US-CA", "2023"),
        (None, "US-CA", "US-CA", "2023"),
        ("USA", "new  york", "US-NY", "2023"),
        ("CAN", "Québec", "CA-QC", "2023"),
        (None, "CA-QC", "CA-QC", "2023"),
        ("CHN", "Inner Mongolia", "CN-NM", "2023"),
        (None, "CN-BJ", "CN-BJ", "2023"),
        ("SWE", "se3", "SE3", "2025"),
        (None, "NO4", "NO4", "2025"),
        (None, "europe-west9", "gcp:europe-west9", "undated"),
        ("FRA", "europe-west9", "gcp:europe-west9", "undated"),
    ],
)
def test_regions_by_name_and_code(country: str | None, region: str, zone: str, as_of: str) -> None:
    found = codecarbon_intensity(country, region)
    assert (found.zone, found.as_of, found.source) == (zone, as_of, "codecarbon")
    assert 5 < found.grams_per_kwh < 1100


def test_pounds_per_megawatt_hour_become_grams_per_kilowatt_hour() -> None:
    # eGRID 2023: California 394.769 lb/MWh.
    assert codecarbon_intensity("USA", "california").grams_per_kwh == 179.1


def test_a_province_of_hydropower_is_low_but_not_free() -> None:
    assert 20 < codecarbon_intensity("CAN", "Quebec").grams_per_kwh < 40
    assert codecarbon_intensity("CAN", "Alberta").grams_per_kwh > 400


@pytest.mark.parametrize("country", ["XYZ", "France", "", "F", "12"])
def test_an_unknown_country_is_told_what_it_should_be(country: str) -> None:
    with pytest.raises(ValueError, match=r"^country: should be an ISO 3166-1 code such as FRA"):
        codecarbon_intensity(country)


def test_a_country_without_data_is_an_error_not_the_world_average() -> None:
    with pytest.raises(ValueError, match=r"no figure for AND; set source: static"):
        codecarbon_intensity("AND")


@pytest.mark.parametrize(
    ("country", "region"),
    [
        ("USA", "Bavaria"),
        ("FRA", "SE3"),
        ("DEU", "europe-west9"),
        (None, "atlantis"),
        ("USA", "usa"),
        ("USA", "_unit"),
        ("", "a"),
    ],
)
def test_an_unknown_region_is_told_what_it_should_be(country: str | None, region: str) -> None:
    with pytest.raises(ValueError, match=r"should be"):
        codecarbon_intensity(country, region)


def test_a_static_figure_says_that_it_is_one() -> None:
    assert intensity_source("static", grams_per_kwh=12.5).current() == intensity(
        12.5, "CUSTOM", "configured", source="static"
    )
    assert intensity_source("static", grams_per_kwh=0.0, country="is").current().zone == "ISL"


@pytest.mark.parametrize("grams", [None, -1.0, float("nan"), float("inf")])
def test_a_static_source_needs_a_figure(grams: float | None) -> None:
    with pytest.raises(ValueError, match="grams_per_kwh"):
        intensity_source("static", grams_per_kwh=grams)


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="source: should be static or codecarbon"):
        intensity_source("oracle")


def test_the_source_serves_one_figure() -> None:
    assert intensity_source("codecarbon", country="NOR").current().zone == "NOR"


def test_codecarbon_itself_is_not_imported() -> None:
    code = (
        "import sys; from proxy.grid import codecarbon_intensity as c; c('FRA'); sys.exit('codecarbon' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
