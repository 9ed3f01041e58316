"""A receipt as clients see it: the `energy` object of bodies and streams, and the headers of an answer.

Pure functions on the data path. Measured energies keep their microjoules; derived figures are rounded to six
significant digits, so that no float noise shows. Headers carry fixed-point decimals, never exponents.
"""

import math
from functools import lru_cache
from typing import Any

import msgspec

from proxy.energy.attribution import Method
from proxy.energy.carbon import Intensity, kilowatt_hours
from proxy.energy.quantities import Microjoules
from proxy.energy.receipt import Boundary, Figures, Receipt, Status

SIGNIFICANT_DIGITS = 6
_encoder = msgspec.json.Encoder()

#: What the object says of energy where there is none to say: the same keys, so that typed clients need no second shape.
_NO_FIGURES: dict[str, Any] = {
    "energy_joules": None,
    "energy_kwh": None,
    "low_joules": None,
    "high_joules": None,
    "meter_accuracy_ratio": None,
    "marginal_joules": None,
    "full_joules": None,
}


def receipt_object(receipt: Receipt) -> dict[str, Any]:
    """The `energy` object; without figures (no meter, or not known yet) every figure in it is None."""
    request, figures = receipt.request, receipt.figures
    method = figures.method if figures else None
    return {
        "object": "energy.receipt",
        "id": request.id,
        "client_request_id": request.client_request_id,
        "status": receipt.status,
        "outcome": receipt.outcome,
        "model": request.model,
        "task": request.task,
        **(_energies(figures) if figures else _NO_FIGURES),
        "boundary": receipt.boundary,
        "parts": _parts(figures),
        "method": method,
        "meter": figures.meter if figures else None,
        "meters": dict(figures.meters) if figures else {},
        "attribution_method": method,
        "attribution_ratio": _rounded(figures.attribution_ratio) if figures else None,
        "avg_power_watts": _per(figures, receipt.duration),
        "duration_seconds": round(receipt.duration, 6),
        "joules_per_output_token": _per(figures, receipt.tokens.completion),
        "carbon": _carbon(figures, receipt.intensity),
        "water_millilitres": None,
        "equivalents": _equivalents(figures),
    }


def encode_receipt(receipt: Receipt) -> bytes:
    """The `energy` object as JSON on one line: for bodies, for streams' `: energy {json}` and for the store."""
    return _encoder.encode(receipt_object(receipt))


def receipt_headers(receipt: Receipt) -> bytes:
    """The energy and carbon header lines of an answer whose receipt is known."""
    provenance = _provenance(receipt.request.id, receipt.status, receipt.boundary, receipt.intensity)
    figures = receipt.figures
    if figures is None:
        return provenance
    grams = fixed_point(figures.operational).encode()
    return (
        b"x-energy-joules: %b\r\nx-energy-interval-joules: %b-%b\r\nx-energy-method: %b\r\nx-energy-meter: %b\r\n"
        b"x-carbon-grams: %b\r\ncarbon-emissions-scope-2: %b\r\n%b"
    ) % (
        fixed_joules(figures.parts.total).encode(),
        fixed_joules(figures.low).encode(),
        fixed_joules(figures.high).encode(),
        figures.method.encode(),
        figures.meter.encode(),
        grams,
        grams,
        provenance,
    )


def stream_head_headers(
    receipt_id: str, *, method: Method | None, meter: str | None, boundary: Boundary, intensity: Intensity
) -> bytes:
    """The header lines of a stream's head, which leaves before the energy is known: no joules, interval or grams.

    `method` and `meter` are what is to be expected; without a meter the status is `unavailable`.
    """
    if meter is None:
        return _provenance(receipt_id, "unavailable", boundary, intensity)
    lines = _provenance(receipt_id, "pending", boundary, intensity)
    if method is not None:
        lines += b"x-energy-method: %b\r\n" % method.encode()
    return lines + b"x-energy-meter: %b\r\n" % meter.encode()


def fixed_joules(energy: Microjoules) -> str:
    """Joules with exactly six decimals, without a detour through floats."""
    whole, micro = divmod(abs(energy), 1_000_000)
    return f"{'-' if energy < 0 else ''}{whole}.{micro:06d}"


def fixed_point(value: float) -> str:
    """Six significant digits as a fixed-point decimal with at least one decimal: `0.000191956`, `56.0`."""
    if value == 0:
        return "0.0"
    decimals = max(1, SIGNIFICANT_DIGITS - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}".rstrip("0")
    return text + "0" if text.endswith(".") else text


def _provenance(receipt_id: str, status: Status, boundary: Boundary, intensity: Intensity) -> bytes:
    return (
        b"x-energy-boundary: %b\r\nx-energy-status: %b\r\nx-carbon-intensity: %b\r\n"
        b'link: </v1/energy/receipts/%b>; rel="energy-receipt"\r\n'
    ) % (boundary.encode(), status.encode(), _intensity_header(intensity), receipt_id.encode())


@lru_cache(maxsize=64)
def _intensity_header(intensity: Intensity) -> bytes:
    age = "" if intensity.age_seconds is None else f";age={intensity.age_seconds:.0f}"
    grams = fixed_point(intensity.grams_per_kwh)
    return f"{grams};zone={intensity.zone};source={intensity.source};as_of={intensity.as_of}{age}".encode(
        "ascii", "replace"
    )


def _energies(figures: Figures) -> dict[str, Any]:
    return {
        "energy_joules": figures.energy,
        "energy_kwh": _rounded(kilowatt_hours(figures.energy)),
        "low_joules": figures.low / 1_000_000,
        "high_joules": figures.high / 1_000_000,
        "meter_accuracy_ratio": _rounded(figures.accuracy_ratio),
        "marginal_joules": figures.marginal / 1_000_000,
        "full_joules": None if figures.full is None else figures.full / 1_000_000,
    }


def _parts(figures: Figures | None) -> dict[str, float | None]:
    if figures is None:
        return {"gpu": None, "host": None, "overhead": None, "wasted": None}
    parts = figures.parts
    return {
        "gpu": parts.gpu / 1_000_000,
        "host": parts.host / 1_000_000,
        "overhead": parts.overhead / 1_000_000,
        "wasted": parts.wasted / 1_000_000,
    }


def _carbon(figures: Figures | None, intensity: Intensity) -> dict[str, Any]:
    grams = _rounded(figures.operational) if figures else None
    return {
        "grams_co2e": grams,
        "operational_grams": grams,
        "embodied_grams": None,
        "intensity_grams_per_kwh": intensity.grams_per_kwh,
        "zone": intensity.zone,
        "source": intensity.source,
        "as_of": intensity.as_of,
        "age_seconds": intensity.age_seconds,
    }


def _equivalents(figures: Figures | None) -> dict[str, float | None]:
    if figures is None:
        return {"smartphone_charges": None, "car_metres": None, "web_searches_2009": None}
    same = figures.equivalents
    return {
        "smartphone_charges": _rounded(same.smartphone_charges),
        "car_metres": _rounded(same.car_metres),
        "web_searches_2009": _rounded(same.web_searches_2009),
    }


def _per(figures: Figures | None, divisor: float | None) -> float | None:
    return _rounded(figures.energy / divisor) if figures and divisor else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{SIGNIFICANT_DIGITS}g}")
