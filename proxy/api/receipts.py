"""A receipt as clients see it: the `energy` object of bodies and streams, and the headers of an answer.

Pure functions on the data path. Measured energies keep their microjoules; derived figures are rounded to six
significant digits, so that no float noise shows. Headers carry fixed-point decimals, never exponents.
"""

import math
from functools import lru_cache

import msgspec

from proxy.energy.attribution import Method
from proxy.energy.carbon import Intensity, kilowatt_hours
from proxy.energy.quantities import Microjoules
from proxy.energy.receipt import Boundary, Figures, Receipt, Status

SIGNIFICANT_DIGITS = 6
_EXACT = 10**15
_quoted = msgspec.json.Encoder().encode

_NO_EQUIVALENTS = '"smartphone_charges":null,"car_metres":null,"web_searches_2009":null'


def encode_receipt(receipt: Receipt) -> bytes:
    """The `energy` object as JSON on one line: for bodies, for streams' `: energy {json}` and for the store.

    Without figures there is null for each, so that typed clients need no second shape. Written by hand, since every
    answer carries it: a dict to be encoded would take four times as long.
    """
    request, figures = receipt.request, receipt.figures
    client_id = "null" if request.client_request_id is None else _quoted(request.client_request_id).decode()
    grams = "null" if figures is None else f"{figures.operational:.6g}"
    return (
        f'{{"object":"energy.receipt","id":"{request.id}","client_request_id":{client_id},'
        f'"status":"{receipt.status}","outcome":"{receipt.outcome}","model":{_name(request.model)},'
        f'"task":"{request.task}",{_no_figures(receipt) if figures is None else _figures(figures, receipt)},'
        f'"duration_seconds":{receipt.duration:.6f},'
        f'"joules_per_output_token":{_per(figures, receipt.tokens.completion)},'
        f'"carbon":{{"grams_co2e":{grams},"operational_grams":{grams},"embodied_grams":null,{_grid(receipt.intensity)}}},'
        f'"water_millilitres":null,"equivalents":{{{_equivalents(figures)}}}}}'
    ).encode()


def _figures(figures: Figures, receipt: Receipt) -> str:
    parts, method, energy = figures.parts, figures.method, figures.energy
    full = "null" if figures.full is None else fixed_joules(figures.full)
    return (
        f'"energy_joules":{fixed_joules(parts.total)},"energy_kwh":{kilowatt_hours(energy):.6g},'
        f'"low_joules":{fixed_joules(figures.low)},"high_joules":{fixed_joules(figures.high)},'
        f'"meter_accuracy_ratio":{_ratio(figures.accuracy_ratio)},"marginal_joules":{fixed_joules(figures.marginal)},'
        f'"full_joules":{full},"boundary":"{receipt.boundary}","parts":{{"gpu":{fixed_joules(parts.gpu)},'
        f'"host":{fixed_joules(parts.host)},"overhead":{fixed_joules(parts.overhead)},'
        f'"wasted":{fixed_joules(parts.wasted)}}},"method":"{method}","meter":"{figures.meter}",'
        f'"meters":{_quoted(figures.meters).decode()},"attribution_method":"{method}",'
        f'"attribution_ratio":{_ratio(figures.attribution_ratio)},"avg_power_watts":{_per(figures, receipt.duration)}'
    )


def _no_figures(receipt: Receipt) -> str:
    return (
        '"energy_joules":null,"energy_kwh":null,"low_joules":null,"high_joules":null,"meter_accuracy_ratio":null,'
        f'"marginal_joules":null,"full_joules":null,"boundary":"{receipt.boundary}",'
        '"parts":{"gpu":null,"host":null,"overhead":null,"wasted":null},"method":null,"meter":null,"meters":{},'
        '"attribution_method":null,"attribution_ratio":null,"avg_power_watts":null'
    )


def _ratio(value: float | None) -> str:
    return "null" if value is None else f"{value:.6g}"


def _per(figures: Figures | None, divisor: float | None) -> str:
    return f"{figures.energy / divisor:.6g}" if figures and divisor else "null"


def _equivalents(figures: Figures | None) -> str:
    if figures is None:
        return _NO_EQUIVALENTS
    same = figures.equivalents
    return (
        f'"smartphone_charges":{same.smartphone_charges:.6g},"car_metres":{same.car_metres:.6g},'
        f'"web_searches_2009":{same.web_searches_2009:.6g}'
    )


@lru_cache(maxsize=1024)
def _name(model: str) -> str:
    return _quoted(model).decode()


@lru_cache(maxsize=64)
def _grid(intensity: Intensity) -> str:
    """The members of `carbon` that tell the grid."""
    told = {
        "intensity_grams_per_kwh": intensity.grams_per_kwh,
        "zone": intensity.zone,
        "source": intensity.source,
        "as_of": intensity.as_of,
        "age_seconds": intensity.age_seconds,
    }
    return _quoted(told)[1:-1].decode()


def receipt_headers(receipt: Receipt) -> bytes:
    """The energy and carbon header lines of an answer whose receipt is known."""
    provenance = _provenance(receipt.request.id, receipt.status, receipt.boundary, receipt.intensity)
    figures = receipt.figures
    if figures is None:
        return provenance
    grams = fixed_point(figures.operational)
    return (
        provenance
        + (
            f"x-energy-joules: {fixed_joules(figures.parts.total)}\r\n"
            f"x-energy-interval-joules: {fixed_joules(figures.low)}-{fixed_joules(figures.high)}\r\n"
            f"x-energy-method: {figures.method}\r\nx-energy-meter: {figures.meter}\r\n"
            f"x-carbon-grams: {grams}\r\ncarbon-emissions-scope-2: {grams}\r\n"
        ).encode()
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
    """Joules with exactly six decimals: floats hold them exactly as long as there are fewer than 10^15 microjoules."""
    if -_EXACT < energy < _EXACT:
        return f"{energy / 1e6:.6f}"
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
