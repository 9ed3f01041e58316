"""GPUs that are sampled while things happen to them: counters, faults, losses, other processes, disagreement."""

import itertools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from proxy.energy.events import Event, Sample
from proxy.energy.ledger import Ledger
from tests.nvml.conftest import Lab
from tests.nvml.scenarios import Course, find_everything, watch
from tests.nvml.stub import Gpu

NOT_SUPPORTED, NO_PERMISSION, DRIVER_NOT_LOADED, TIMEOUT = 3, 4, 9, 10
FUNCTION_NOT_FOUND, GPU_IS_LOST, RESET_REQUIRED, MISMATCH, UNKNOWN = 13, 15, 16, 18, 999


class Watching:
    """A sampler at work in the lab. The test acts on the machine meanwhile, then asks for the `course` of things."""

    def __init__(self, lab: Lab, directory: Path, **options: Any) -> None:
        self._directory = directory
        self._future: Future[Course] = lab.start(watch, str(directory), **options)
        while not (directory / "started").exists() and not self._future.done():
            time.sleep(0.01)

    def stop(self) -> Course:
        (self._directory / "done").touch()
        return self._future.result(timeout=60)


@pytest.fixture
def watching(lab: Lab, tmp_path: Path) -> Iterator[Callable[..., Watching]]:
    started: list[Watching] = []

    def start(**options: Any) -> Watching:
        started.append(Watching(lab, tmp_path, **options))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def rises(samples: list[Sample]) -> list[int]:
    return [after.energy - before.energy for before, after in itertools.pairwise(samples)]


def test_the_counter_tells_what_the_gpu_used(lab: Lab, watching: Callable[..., Watching]) -> None:
    course_of = watching()
    lab.stub.busy(1)
    time.sleep(0.4)
    lab.stub.busy(0)
    time.sleep(0.4)
    samples = course_of.stop().of("gpu:0")
    first, last = samples[0], samples[-1]
    tick = 0.1
    earliest = lab.stub.energy(first.at / 1e9, last.at / 1e9 - tick)
    latest = lab.stub.energy(first.at / 1e9 - tick, last.at / 1e9)
    assert earliest - 2 <= (last.energy - first.energy) / 1e6 <= latest + 2
    assert {sample.power for sample in samples} >= {60.0, 400.0}


def test_integrated_power_tells_what_the_gpu_used(lab: Lab, watching: Callable[..., Watching]) -> None:
    lab.stub.fault("energy_field", NOT_SUPPORTED)
    lab.stub.fault("energy_call", NOT_SUPPORTED)
    course_of = watching(impatient=False)
    for _ in range(4):
        time.sleep(0.15)
        lab.stub.busy(1)
        time.sleep(0.15)
        lab.stub.busy(0)
    course = course_of.stop()
    assert course.devices[0].meter == "nvml-power"
    samples = course.of("gpu:0")
    truth = lab.stub.energy(samples[0].at / 1e9, samples[-1].at / 1e9)
    longest_pause = max(b.at - a.at for a, b in itertools.pairwise(samples)) / 1e9
    doubt = 8 * 340 * longest_pause  # of each of 8 changes, one pause at the most
    assert (samples[-1].energy - samples[0].energy) / 1e6 == pytest.approx(truth, abs=doubt)


def test_a_counter_that_restarts_is_a_new_epoch_and_the_law_holds(lab: Lab, watching: Callable[..., Watching]) -> None:
    course_of = watching()
    lab.stub.restart_counter()
    time.sleep(0.5)
    course = course_of.stop()
    drops = [rise for rise in rises(course.of("gpu:0")) if rise < 0]
    assert len(drops) == 1
    ledger = Ledger(known_only=True)
    events: list[Event] = [*course.devices, *course.samples]
    for event in events:
        ledger.apply(event)
    ledger.close()
    (balance,) = ledger.devices()
    assert balance.residual == 0
    assert balance.counter == sum(rise for rise in rises(course.of("gpu:0")) if rise > 0)


#: What goes wrong with each of a machine's GPUs, and a part of the cure that the log must name; the last one is well.
FAULTS = [
    ("energy_field", NOT_SUPPORTED, "Volta"),
    ("any", NO_PERMISSION, "/dev/nvidia"),
    ("any", DRIVER_NOT_LOADED, "modprobe nvidia"),
    ("fields", TIMEOUT, "none needed if it passes; if it stays, look for Xid errors in dmesg"),
    ("fields", FUNCTION_NOT_FOUND, "update the NVIDIA driver"),
    ("any", GPU_IS_LOST, "fell off its bus"),
    ("energy_field", GPU_IS_LOST, "fell off its bus"),
    ("any", RESET_REQUIRED, "--gpu-reset"),
    ("any", MISMATCH, "reload the module or reboot"),
    ("any", UNKNOWN, "restart the driver"),
]
WELL = f"gpu:{len(FAULTS)}"


@pytest.fixture(scope="module")
def ailing(shared_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Course, float, float]:
    """What a sampler makes of a machine whose GPUs fail, each in its way, between two times, and then work again."""
    stub = shared_lab.stub
    stub.reset([Gpu() for _ in range(len(FAULTS) + 1)])
    course_of = Watching(shared_lab, tmp_path_factory.mktemp("ailing"))
    began = time.monotonic()
    for gpu, (what, code, _) in enumerate(FAULTS):
        stub.fault(what, code, gpu)
    began_all = time.monotonic()
    time.sleep(0.6)
    ended = time.monotonic()
    for gpu, (what, _, _) in enumerate(FAULTS):
        stub.fault(what, 0, gpu)
    time.sleep(1.0)
    assert began < began_all
    return course_of.stop(), began_all, ended


@pytest.mark.parametrize("gpu", range(len(FAULTS)), ids=lambda gpu: f"{FAULTS[gpu][0]}-{FAULTS[gpu][1]}")
def test_a_fault_is_told_with_its_cure_never_a_number_and_passes(ailing: tuple[Course, float, float], gpu: int) -> None:
    course, began, ended = ailing
    device, cure = f"gpu:{gpu}", FAULTS[gpu][2]
    lines = [line for line in course.log.splitlines() if line.startswith(f"{device}:")]
    assert len([line for line in lines if cure in line]) == 1
    assert len([line for line in lines if "works again" in line]) == 1
    assert [s for s in course.of(device) if began + 0.2 < s.at / 1e9 < ended] == []
    assert [s for s in course.of(device) if s.at / 1e9 > ended]
    assert all(rise >= 0 for rise in rises(course.of(device)))
    downs = [status for round_ in course.statuses for status in round_ if status.device == device and not status.up]
    assert any(cure in (status.error or "") for status in downs)
    assert course.statuses[-1][gpu].up


def test_the_gpus_beside_it_go_on(ailing: tuple[Course, float, float]) -> None:
    course, began, ended = ailing
    assert len([s for s in course.of(WELL) if began < s.at / 1e9 < ended]) >= 1
    assert WELL not in course.log


def test_energy_of_an_outage_is_not_lost(lab: Lab, watching: Callable[..., Watching]) -> None:
    course_of = watching()
    lab.stub.fault("any", GPU_IS_LOST)
    lab.stub.busy(1)
    time.sleep(0.5)
    lab.stub.busy(0)
    lab.stub.fault("any", 0)
    time.sleep(0.6)
    samples = course_of.stop().of("gpu:0")
    used = (samples[-1].energy - samples[0].energy) / 1e6
    assert used >= lab.stub.energy(samples[0].at / 1e9, samples[-1].at / 1e9 - 0.1) - 2


def test_a_driver_that_is_reloaded_is_found_again(lab: Lab, watching: Callable[..., Watching]) -> None:
    lab.run(find_everything)  # imports CodeCarbon, which opens NVML a second time
    lab.stub.reset([Gpu(), Gpu()])
    course_of = watching()
    lab.stub.refuse_init(DRIVER_NOT_LOADED)
    lab.stub.reload_driver()
    time.sleep(0.3)
    back = time.monotonic()
    lab.stub.refuse_init(0)
    time.sleep(0.8)
    course = course_of.stop()
    for device in ("gpu:0", "gpu:1"):
        assert [sample for sample in course.of(device) if sample.at / 1e9 > back]
    assert "NVML was opened anew" in course.log
    assert all(status.up for status in course.statuses[-1])


def test_a_lost_power_sensor_leaves_no_gap_that_is_called_zero(lab: Lab, watching: Callable[..., Watching]) -> None:
    lab.stub.fault("energy_field", NOT_SUPPORTED)
    lab.stub.fault("energy_call", NOT_SUPPORTED)
    course_of = watching()
    lab.stub.fault("instant_gpu", TIMEOUT)
    time.sleep(0.6)
    lab.stub.fault("instant_gpu", 0)
    time.sleep(0.5)
    course = course_of.stop()
    assert "the count starts anew" in course.log
    assert min(rises(course.of("gpu:0"))) < 0  # a new epoch: the ledger knows that it does not know


def test_a_power_sensor_that_fails_leaves_the_counter(lab: Lab, watching: Callable[..., Watching]) -> None:
    course_of = watching()
    began = time.monotonic()
    lab.stub.fault("instant_gpu", NOT_SUPPORTED)
    time.sleep(0.3)
    course = course_of.stop()
    after = [sample for sample in course.of("gpu:0") if sample.at / 1e9 > began + 0.1]
    assert after
    assert {sample.power for sample in after} == {None}
    assert all(status.up for round_ in course.statuses[1:] for status in round_ if status.error != "no reading yet")


def test_a_counter_that_stops_moving_is_down_until_it_moves(lab: Lab, watching: Callable[..., Watching]) -> None:
    course_of = watching()
    lab.stub.stand_still()
    time.sleep(0.8)
    lab.stub.move_again()
    time.sleep(0.5)
    course = course_of.stop()
    assert "has stood still" in course.log
    assert "works again" in course.log
    assert all(status.up for status in course.statuses[-1])


def test_foreign_processes_are_told_from_ours(lab: Lab, watching: Callable[..., Watching]) -> None:
    us, other = os.getpid(), os.getppid()
    lab.stub.processes({us: 30, other: 10})
    course_of = watching(pids={"chat": [us]})
    time.sleep(0.5)
    course = course_of.stop()
    shares = [event.foreign_share for event in course.processes]
    assert shares
    assert set(shares) == {0.25}


def test_a_gpu_that_nobody_uses_has_no_foreign_share(lab: Lab, watching: Callable[..., Watching]) -> None:
    course_of = watching()
    time.sleep(0.5)
    assert {event.foreign_share for event in course_of.stop().processes} == {0.0}


@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND])
def test_where_processes_cannot_be_told_that_is_said_and_no_share_invented(
    lab: Lab, watching: Callable[..., Watching], code: int
) -> None:
    lab.stub.processes({os.getppid(): 90})
    lab.stub.fault("utilization", code)
    course_of = watching()
    time.sleep(0.5)
    course = course_of.stop()
    assert course.processes == []
    assert course.log.count("foreign processes are not told apart") == 1
    assert course.of("gpu:0")


def test_a_counter_and_a_power_sensor_that_agree(lab: Lab, watching: Callable[..., Watching]) -> None:
    course_of = watching()
    time.sleep(1.0)
    course = course_of.stop()
    disagreement = course.statuses[-1][0].disagreement
    assert disagreement is not None
    assert disagreement < 0.6  # over half a second, of which a tick and a poll or two are unsure
    assert course.devices[0].accuracy_ratio == 0.05


def test_a_counter_and_a_power_sensor_that_disagree_widen_the_accuracy(
    lab: Lab, watching: Callable[..., Watching]
) -> None:
    lab.stub.set("gain", 4)
    course_of = watching()
    time.sleep(1.0)
    course = course_of.stop()
    disagreement = course.statuses[-1][0].disagreement
    assert disagreement is not None
    assert disagreement > 1
    assert (course.devices[-1].accuracy_ratio or 0) > 1
    assert course.log.count("disagree by") == 1
    samples = course.of("gpu:0")
    used = (samples[-1].energy - samples[0].energy) / 1e6
    assert used <= lab.stub.energy(samples[0].at / 1e9 - 0.1, samples[-1].at / 1e9) + 2  # the counter counts
