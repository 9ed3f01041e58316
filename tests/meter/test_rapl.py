import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.energy.quantities import Microjoules
from proxy.meter.base import FIRST_ORIGIN, Meter, MeterError, next_origin
from proxy.meter.rapl import RaplMeter, unwrapped_rise

RANGE = 262_143_328_850


class Powercap:
    """A powercap directory as Linux shows it: all zones flat, by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)
        (root / "intel-rapl").mkdir()

    def zone(self, directory: str, name: str, energy: int, span: int = RANGE) -> None:
        path = self.root / directory
        path.mkdir(parents=True)
        (path / "name").write_text(f"{name}\n")
        (path / "max_energy_range_uj").write_text(f"{span}\n")
        self.set(directory, energy)

    def set(self, directory: str, energy: int) -> None:
        (self.root / directory / "energy_uj").write_text(f"{energy}\n")


@pytest.fixture
def powercap(tmp_path: Path) -> Powercap:
    return Powercap(tmp_path / "powercap")


def risen(meter: Meter) -> int:
    """Microjoules since the meter was opened."""
    return meter.read().energy - FIRST_ORIGIN


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


def test_packages_and_memory_are_summed_and_nothing_is_counted_twice(powercap: Powercap) -> None:
    powercap.zone("intel-rapl:0", "package-0", 7_000_000_000)
    powercap.zone("intel-rapl:0:0", "core", 1_000_000)
    powercap.zone("intel-rapl:0:1", "uncore", 2_000_000)
    powercap.zone("intel-rapl:0:2", "dram", 3_000_000)
    powercap.zone("intel-rapl:1", "package-1", 9_000_000_000)
    powercap.zone("intel-rapl:2", "psys", 50_000_000)
    powercap.zone("intel-rapl-mmio:0", "package-0", 7_000_000_000)
    meter: Meter = RaplMeter(powercap.root)
    assert risen(meter) == 0
    powercap.set("intel-rapl:0", 7_010_000_000)
    powercap.set("intel-rapl:0:0", 6_000_000)
    powercap.set("intel-rapl:0:1", 5_000_000)
    powercap.set("intel-rapl:0:2", 3_000_500)
    powercap.set("intel-rapl:1", 9_000_000_001)
    powercap.set("intel-rapl:2", 99_000_000)
    powercap.set("intel-rapl-mmio:0", 7_010_000_000)
    assert risen(meter) == 10_000_000 + 500 + 1
    assert (meter.device, meter.kind, meter.estimated) == ("host", "rapl", False)
    meter.close()


def test_zones_are_found_below_their_packages_too(powercap: Powercap) -> None:
    powercap.zone("intel-rapl/intel-rapl:0", "package-0", 100)
    powercap.zone("intel-rapl/intel-rapl:0/intel-rapl:0:0", "dram", 100)
    meter = RaplMeter(powercap.root)
    powercap.set("intel-rapl/intel-rapl:0", 105)
    powercap.set("intel-rapl/intel-rapl:0/intel-rapl:0:0", 107)
    assert risen(meter) == 12
    meter.close()


def test_dies_that_show_one_counter_count_once(powercap: Powercap) -> None:
    powercap.zone("intel-rapl:0", "package-0-die-0", 5_000_000_000)
    powercap.zone("intel-rapl:1", "package-0-die-1", 5_000_000_900)
    powercap.zone("intel-rapl:2", "package-1-die-0", 8_000_000_000)
    meter = RaplMeter(powercap.root)
    powercap.set("intel-rapl:0", 5_000_001_000)
    powercap.set("intel-rapl:1", 5_000_001_900)
    powercap.set("intel-rapl:2", 8_000_000_010)
    assert risen(meter) == 1010
    meter.close()


def test_a_counter_that_wraps_is_not_a_new_epoch(powercap: Powercap) -> None:
    powercap.zone("intel-rapl:0", "package-0", RANGE - 1_000)
    meter = RaplMeter(powercap.root)
    powercap.set("intel-rapl:0", 500)
    assert risen(meter) == 1_500
    meter.close()


@given(
    span=st.integers(1_000, 2**40),
    rises=st.lists(st.integers(0, 2**40), max_size=30),
    start=st.integers(0, 2**40),
)
def test_unwrapping_recovers_every_rise_below_the_range(span: int, rises: list[int], start: int) -> None:
    truth = [rise % span for rise in rises]
    position = start % span
    total = 0
    for rise in truth:
        after = (position + rise) % span
        total += unwrapped_rise(position, after, span)
        position = after
    assert total == sum(truth)


def test_after_a_pause_that_may_hide_several_wraps_the_count_starts_anew(
    powercap: Powercap, caplog: pytest.LogCaptureFixture
) -> None:
    powercap.zone("intel-rapl:0", "package-0", 1_000, span=65_000_000_000)
    clock = Clock()
    meter = RaplMeter(powercap.root, clock)
    powercap.set("intel-rapl:0", 5_001_000)
    clock.now += 1_000_000_000
    assert risen(meter) == 5_000_000
    powercap.set("intel-rapl:0", 6_001_000)
    clock.now += 66_000_000_000
    assert (restart := meter.read().energy) < FIRST_ORIGIN  # a drop: a new epoch
    assert "starts anew" in caplog.text
    powercap.set("intel-rapl:0", 6_002_000)
    clock.now += 1_000_000_000
    assert meter.read().energy == restart + 1_000
    meter.close()


def test_a_machine_without_rapl_is_told_so_with_the_cure(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(MeterError, match="modprobe intel_rapl"):
            RaplMeter(root)


def test_forbidden_counters_name_the_cure(powercap: Powercap, monkeypatch: pytest.MonkeyPatch) -> None:
    powercap.zone("intel-rapl:0", "package-0", 100)
    real = os.open

    def forbidding(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if str(path).endswith("energy_uj"):
            raise PermissionError(13, "Permission denied")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", forbidding)  # tests may run as root, whom no file mode stops
    with pytest.raises(MeterError, match=r"cure: sudo chmod -R a\+r"):
        RaplMeter(powercap.root)


def test_a_counter_that_turns_unreadable_is_an_error_never_a_number(powercap: Powercap) -> None:
    powercap.zone("intel-rapl:0", "package-0", 100)
    meter = RaplMeter(powercap.root)
    (powercap.root / "intel-rapl:0" / "energy_uj").write_text("")
    with pytest.raises(MeterError, match="could not be read"):
        meter.read()
    powercap.set("intel-rapl:0", 250)
    assert risen(meter) == 150
    meter.close()


def test_one_failing_zone_of_two_loses_nothing(powercap: Powercap) -> None:
    powercap.zone("intel-rapl:0", "package-0", 100)
    powercap.zone("intel-rapl:0:0", "dram", 100)
    meter = RaplMeter(powercap.root)
    powercap.set("intel-rapl:0", 600)
    (powercap.root / "intel-rapl:0:0" / "energy_uj").write_text("")
    with pytest.raises(MeterError):
        meter.read()
    powercap.set("intel-rapl:0:0", 130)
    assert risen(meter) == 530
    meter.close()


@given(st.integers(0, FIRST_ORIGIN))
def test_a_new_epoch_lies_below_all_readings_of_the_last(origin: int) -> None:
    after = next_origin(Microjoules(origin))
    assert after >= 0
    assert after < origin or origin == 0
