import logging
from pathlib import Path

import pytest

from proxy.meter.discover import MeterSettings, discover

NO_GPU: dict[str, str] = {}


def powercap(root: Path) -> Path:
    zone = root / "intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("123\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    return root


def test_rapl_measures_the_host_and_the_estimate_stays_away(tmp_path: Path) -> None:
    found = discover(MeterSettings(nvml=False, rapl_root=powercap(tmp_path)))
    assert [meter.kind for meter in found.meters] == ["rapl"]
    assert {problem.meter for problem in found.problems} == {"nvml"}
    for meter in found.meters:
        meter.close()


def test_without_rapl_the_estimate_serves_and_the_log_names_why_and_the_cure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = discover(MeterSettings(nvml=False, rapl_root=tmp_path))
    assert [(meter.kind, meter.device, meter.estimated) for meter in found.meters] == [("codecarbon", "host", True)]
    (rapl,) = [problem for problem in found.problems if problem.meter == "rapl"]
    assert rapl.why
    assert rapl.cure
    assert "falling back to CodeCarbon's estimate" in caplog.text
    assert rapl.cure in caplog.text


def test_nothing_allowed_is_no_meter_and_no_error(tmp_path: Path) -> None:
    found = discover(MeterSettings(nvml=False, rapl=False, estimate=False))
    assert list(found.meters) == []
    assert {problem.meter for problem in found.problems} == {"nvml", "rapl", "codecarbon"}
    assert all("switched off" in problem.why for problem in found.problems)


def test_a_machine_without_nvidia_driver_is_told_how_to_get_one() -> None:
    found = discover(MeterSettings(rapl=False, estimate=False), NO_GPU)
    (nvml,) = [problem for problem in found.problems if problem.meter == "nvml"]
    assert "driver" in nvml.cure
