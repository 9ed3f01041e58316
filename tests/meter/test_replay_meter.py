import logging
from pathlib import Path

import pytest

from proxy.energy.events import Device, Event, Sample, Start
from proxy.energy.quantities import Microjoules, Watts, nanoseconds
from proxy.meter.base import Meter, MeterError, Reading
from proxy.meter.discover import MeterSettings, discover
from proxy.meter.replay import ReplayMeter, replay_meters
from proxy.trace import encode


def sample(at: float, energy: int, power: float | None = None, device: str = "gpu:0") -> Sample:
    return Sample(device, nanoseconds(at), Microjoules(energy), None if power is None else Watts(power))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    events: list[Event] = [
        Device("gpu:0", "H100", "nvml-counter", accuracy_ratio=0.05),
        Device("host", "CPU", "codecarbon", estimated=True, accuracy_ratio=0.5),
        sample(10, 100, 60),
        Start("a", nanoseconds(10.1), "chat"),
        sample(10.5, 7, device="host"),
        sample(11, 300, 90),
        sample(11, 301, 90),
        sample(12, 450, 80),
    ]
    path.write_bytes(b"".join(map(encode, events)))
    return path


class Clock:
    now = 777

    def __call__(self) -> int:
        return self.now


def test_each_reading_is_the_sample_of_its_moment(trace: Path) -> None:
    from proxy.trace import read_events

    samples = [e for _, e in read_events(trace) if isinstance(e, Sample) and e.device == "gpu:0"]
    clock = Clock()
    meter: Meter = ReplayMeter(Device("gpu:0", "H100", "nvml-counter"), [samples[0], samples[1], samples[3]], clock)
    seen = []
    for elapsed in (0, 0.99, 1, 1.5, 2):
        clock.now = 777 + round(elapsed * 1e9)
        seen.append(meter.read())
    assert seen == [
        Reading(Microjoules(e), Watts(p)) for e, p in ((100, 60), (100, 60), (300, 90), (300, 90), (450, 80))
    ]


def test_at_its_end_it_stands_still_and_says_so_once(trace: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    meter = ReplayMeter(Device("gpu:0", "H100", "replay"), [sample(0, 5, 10), sample(1, 9, 10)], clock)
    meter.read()
    with caplog.at_level(logging.WARNING):
        for later in (2, 3, 100):
            clock.now = 777 + later * 10**9
            assert meter.read() == Reading(Microjoules(9), None)
    assert caplog.text.count("has ended") == 1


def test_a_trace_becomes_one_meter_per_device(trace: Path) -> None:
    gpu, host = replay_meters(trace)
    assert (gpu.device, gpu.name, gpu.kind, gpu.estimated, gpu.accuracy_ratio) == (
        "gpu:0",
        "H100",
        "replay",
        False,
        0.05,
    )
    assert (host.device, host.kind, host.estimated, host.accuracy_ratio) == ("host", "replay", True, 0.5)


@pytest.mark.parametrize("text", ["", '{"type":"surprise"}\n'])
def test_a_trace_that_cannot_be_played_is_an_error_with_a_cure(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad"
    path.write_text(text)
    with pytest.raises(MeterError, match="--record"):
        discover(MeterSettings(replay=path))


def test_a_replay_uses_no_hardware(trace: Path) -> None:
    found = discover(MeterSettings(replay=trace))
    assert [meter.kind for meter in found.meters] == ["replay", "replay"]
