import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.energy.attribution import Attribution, DeviceBalance, DeviceShare
from proxy.energy.events import (
    BackendState,
    Device,
    Event,
    Finish,
    Loss,
    Model,
    Processes,
    Sample,
    Source,
    Start,
    Step,
)
from proxy.energy.quantities import Microjoules, Nanoseconds, Watts
from proxy.trace import Reader, TraceError, attribution_line, balance_line, encode, events_of, fixed_joules, read_events

DEVICE = b'{"type":"device","device":"gpu:0","name":"NVIDIA H100","meter":"nvml-counter"}'


def decode(*lines: bytes) -> list[Event]:
    return [event for _, event in events_of(lines, "TRACE")]


def test_the_four_record_types_of_the_format() -> None:
    events = decode(
        DEVICE,
        b'{"type":"sample","device":"gpu:0","at":12.300,"energy_joules":1234.567,"power_watts":410.2}',
        b'{"type":"step","backend":"chat","devices":["gpu:0"],"started":12.310,"ended":12.335,'
        b'"work":[{"request":"a","tokens":512,"context":512},{"request":"b","tokens":1,"context":903}]}',
        b'{"type":"finish","request":"a","at":14.2,"outcome":"completed"}',
    )
    assert events == [
        Device("gpu:0", "NVIDIA H100", "nvml-counter", estimated=False, accuracy_ratio=0.05),
        Sample("gpu:0", Nanoseconds(12_300_000_000), Microjoules(1_234_567_000), Watts(410.2)),
        Step(
            "chat",
            ("gpu:0",),
            Nanoseconds(12_310_000_000),
            Nanoseconds(12_335_000_000),
            ["a", "b"],
            [512, 1],
            [512, 903],
        ),
        Finish("a", Nanoseconds(14_200_000_000), "completed"),
    ]


def test_the_optional_record_types() -> None:
    events = decode(
        DEVICE,
        b'{"type":"start","request":"a","at":1,"backend":"chat"}',
        b'{"type":"processes","device":"gpu:0","at":2,"foreign_share":0.25}',
        b'{"type":"model","backend":"chat","device":"gpu:0","coefficients":{"F":1.5}}',
        b'{"type":"loss","backend":"chat","reports":3}',
        b'{"type":"loading","backend":"chat","devices":["gpu:0"],"at":3,"loading":true}',
        b'{"type":"step","backend":"chat","devices":[],"started":1,"ended":2,"work":[],"source":"relay"}',
    )
    assert events[1:] == [
        Start("a", Nanoseconds(1_000_000_000), "chat"),
        Processes("gpu:0", Nanoseconds(2_000_000_000), 0.25),
        Model("chat", "gpu:0", {"F": 1.5}),
        Loss("chat", 3),
        BackendState("chat", ("gpu:0",), Nanoseconds(3_000_000_000), loading=True),
        Step("chat", (), Nanoseconds(1_000_000_000), Nanoseconds(2_000_000_000), [], [], [], "relay"),
    ]


@pytest.mark.parametrize("power", [b"", b',"power_watts":null'])
def test_power_may_be_absent_or_null(power: bytes) -> None:
    (_, sample) = decode(DEVICE, b'{"type":"sample","device":"gpu:0","at":1,"energy_joules":2' + power + b"}")
    assert sample == Sample("gpu:0", Nanoseconds(1_000_000_000), Microjoules(2_000_000), None)


def test_a_recorded_estimate_stays_one() -> None:
    (device,) = decode(b'{"type":"device","device":"host","name":"some CPU","meter":"codecarbon"}')
    assert device == Device("host", "some CPU", "codecarbon", estimated=True, accuracy_ratio=0.5)


def test_unknown_fields_are_ignored_and_empty_lines_skipped() -> None:
    (event,) = decode(
        b"\n", b'{"new":[1],"type":"finish","request":"a","at":1,"outcome":"failed","more":{}}\n', b"  \n"
    )
    assert event == Finish("a", Nanoseconds(1_000_000_000), "failed")


SAMPLE = b'{"type":"sample","device":"gpu:0","at":1,"energy_joules":1}'
STEP = b'{"type":"step","backend":"chat","devices":["gpu:0"],"started":1,"ended":2,"work":[%s]}'

MALFORMED = {
    "not JSON": (b"{", "malformed|truncated"),
    "not an object": (b"[1]", "Expected `object`"),
    "half a line": (SAMPLE[:-5], "truncated|malformed"),
    "no type": (b'{"device":"gpu:0"}', "missing required field `type`"),
    "unknown type": (b'{"type":"surprise"}', "unknown type 'surprise'"),
    "type is no text": (b'{"type":7}', "type"),
    "missing field": (b'{"type":"sample","device":"gpu:0","at":1}', "energy_joules"),
    "wrong type": (SAMPLE.replace(b'"at":1', b'"at":"1"'), "at"),
    "energy is a text": (SAMPLE.replace(b":1}", b':"1"}'), "energy_joules"),
    "NaN": (SAMPLE.replace(b'"at":1', b'"at":NaN'), "malformed"),
    "infinite": (SAMPLE.replace(b'"at":1', b'"at":Infinity'), "malformed"),
    "beyond all floats": (SAMPLE.replace(b'"at":1', b'"at":1e999'), "out of range"),
    "energy that is beyond all floats in microjoules": (SAMPLE.replace(b":1}", b":1e308}"), "out of range"),
    "time that is beyond all floats in nanoseconds": (SAMPLE.replace(b'"at":1', b'"at":1e300'), "out of range"),
    "nested without end": (SAMPLE.replace(b":1}", b':1,"x":' + b"[" * 50_000), "nested too deeply"),
    "negative energy": (SAMPLE.replace(b":1}", b":-0.5}"), "energy_joules"),
    "negative power": (SAMPLE.replace(b":1}", b':1,"power_watts":-3}'), "power_watts"),
    "unknown device": (SAMPLE.replace(b"gpu:0", b"gpu:1"), "unknown device 'gpu:1'"),
    "step on an unknown device": ((STEP % b"").replace(b"gpu:0", b"gpu:9"), "unknown device 'gpu:9'"),
    "step that ends before it begins": ((STEP % b"").replace(b'"ended":2', b'"ended":0.5'), "ends before it begins"),
    "tokens are no integer": (
        STEP % b'{"request":"a","tokens":1.5,"context":1}',
        r"work\[0\].tokens|work\[...\].tokens",
    ),
    "negative tokens": (STEP % b'{"request":"a","tokens":-1,"context":1}', "tokens"),
    "negative context": (STEP % b'{"request":"a","tokens":1,"context":-1}', "context"),
    "work without request": (STEP % b'{"tokens":1,"context":1}', "request"),
    "unknown outcome": (b'{"type":"finish","request":"a","at":1,"outcome":"fine"}', "outcome"),
    "share above 1": (b'{"type":"processes","device":"gpu:0","at":1,"foreign_share":1.01}', "foreign_share"),
    "loss below 0": (b'{"type":"loss","backend":"chat","reports":-1}', "reports"),
    "not UTF-8": (b'{"type":"finish","request":"\xff","at":1,"outcome":"failed"}', "utf|UTF"),
    "a boolean for a time": (SAMPLE.replace(b'"at":1', b'"at":true'), "at"),
}


@pytest.mark.parametrize("case", MALFORMED, ids=lambda name: name)
def test_a_malformed_line_is_refused_with_its_place_and_the_reason(case: str) -> None:
    line, reason = MALFORMED[case]
    good = list(itertools.repeat(SAMPLE, 2))
    with pytest.raises(TraceError, match=reason) as refusal:
        decode(DEVICE, *good, line)
    assert str(refusal.value).startswith("TRACE:4: ")
    assert "\n" not in str(refusal.value)


def test_a_trace_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot be read: No such file"):
        list(read_events(tmp_path / "absent"))
    with pytest.raises(TraceError, match="cannot be read"):
        list(read_events(tmp_path))


def test_a_refused_line_leaves_the_reader_as_it_was() -> None:
    reader = Reader()
    reader.event(DEVICE)
    with pytest.raises(ValueError, match="surprise"):
        reader.event(b'{"type":"surprise"}')
    assert isinstance(reader.event(SAMPLE), Sample)


# --- there and back ---

EXACT = 1 << 51
times = st.integers(0, EXACT).map(Nanoseconds)
energies = st.integers(0, EXACT).map(Microjoules)
names = st.text(max_size=8)
ratios = st.floats(0, 1)
counts = st.integers(0, 1 << 40)
finite = st.floats(allow_nan=False, allow_infinity=False)

devices = st.builds(
    Device, st.just("gpu:0"), names, st.sampled_from(["nvml-counter", "codecarbon", "replay"]), st.booleans(),
    st.none() | ratios,
).filter(lambda d: d.accuracy_ratio is not None or d.meter == "replay")  # fmt: skip


@st.composite
def steps(draw: st.DrawFn) -> Step:
    size = draw(st.integers(0, 5))
    started, ended = sorted([draw(times), draw(times)])
    column = st.lists(counts, min_size=size, max_size=size)
    requests = draw(st.lists(names, min_size=size, max_size=size))
    sources: tuple[Source, ...] = ("engine", "relay")
    source = draw(st.sampled_from(sources))
    return Step(draw(names), ("gpu:0",), started, ended, requests, draw(column), draw(column), source)


events = st.one_of(
    devices,
    st.builds(Sample, st.just("gpu:0"), times, energies, st.none() | st.floats(0, 1e4).map(Watts)),
    steps(),
    st.builds(Start, names, times, names),
    st.builds(Finish, names, times, st.sampled_from(["completed", "cancelled", "failed", "unfinished"])),
    st.builds(Processes, st.just("gpu:0"), times, ratios, st.dictionaries(names, ratios, max_size=3)),
    st.builds(Model, names, st.just("gpu:0"), st.dictionaries(names, finite, max_size=3)),
    st.builds(Loss, names, counts),
    st.builds(BackendState, names, st.just(("gpu:0",)), times, st.booleans()),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=6))
def test_every_event_survives_the_way_out_and_back(history: list[Event]) -> None:
    lines = [encode(event) for event in history]
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in lines)
    assert decode(DEVICE, *lines)[1:] == history


# --- results ---


@given(st.integers(-(10**18), 10**18))
def test_joules_have_exactly_six_decimals_and_lose_nothing(energy: int) -> None:
    text = fixed_joules(energy)
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    whole, decimals = digits.split(".")
    assert len(decimals) == 6
    assert sign * (int(whole) * 1_000_000 + int(decimals)) == energy


def share(active: int, low: int, high: int) -> DeviceShare:
    return DeviceShare(
        Microjoules(active), Microjoules(low), Microjoules(high), Microjoules(0), None, Microjoules(active)
    )


def test_the_line_of_a_request() -> None:
    attribution = Attribution(
        'a"b', "chat", "completed", True, "measured-steps", Nanoseconds(0), Nanoseconds(1),
        {"gpu:0": share(80_250_000, 79_000_000, 81_700_000), "host": share(1_000_000, 900_000, 1_000_000)},
    )  # fmt: skip
    assert attribution_line(attribution) == (
        '{"request":"a\\"b","backend":"chat","outcome":"completed","energy_joules":81.250000,"low_joules":79.900000,'
        '"high_joules":82.700000,"method":"measured-steps","devices":{"gpu:0":80.250000,"host":1.000000}}'
    )


def test_the_line_of_a_request_that_touched_no_device() -> None:
    attribution = Attribution("a", "chat", "failed", True, "measured-window", Nanoseconds(0), Nanoseconds(1), {})
    assert json.loads(attribution_line(attribution))["devices"] == {}


def test_the_line_of_a_device() -> None:
    balance = DeviceBalance(
        "gpu:0", "H100", "nvml-counter", False, 0.05, Microjoules(4_321_000_000), Microjoules(4_000_000_000),
        Microjoules(321_000_000), Microjoules(0), Microjoules(0), Microjoules(0), None, None, None, {},
    )  # fmt: skip
    assert balance_line(balance) == (
        '{"device":"gpu:0","counter_joules":4321.000000,"requests_joules":4000.000000,"idle_joules":321.000000,'
        '"foreign_joules":0.000000,"unattributed_joules":0.000000,"residual_joules":0.000000}'
    )


def test_reading_a_trace_loads_no_web_server() -> None:
    code = "import proxy.replay, sys; sys.exit(any(m in sys.modules for m in ('fastapi', 'torch', 'aiohttp')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
