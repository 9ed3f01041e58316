"""Which GPUs are metered, how, and what is said of the others: pynvml's true ctypes path over the stand-in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from proxy.meter.base import Reading
from proxy.meter.nvml_api import GpuIdentity, visible
from proxy.meter.nvml_discovery import PeriodFinder
from tests.nvml.conftest import Lab
from tests.nvml.scenarios import Found, FoundMeter, find, find_everything
from tests.nvml.stub import Gpu, NvmlStub, build

NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, TIMEOUT, FUNCTION_NOT_FOUND = 3, 4, 9, 10, 13
GPU_IS_LOST, RESET_REQUIRED, LIB_RM_VERSION_MISMATCH, UNKNOWN = 15, 16, 18, 999

NO_COUNTER = {"energy_field": NOT_SUPPORTED, "energy_call": NOT_SUPPORTED}


def only(found: Found) -> FoundMeter:
    (meter,) = found.meters
    return meter


def reading(meter: FoundMeter) -> Reading:
    assert isinstance(meter.reading, Reading), meter.reading
    return meter.reading


def test_a_gpu_with_a_counter(lab: Lab) -> None:
    found = lab.run(find)
    meter = only(found)
    assert (meter.device, meter.name, meter.kind) == ("gpu:0", "NVIDIA H100 80GB HBM3", "nvml-counter")
    assert meter.uuid == lab.stub.gpus[0].uuid
    assert reading(meter).energy > 123_000_000  # the counter's own origin, in microjoules
    assert reading(meter).power == pytest.approx(60, rel=1e-3)
    assert found.problems == {}


def test_every_gpu_has_its_own_meter_and_counter(lab: Lab) -> None:
    lab.stub.reset([Gpu(), Gpu(name="NVIDIA A100", since=(0, 9_000_000.0), idle_watts=50)])
    first, second = lab.run(find).meters
    assert (first.device, second.device) == ("gpu:0", "gpu:1")
    assert reading(second).energy > 9_000_000_000_000
    assert reading(second).power == pytest.approx(50, rel=1e-3)


@pytest.mark.parametrize("tick", [0.1, 0.02])
def test_the_counters_period_is_found(lab: Lab, tick: float) -> None:
    lab.stub.set("tick", tick)
    period = only(lab.run(find)).period
    assert period is None or 0.2 * tick < period / 1e9 < 5 * tick  # on a busy machine no change may be seen sharply


def test_the_shortest_sharp_interval_is_the_period() -> None:
    finder = PeriodFinder()
    for at, value in ((0, 1), (2, 1), (4, 2), (60, 3), (104, 3), (106, 4), (204, 4), (206, 5)):
        finder.see(at * 1_000_000, value)
    assert finder.shortest == 100_000_000  # the change at 60 ms was seen 56 ms late: it times nothing
    assert finder.changes == 4


# --- CUDA_VISIBLE_DEVICES ---

GPUS = [GpuIdentity(n, f"GPU-{n}{n}{n}{n}-aaaa", "H100") for n in range(4)]


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2,0", [2, 0]),
        (" 1 , 3 ", [1, 3]),
        ("1,9,0", [1]),
        ("0,-1,1", [0]),
        ("GPU-22", [2]),
        ("GPU-2222-aaaa,GPU-0", [2, 0]),
        ("GPU-", []),
        ("nonsense", []),
        ("1,1", [1]),
        ("MIG-GPU-3333-aaaa/1/0", [3]),
        ("MIG-abc,MIG-def", [2]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(setting: str | None, chosen: list[int]) -> None:
    parents = {"MIG-abc": "GPU-2222-aaaa"}
    assert [gpu.index for gpu in visible(GPUS, setting, parents.get)] == chosen


def test_hidden_gpus_are_not_metered_and_said_to_be_hidden(lab: Lab) -> None:
    lab.stub.reset([Gpu(), Gpu(), Gpu()])
    found = lab.run(find, {"CUDA_VISIBLE_DEVICES": "1"})
    assert only(found).device == "gpu:1"
    assert set(found.problems) == {"gpu:0", "gpu:2"}
    assert "hidden by CUDA_VISIBLE_DEVICES=1" in found.problems["gpu:0"]


def test_numbers_that_cuda_and_nvml_may_count_differently_are_warned_of(lab: Lab) -> None:
    lab.stub.reset([Gpu(), Gpu(name="NVIDIA A100")])
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in lab.run(find, {"CUDA_VISIBLE_DEVICES": "1"}).log
    settled = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert "CUDA_DEVICE_ORDER" not in lab.run(find, settled).log


def test_a_mig_instance_is_metered_by_its_whole_gpu_and_that_is_said(lab: Lab) -> None:
    lab.stub.reset([Gpu(), Gpu()])
    lab.stub.set("mig", 1, gpu=1)
    lab.stub.set("mig_uuid", "MIG-1234", gpu=1)
    found = lab.run(find, {"CUDA_VISIBLE_DEVICES": "MIG-1234"})
    assert only(found).device == "gpu:1"
    assert only(found).name.endswith("(whole GPU, MIG)")
    assert "MIG is on" in found.log
    assert "cure:" in found.log


# --- what GPUs lack ---


def test_an_old_way_to_the_counter_serves_where_fields_are_not_supported(lab: Lab) -> None:
    lab.stub.fault("fields", NOT_SUPPORTED)
    meter = only(lab.run(find))
    assert meter.kind == "nvml-counter"
    assert reading(meter).power == pytest.approx(60, rel=1e-3)


def test_a_field_may_fail_while_the_call_succeeds(lab: Lab) -> None:
    lab.stub.fault("energy_field", NOT_SUPPORTED)
    assert only(lab.run(find)).kind == "nvml-counter"


@pytest.mark.parametrize(
    "refused",
    [
        [],
        ["instant_gpu"],
        ["instant_gpu", "instant_module"],
        ["instant_gpu", "instant_module", "average_gpu"],
        ["instant_gpu", "instant_module", "average_gpu", "average_module"],
    ],
)
def test_without_a_counter_the_best_power_there_is_is_integrated(lab: Lab, refused: list[str]) -> None:
    for fault in [*NO_COUNTER, *refused]:
        lab.stub.fault(fault, NOT_SUPPORTED)
    found = lab.run(find)
    assert only(found).kind == "nvml-power"
    assert reading(only(found)).power == pytest.approx(60, rel=1e-3)
    assert "falling back to its" in found.log


def test_no_sensor_at_all_is_a_problem_never_a_meter_of_zeros(lab: Lab) -> None:
    for fault in (*NO_COUNTER, "instant_gpu", "instant_module", "average_gpu", "average_module", "power_usage"):
        lab.stub.fault(fault, NOT_SUPPORTED)
    found = lab.run(find)
    assert found.meters == []
    assert "no power sensor either" in found.problems["gpu:0"]


def test_a_vgpu_without_counter_is_said_to_be_one(lab: Lab) -> None:
    lab.stub.set("virtualization", 2)
    for fault in NO_COUNTER:
        lab.stub.fault(fault, NOT_SUPPORTED)
    found = lab.run(find)
    assert only(found).kind == "nvml-power"
    assert "a vGPU without energy counter" in found.log


def test_a_vgpu_that_answers_zero_is_not_believed(lab: Lab) -> None:
    lab.stub.reset([Gpu(idle_watts=0, since=(0, 0.0))])
    found = lab.run(find)
    assert found.meters == []
    assert "gpu:0" in found.problems


def test_a_counter_that_stands_still_from_the_start_is_not_believed(lab: Lab) -> None:
    lab.stub.stand_still()
    found = lab.run(find)
    assert only(found).kind == "nvml-power"
    assert "did not move" in found.log


def test_grace_hopper_measures_its_module_and_the_host_is_not_estimated_on_top(lab: Lab) -> None:
    lab.stub.reset([Gpu(name="NVIDIA GH200 480GB")])
    found = lab.run(find)
    assert only(found).name == "NVIDIA GH200 480GB (whole module)"
    assert found.covers_host
    assert "CPU included" in found.log
    kinds, _ = lab.run(find_everything)
    assert kinds == ["nvml-counter"]


def test_an_ordinary_gpu_leaves_the_host_to_its_own_meter(lab: Lab) -> None:
    kinds, _ = lab.run(find_everything)
    assert kinds[0] == "nvml-counter"
    assert len(kinds) == 2


# --- faults at the start ---


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (NO_PERMISSION, "/dev/nvidia"),
        (DRIVER_NOT_LOADED, "modprobe nvidia"),
        (LIB_RM_VERSION_MISMATCH, "reload the module or reboot"),
        (UNKNOWN, "dmesg"),
    ],
)
def test_nvml_that_does_not_open_is_a_problem_with_a_cure(lab: Lab, code: int, cure: str) -> None:
    lab.stub.refuse_init(code)
    found = lab.run(find)
    assert found.meters == []
    assert cure in found.problems["nvml"]


@pytest.mark.parametrize(
    ("code", "cure"),
    [(GPU_IS_LOST, "fell off its bus"), (RESET_REQUIRED, "--gpu-reset"), (NO_PERMISSION, "/dev/nvidia")],
)
def test_one_gpu_that_fails_at_the_start_leaves_the_others(lab: Lab, code: int, cure: str) -> None:
    lab.stub.reset([Gpu(), Gpu()])
    lab.stub.fault("any", code, gpu=0)
    found = lab.run(find)
    assert only(found).device == "gpu:1"
    assert cure in found.problems["gpu:0"]


@pytest.mark.parametrize("code", [TIMEOUT, UNKNOWN])
def test_what_does_not_pass_is_a_problem_too(lab: Lab, code: int) -> None:
    lab.stub.fault("fields", code)
    found = lab.run(find)
    assert found.meters == []
    assert "dmesg" in found.problems["gpu:0"]


def test_no_permission_for_a_reading_is_a_problem_with_its_own_cure(lab: Lab) -> None:
    for fault in ("fields", "energy_call", "power_usage"):
        lab.stub.fault(fault, NO_PERMISSION)
    assert "/dev/nvidia" in lab.run(find).problems["gpu:0"]


def test_a_machine_with_a_driver_and_no_gpu(lab: Lab) -> None:
    lab.stub.reset([])
    found = lab.run(find)
    assert found.meters == []
    assert "sees no GPU" in found.problems["nvml"]


# --- in a process of their own: another library, or none ---

SHOW = """
from proxy.meter.nvml_discovery import discover_gpus
found = discover_gpus({})
print([(m.kind, m.read().power) for m in found.meters], [p.why + p.cure for p in found.problems])
"""


def shown(env: dict[str, str]) -> str:
    process = subprocess.run(
        [sys.executable, "-c", SHOW], env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=60
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_a_library_without_a_function_is_an_older_driver_not_the_end(tmp_path: Path) -> None:
    stub = NvmlStub(build(tmp_path / "old", "-DWITHOUT_FIELDS"), tmp_path / "control")
    assert "nvml-counter" in shown(dict(stub.env))


def test_no_library_is_a_machine_without_driver(tmp_path: Path) -> None:
    output = shown({"LD_LIBRARY_PATH": str(tmp_path)})
    assert "Library Not Found" in output
    assert "install the NVIDIA driver" in output
