"""A receipt as clients see it: the `energy` object of bodies and streams, and the headers of an answer.

Pure functions on the data path. Measured energies keep their microjoules; derived figures are rounded to six
significant digits, so that no float noise shows. Headers carry fixed-point decimals, never exponents.
"""

import math
from functools import lru_cache
from typing import Any

import msgspec

from proxy.energy.attribution import Method
from proxy.energy.carbon import Equivalents, Intensity, kilowatt_hours
from proxy.energy.quantities import Microjoules
from proxy.energy.receipt import Boundary, Figures, Receipt, Status

SIGNIFICANT_DIGITS = 6
_quoted = msgspec.json.Encoder().encode

#: What the object says: the figures, or null for each where there are none, so that typed clients need no second shape.
_OBJECT = (
    b'{"object":"energy.receipt","id":"%b","client_request_id":%b,"status":"%b","outcome":"%b","model":%b,"task":"%b",'
    b'%b,"duration_seconds":%.6f,"joules_per_output_token":%b,'
    b'"carbon":{"grams_co2e":%b,"operational_grams":%b,"embodied_grams":null,%b},'
    b'"water_millilitres":null,"equivalents":{%b}}'
)
_FIGURES = (
    b'"energy_joules":%b,"energy_kwh":%.6g,"low_joules":%b,"high_joules":%b,"meter_accuracy_ratio":%b,'
    b'"marginal_joules":%b,"full_joules":%b,"boundary":"%b",'
    b'"parts":{"gpu":%b,"host":%b,"overhead":%b,"wasted":%b},"method":"%b","meter":"%b","meters":%b,'
    b'"attribution_method":"%b","attribution_ratio":%b,"avg_power_watts":%b'
)
_NO_FIGURES = (
    b'"energy_joules":null,"energy_kwh":null,"low_joules":null,"high_joules":null,"meter_accuracy_ratio":null,'
    b'"marginal_joules":null,"full_joules":null,"boundary":"%b",'
    b'"parts":{"gpu":null,"host":null,"overhead":null,"wasted":null},"method":null,"meter":null,"meters":{},'
    b'"attribution_method":null,"attribution_ratio":null,"avg_power_watts":null'
)
_EQUIVALENTS = b'"smartphone_charges":%.6g,"car_metres":%.6g,"web_searches_2009":%.6g'
_NO_EQUIVALENTS = b'"smartphone_charges":null,"car_metres":null,"web_searches_2009":null'


def encode_receipt(receipt: Receipt) -> bytes:
    """The `energy` object as JSON on one line: for bodies, for streams' `: energy {json}` and for the store.

    Written by hand, since every answer carries it: a dict to be encoded would take four times as long.
    """
    request, figures = receipt.request, receipt.figures
    grams = b"null" if figures is None else b"%.6g" % figures.operational
    return _OBJECT % (
        request.id.encode(), b"null" if request.client_request_id is None else _quoted(request.client_request_id),
        receipt.status.encode(), receipt.outcome.encode(), _quoted(request.model), request.task.encode(),
        _NO_FIGURES % receipt.boundary.encode() if figures is None else _figures(figures, receipt),
        receipt.duration, _per(figures, receipt.tokens.completion), grams, grams, _grid(receipt.intensity),
        _NO_EQUIVALENTS if figures is None else _equivalents(figures.equivalents),
    )  # fmt: skip


def _figures(figures: Figures, receipt: Receipt) -> bytes:
    parts, method = figures.parts, figures.method.encode()
    return _FIGURES % (
        _joules(parts.total), kilowatt_hours(figures.energy), _joules(figures.low), _joules(figures.high),
        _ratio(figures.accuracy_ratio), _joules(figures.marginal),
        b"null" if figures.full is None else _joules(figures.full), receipt.boundary.encode(),
        _joules(parts.gpu), _joules(parts.host), _joules(parts.overhead), _joules(parts.wasted), method,
        figures.meter.encode(), _quoted(figures.meters), method, _ratio(figures.attribution_ratio),
        _per(figures, receipt.duration),
    )  # fmt: skip


def _joules(energy: Microjoules) -> bytes:
    return b"%d.%06d" % divmod(energy, 1_000_000) if energy >= 0 else fixed_joules(energy).encode()


def _ratio(value: float | None) -> bytes:
    return b"null" if value is None else b"%.6g" % value


def _per(figures: Figures | None, divisor: float | None) -> bytes:
    return b"%.6g" % (figures.energy / divisor) if figures and divisor else b"null"


def _equivalents(same: Equivalents) -> bytes:
    return _EQUIVALENTS % (same.smartphone_charges, same.car_metres, same.web_searches_2009)


@lru_cache(maxsize=64)
def _grid(intensity: Intensity) -> bytes:
    """The members of `carbon` that tell the grid."""
    told = {
        "intensity_grams_per_kwh": intensity.grams_per_kwh,
        "zone": intensity.zone,
        "source": intensity.source,
        "as_of": intensity.as_of,
        "age_seconds": intensity.age_seconds,
    }
    return _quoted(told)[1:-1]


def receipt_object(receipt: Receipt) -> dict[str, Any]:
    """The `energy` object; without figures (no meter, or not known yet) every figure in it is None."""
    found: dict[str, Any] = msgspec.json.decode(encode_receipt(receipt))
    return found


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
