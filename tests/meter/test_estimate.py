import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.meter.base import Meter, MeterError
from proxy.meter.estimate import EstimateMeter, cpu_name


class Clock:
    def __init__(self) -> None:
        self.now = 5_000_000_000

    def __call__(self) -> int:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


def meter_of(power: Callable[[], float]) -> tuple[EstimateMeter, Clock]:
    clock = Clock()
    return EstimateMeter("some CPU", power, clock), clock


def test_energy_is_power_over_time() -> None:
    meter, clock = meter_of(lambda: 40.0)
    for _ in range(10):
        clock.sleep(0.1)
        reading = meter.read()
    assert reading.energy == 40_000_000
    assert reading.power == 40.0


def test_each_interval_counts_with_its_own_power() -> None:
    watts = iter([10.0, 100.0])
    meter, clock = meter_of(lambda: next(watts))
    clock.sleep(2)
    assert meter.read().energy == 20_000_000
    clock.sleep(0.5)
    assert meter.read().energy == 70_000_000


def test_reads_closer_than_the_load_can_tell_change_nothing_and_lose_nothing() -> None:
    meter, clock = meter_of(lambda: 40.0)
    clock.sleep(1)
    first = meter.read()
    clock.sleep(0.01)
    assert meter.read() == first
    clock.sleep(0.99)
    assert meter.read().energy == 80_000_000


def test_a_load_that_cannot_be_read_is_an_error_and_its_time_is_counted_later() -> None:
    def failing() -> float:
        if broken:
            raise OSError("/proc is not mounted")
        return 40.0

    meter, clock = meter_of(failing)
    broken = True
    clock.sleep(1)
    with pytest.raises(MeterError, match="cure:"):
        meter.read()
    broken = False
    clock.sleep(1)
    assert meter.read().energy == 80_000_000


def test_this_machine_has_an_estimate_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    meter: Meter = EstimateMeter.of_this_machine()
    before = meter.read().energy
    sum(range(3_000_000))  # longer than the shortest interval
    while (reading := meter.read()).energy == before:
        pass
    assert reading.power is not None
    assert 1 < reading.power < 10_000
    assert (meter.kind, meter.device, meter.estimated) == ("codecarbon", "host", True)
    assert meter.accuracy_ratio is not None
    assert meter.accuracy_ratio >= 0.3
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_codecarbon_stays_silent(capfd: pytest.CaptureFixture[str]) -> None:
    EstimateMeter.of_this_machine()
    logging.getLogger("codecarbon").error("chatter")
    assert capfd.readouterr() == ("", "")


def test_the_processor_is_named_by_linux(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nprocessor\t: 1\nmodel name\t: Some CPU @ 3 GHz\n")
    assert cpu_name(file) == "Some CPU @ 3 GHz"
    assert cpu_name(tmp_path / "absent") is None
