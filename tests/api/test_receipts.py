"""What clients read of a receipt: the object of the design, and the headers' table to the letter."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from proxy.api.receipts import (
    encode_receipt,
    fixed_joules,
    fixed_point,
    receipt_headers,
    stream_head_headers,
)
from proxy.energy.quantities import Microjoules, Seconds
from proxy.energy.receipt import Tokens
from tests.receipts import FRANCE, ID, example, receipt_object, unavailable

EXAMPLE = f"""
{{"object":"energy.receipt","id":"{ID}","client_request_id":null,"status":"provisional","outcome":"completed",
 "model":"chat","task":"chat",
 "energy_joules":12.34,"energy_kwh":0.00000342778,"low_joules":11.9,"high_joules":12.8,"meter_accuracy_ratio":0.05,
 "marginal_joules":9.1,"full_joules":13.0,"boundary":"node",
 "parts":{{"gpu":10.1,"host":2.24,"overhead":0.0,"wasted":0.0}},
 "method":"measured-steps","meter":"nvml-counter+rapl","meters":{{"gpu:0":"nvml-counter","host":"rapl"}},
 "attribution_method":"measured-steps","attribution_ratio":0.21,
 "avg_power_watts":30.0976,"duration_seconds":0.41,"joules_per_output_token":0.3085,
 "carbon":{{"grams_co2e":0.000192,"operational_grams":0.000192,"embodied_grams":null,
           "intensity_grams_per_kwh":56.0,"zone":"FRA","source":"codecarbon","as_of":"2023","age_seconds":null}},
 "water_millilitres":null,
 "equivalents":{{"smartphone_charges":0.000155808,"car_metres":0.000794738,"web_searches_2009":0.0114259}}}}
"""  # the design rounds the equivalents


def parsed(lines: bytes) -> dict[bytes, bytes]:
    """Header lines by name, none of which may stand twice."""
    pairs = [line.split(b": ", 1) for line in lines.split(b"\r\n")[:-1]]
    found = {name: value for name, value in pairs}  # noqa: C416 - a list of two is no pair to mypy
    assert len(found) == len(pairs)
    return found


def test_the_object_of_the_design_is_reproduced_keys_in_order() -> None:
    expected = json.loads(EXAMPLE)
    assert receipt_object(example()) == expected
    assert list(receipt_object(example())) == list(expected)
    for nested in ("parts", "carbon", "equivalents", "meters"):
        assert list(receipt_object(example())[nested]) == list(expected[nested])


def test_the_encoded_form_is_one_line_of_the_same_object() -> None:
    encoded = encode_receipt(example())
    assert b"\n" not in encoded
    assert json.loads(encoded) == json.loads(EXAMPLE)


def test_without_a_meter_every_figure_is_null_and_the_shape_stays() -> None:
    seen = receipt_object(unavailable())
    assert list(seen) == list(receipt_object(example()))
    assert seen["status"] == "unavailable"
    figures = [value for name, value in seen.items() if re.search("joules|kwh|watts|_ratio|method|meter$", name)]
    leaves = [*figures, *seen["parts"].values(), *seen["equivalents"].values()]
    assert leaves
    assert set(leaves) == {None}
    assert seen["carbon"]["grams_co2e"] is None
    assert seen["carbon"]["intensity_grams_per_kwh"] == 56.0
    assert seen["duration_seconds"] == 0.41


def test_quotients_without_a_divisor_are_null() -> None:
    instant = structs.replace(example(), duration=Seconds(0.0), tokens=Tokens(completion=0))
    assert receipt_object(instant)["avg_power_watts"] is None
    assert receipt_object(instant)["joules_per_output_token"] is None


def test_the_headers_of_an_answer() -> None:
    assert parsed(receipt_headers(example())) == {
        b"x-energy-joules": b"12.340000",
        b"x-energy-interval-joules": b"11.900000-12.800000",
        b"x-energy-method": b"measured-steps",
        b"x-energy-meter": b"nvml-counter+rapl",
        b"x-energy-boundary": b"node",
        b"x-energy-status": b"provisional",
        b"x-carbon-grams": b"0.000192",
        b"x-carbon-intensity": b"56.0;zone=FRA;source=codecarbon;as_of=2023",
        b"carbon-emissions-scope-2": b"0.000192",
        b"link": f'</v1/energy/receipts/{ID}>; rel="energy-receipt"'.encode(),
    }


def test_without_a_meter_no_figure_stands_in_the_headers() -> None:
    assert set(parsed(receipt_headers(unavailable()))) == {
        b"x-energy-boundary",
        b"x-energy-status",
        b"x-carbon-intensity",
        b"link",
    }
    assert parsed(receipt_headers(unavailable()))[b"x-energy-status"] == b"unavailable"


def test_the_head_of_a_stream_has_provenance_and_no_figures() -> None:
    head = stream_head_headers(ID, method="measured-tokens", meter="rapl", boundary="node", intensity=FRANCE)
    assert parsed(head) == {
        b"x-energy-method": b"measured-tokens",
        b"x-energy-meter": b"rapl",
        b"x-energy-boundary": b"node",
        b"x-energy-status": b"pending",
        b"x-carbon-intensity": b"56.0;zone=FRA;source=codecarbon;as_of=2023",
        b"link": f'</v1/energy/receipts/{ID}>; rel="energy-receipt"'.encode(),
    }


def test_the_head_of_a_stream_without_a_meter_says_unavailable() -> None:
    head = parsed(stream_head_headers(ID, method=None, meter=None, boundary="gpu", intensity=FRANCE))
    assert head[b"x-energy-status"] == b"unavailable"
    assert not {b"x-energy-method", b"x-energy-meter"} & set(head)


def test_a_live_intensity_carries_its_age() -> None:
    live = structs.replace(FRANCE, source="electricitymaps", as_of="2026-11-23T20:00Z", age_seconds=5400.4)
    headers = parsed(receipt_headers(structs.replace(example(), intensity=live)))
    assert headers[b"x-carbon-intensity"] == b"56.0;zone=FRA;source=electricitymaps;as_of=2026-11-23T20:00Z;age=5400"


@given(st.integers(0, 10**17))
def test_joules_are_exact_to_the_microjoule(energy: int) -> None:
    text = fixed_joules(Microjoules(energy))
    assert re.fullmatch(r"\d+\.\d{6}", text)
    assert int(text.replace(".", "")) == energy


@given(st.floats(1e-18, 1e12))
def test_fixed_point_keeps_six_digits_and_never_an_exponent(value: float) -> None:
    text = fixed_point(value)
    assert re.fullmatch(r"\d+\.\d+", text)
    assert float(text) == pytest.approx(value, rel=1e-5)


def test_zero_is_zero() -> None:
    assert fixed_point(0.0) == "0.0"
    assert fixed_joules(Microjoules(0)) == "0.000000"
