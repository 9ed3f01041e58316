"""Which GPUs can be metered here, how, and why not the others. Takes half a second: counters are watched ticking."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pynvml

from proxy.energy.quantities import Nanoseconds
from proxy.meter.base import Meter, MeterError, MeterProblem
from proxy.meter.nvml import NvmlCounterMeter, NvmlPowerMeter
from proxy.meter.nvml_api import (
    ENERGY_SOURCES,
    MODULE_POWER_SOURCES,
    PASSING,
    POWER_SOURCES,
    GpuIdentity,
    Link,
    NvmlError,
    Session,
    ask,
    first_that_answers,
    gpu_at,
    visible,
)

log = logging.getLogger(__name__)

T = TypeVar("T")
GpuMeter = NvmlCounterMeter | NvmlPowerMeter

#: How long counters are watched: four periods of the slowest known, and longer for one that has not moved yet.
WATCH_SECONDS = 0.45
LONGEST_WATCH_SECONDS = 1.5
POLL_SECONDS = 0.002

_MODULE_NAMES = ("GH200", "GB200", "GB300", "Grace")


@dataclass(frozen=True, slots=True)
class GpuDiscovery:
    """`covers_host`: a meter includes the CPU's energy (Grace Hopper), so the host must not be estimated again."""

    meters: Sequence[Meter]
    problems: Sequence[MeterProblem]
    covers_host: bool = False


def discover_gpus(environ: Mapping[str, str]) -> GpuDiscovery:
    """A meter for each GPU that CUDA_VISIBLE_DEVICES leaves, and why the others have none. Never raises MeterError."""
    try:
        session = Session()
        count = ask(pynvml.nvmlDeviceGetCount)
    except NvmlError as error:
        return GpuDiscovery([], [MeterProblem("nvml", error.why, error.cure)])
    gpus, problems = _identities(count)
    chosen = _chosen(gpus, environ, problems)
    meters = _with_moving_counters(_meters(chosen, session, problems), problems)
    if not meters:
        session.close()
    return GpuDiscovery(meters, problems, covers_host=any(_counts_the_module(meter) for meter in meters))


def _identities(count: int) -> tuple[list[GpuIdentity], list[MeterProblem]]:
    gpus: list[GpuIdentity] = []
    problems = [] if count else [MeterProblem("nvml", "NVML sees no GPU", "give the container or machine one (--gpus)")]
    for index in range(count):
        try:
            gpus.append(_patiently(partial(gpu_at, index)))
        except NvmlError as error:
            problems.append(MeterProblem(f"gpu:{index}", error.why, f"{error.cure} (then restart the proxy)"))
    return gpus, problems


def _patiently(attempt: Callable[[], T], tries: int = 3) -> T:
    """What passes within a moment is no reason to run without a meter."""
    for _ in range(tries - 1):
        try:
            return attempt()
        except NvmlError as error:
            if error.code not in PASSING:
                raise
            time.sleep(0.1)
    return attempt()


def _chosen(
    gpus: Sequence[GpuIdentity], environ: Mapping[str, str], problems: list[MeterProblem]
) -> Sequence[GpuIdentity]:
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    chosen = visible(gpus, setting)
    why = f"hidden by CUDA_VISIBLE_DEVICES={setting}"
    problems += [
        MeterProblem(f"gpu:{gpu.index}", why, "unset it to meter this GPU") for gpu in gpus if gpu not in chosen
    ]
    by_number = any(entry.strip().isdigit() for entry in (setting or "").split(","))
    if by_number and len({gpu.name for gpu in gpus}) > 1 and environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        log.warning(
            "CUDA_VISIBLE_DEVICES=%s counts GPUs of different models by speed, NVML by their place on the bus: "
            "other GPUs may be metered than are used; cure: set CUDA_DEVICE_ORDER=PCI_BUS_ID, or name GPUs by UUID",
            setting,
        )
    return chosen


def _meters(gpus: Iterable[GpuIdentity], session: Session, problems: list[MeterProblem]) -> list[GpuMeter]:
    meters: list[GpuMeter] = []
    for gpu in gpus:
        try:
            meters.append(_patiently(partial(_meter_for, gpu, session)))
        except MeterError as error:
            problems.append(MeterProblem(f"gpu:{gpu.index}", error.why, error.cure))
    return meters


def _meter_for(gpu: GpuIdentity, session: Session) -> GpuMeter:
    link = Link(session, gpu)
    module = any(name in gpu.name for name in _MODULE_NAMES)
    energy, no_energy = first_that_answers(link, ENERGY_SOURCES)
    power, no_power = first_that_answers(link, MODULE_POWER_SOURCES if module and energy else POWER_SOURCES)
    name = _named_after_its_scope(gpu, link, whole_module=module and energy is not None)
    if energy is not None:
        return NvmlCounterMeter(link, name, [energy] if power is None else [energy, power])
    why = _why_no_counter(link, no_energy)
    if power is None:
        cure = (no_energy or no_power or MeterError("")).cure or "measure on the machine that owns the GPU"
        raise MeterError(f"{why}, and no power sensor either", cure)
    log.warning("gpu:%d: %s: falling back to its %s, integrated", gpu.index, why, power.name)
    return NvmlPowerMeter(link, name, power)


def _named_after_its_scope(gpu: GpuIdentity, link: Link, *, whole_module: bool) -> str:
    """The GPU's name, with what its figures cover where that is not the GPU alone or not the part in use."""
    if whole_module:
        log.info("gpu:%d: the energy counter of %s covers its whole module, CPU included", gpu.index, gpu.name)
        return f"{gpu.name} (whole module)"
    if _asked_quietly(link, pynvml.nvmlDeviceGetMigMode, [0, 0])[0]:
        log.warning(
            "gpu:%d: MIG is on, and NVML measures the whole GPU only: what other instances use counts as ours "
            "(cure: give all instances to this proxy, or switch MIG off)",
            gpu.index,
        )
        return f"{gpu.name} (whole GPU, MIG)"
    return gpu.name


def _why_no_counter(link: Link, error: NvmlError | None) -> str:
    mode = _asked_quietly(link, pynvml.nvmlDeviceGetVirtualizationMode, pynvml.NVML_GPU_VIRTUALIZATION_MODE_NONE)
    if mode == pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU:
        return "a vGPU without energy counter (the host's driver keeps it)"
    return f"no energy counter ({error.why})" if error else "no energy counter (it stands at 0)"


def _asked_quietly(link: Link, call: Callable[..., T], otherwise: T) -> T:
    try:
        return link.ask(call)
    except NvmlError:
        return otherwise


def _counts_the_module(meter: GpuMeter) -> bool:
    return meter.kind == "nvml-counter" and meter.name.endswith("(whole module)")


class PeriodFinder:
    """A counter's period: the shortest time between two of its changes that were both seen as they happened."""

    sharp = 10_000_000  # ns: a change between polls further apart is no time measurement

    def __init__(self) -> None:
        self.shortest: int | None = None
        self.changes = 0
        self._value: int | None = None
        self._polled_at = 0
        self._changed_at: int | None = None

    def see(self, at: int, value: int) -> None:
        if self._value is not None and value != self._value:
            self.changes += 1
            self._changed(at)
        self._value, self._polled_at = value, at

    def _changed(self, at: int) -> None:
        sharp = at - self._polled_at <= self.sharp
        if sharp and self._changed_at is not None:
            interval = at - self._changed_at
            self.shortest = interval if self.shortest is None else min(self.shortest, interval)
        self._changed_at = at if sharp else None


def find_periods(meters: Sequence[NvmlCounterMeter]) -> dict[str, PeriodFinder]:
    """Watch all counters together, by device; ends early once each has shown three periods."""
    finders = {meter.device: PeriodFinder() for meter in meters}
    began = time.monotonic()
    while meters:
        for meter in meters:
            _watch(meter, finders[meter.device])
        elapsed = time.monotonic() - began
        if elapsed > LONGEST_WATCH_SECONDS or all(finder.changes > 3 for finder in finders.values()):
            break
        if elapsed > WATCH_SECONDS and all(finder.changes > 0 for finder in finders.values()):
            break
        time.sleep(POLL_SECONDS)
    return finders


def _watch(meter: NvmlCounterMeter, finder: PeriodFinder) -> None:
    try:
        value = meter.counter()
    except NvmlError as error:
        log.debug("%s: %s", meter.device, error)
        return
    finder.see(time.monotonic_ns(), value)


def _with_moving_counters(meters: Sequence[GpuMeter], problems: list[MeterProblem]) -> Sequence[GpuMeter]:
    """Replace a meter whose counter stands still by one that integrates power: standing still is not using nothing."""
    finders = find_periods([meter for meter in meters if isinstance(meter, NvmlCounterMeter)])
    kept: list[GpuMeter] = []
    for meter in meters:
        if isinstance(meter, NvmlCounterMeter) and not finders[meter.device].changes:
            kept += _by_power_instead(meter, problems)
            continue
        finder = finders.get(meter.device)
        meter.period = Nanoseconds(finder.shortest) if finder and finder.shortest else None
        kept.append(meter)
    return kept


def _by_power_instead(meter: NvmlCounterMeter, problems: list[MeterProblem]) -> Sequence[NvmlPowerMeter]:
    why = f"its energy counter did not move in {LONGEST_WATCH_SECONDS} s"
    instead = meter.by_power()
    if instead is None:
        problems.append(MeterProblem(meter.device, f"{why}, and it has no power sensor", "restart the NVIDIA driver"))
        return []
    log.warning("%s: %s: falling back to its power, integrated", meter.device, why)
    return [instead]
