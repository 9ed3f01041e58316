"""GPU meters over NVML: the energy counter where there is one, integrated power where there is none.

What NVML does not say, and we therefore say ourselves: a counter that stands still is an error, not 0 J; a power of 0 W
is a missing sensor; Grace Hopper's counter covers the module, CPU included; with MIG only the whole GPU is measured.
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import psutil
import pynvml

from proxy.energy.quantities import Microjoules, Nanoseconds, Watts
from proxy.meter.base import FIRST_ORIGIN, MeterError, Reading, next_origin
from proxy.meter.nvml_api import FINAL, NOT_FOUND, Link, NvmlError, Source

log = logging.getLogger(__name__)

#: NVIDIA's own figure for its power sensors.
ACCURACY_RATIO = 0.05

#: Power is integrated over pauses up to this; beyond it nobody knows what was drawn, and a new epoch starts.
LONGEST_INTEGRATED_PAUSE = Nanoseconds(2_000_000_000)

#: Counters tick every 20 to 100 ms: one that does not for so long is broken.
STANDSTILL = Nanoseconds(10_000_000_000)

#: A counter and integrated power further apart than this are worth a line in the log.
NOTABLE_DISAGREEMENT = 0.1


class Integral:
    """Energy as power over time, by trapezoids; after a pause too long it starts a new epoch (a drop)."""

    def __init__(self) -> None:
        self._origin = FIRST_ORIGIN
        self.microjoules = float(self._origin)
        self._at: int | None = None
        self._watts = 0.0

    def add(self, at: int, watts: float) -> bool:
        """False if the pause since the last call was too long: the integral begins again."""
        pause = at - self._at if self._at is not None else 0
        continued = 0 <= pause <= LONGEST_INTEGRATED_PAUSE
        if continued:
            self.microjoules += (watts + self._watts) / 2 * pause / 1000
        else:
            self._origin = next_origin(self._origin)
            self.microjoules = float(self._origin)
        self._at, self._watts = at, watts
        return continued


class Comparison:
    """How far integrated power is from the counter: |power - counter| / counter over spans of 5 to 30 seconds."""

    shortest = Nanoseconds(5_000_000_000)
    longest = Nanoseconds(30_000_000_000)

    def __init__(self) -> None:
        self.ratio: float | None = None
        self._integral = Integral()
        self._energy = -1
        self._began: tuple[int, int, float] | None = None  # time, counter, integral: at a change of the counter

    def add(self, at: int, energy: Microjoules, watts: float) -> None:
        if not self._integral.add(at, watts) or energy < self._energy:
            self._began = None
        elif energy > self._energy >= 0:
            self._counter_changed(at, energy)
        self._energy = energy

    def _counter_changed(self, at: int, energy: int) -> None:
        integral = self._integral.microjoules
        if self._began is None:
            self._began = (at, energy, integral)
            return
        began_at, began_energy, began_integral = self._began
        if at - began_at >= self.shortest:
            counted = energy - began_energy
            self.ratio = abs(integral - began_integral - counted) / counted
        if at - began_at >= self.longest:
            self._began = (at, energy, integral)


class ProcessShares:
    """The share of a GPU's use by processes that are not ours, from NVML's process utilisation."""

    def __init__(self, link: Link, device: str, own_namespace: bool | None = None) -> None:
        self._link = link
        self._device = device
        self._seen_until = 0
        self._refused = False
        self._own_namespace = _in_own_pid_namespace() if own_namespace is None else own_namespace

    def foreign_share(self, ours: Collection[int]) -> float | None:
        """Since the previous call; None where NVML cannot tell (said once). Raises NvmlError."""
        if self._refused:
            return None
        first = self._seen_until == 0
        samples = self._samples()
        if samples is None or first:
            return None
        return self._share({sample.pid: sample.smUtil for sample in samples}, ours)

    def _samples(self) -> Sequence[Any] | None:
        samples: Sequence[Any] = []
        try:
            samples = self._link.ask(pynvml.nvmlDeviceGetProcessUtilization, self._seen_until)
        except NvmlError as error:
            if error.code in FINAL:
                self._refuse(f"{error.why}; with MIG, or without the permission, NVML does not tell who uses the GPU")
                return None
            if error.code not in (NOT_FOUND, 0):  # nothing used the GPU since: pynvml raises even SUCCESS then
                raise
        self._seen_until = max([self._seen_until, 1, *(sample.timeStamp for sample in samples)])
        return samples

    def _share(self, use: Mapping[int, int], ours: Collection[int]) -> float | None:
        if self._own_namespace and any(not psutil.pid_exists(pid) for pid in use):
            self._refuse(
                "NVML names processes outside of this container's process namespace; cure: run with --pid=host"
            )
            return None
        total = sum(use.values())
        return sum(percent for pid, percent in use.items() if pid not in ours) / total if total else 0.0

    def _refuse(self, why: str) -> None:
        self._refused = True
        log.warning("%s: foreign processes are not told apart, their energy counts as ours: %s", self._device, why)


def _in_own_pid_namespace() -> bool:
    """Whether processes are numbered otherwise here than NVML numbers them (0xEFFFFFFC is Linux's first namespace)."""
    try:
        return os.readlink("/proc/self/ns/pid") != f"pid:[{0xEFFFFFFC}]"
    except OSError:
        return False


class _GpuMeter:
    """What both kinds of GPU meter share. `period` is the counter's, in nanoseconds, once it was inferred."""

    estimated = False

    def __init__(self, link: Link, name: str, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.device = f"gpu:{link.gpu.index}"
        self.name = name
        self.uuid = link.gpu.uuid
        self.period: Nanoseconds | None = None
        self._link = link
        self._clock = clock
        self._shares = ProcessShares(link, self.device)

    def foreign_share(self, ours: Collection[int]) -> float | None:
        return self._shares.foreign_share(ours)

    def close(self) -> None:
        self._link.close()


class NvmlPowerMeter(_GpuMeter):
    """A GPU without an energy counter: its power, integrated between readings. Read from one thread."""

    kind = "nvml-power"
    accuracy_ratio: float | None = ACCURACY_RATIO

    def __init__(self, link: Link, name: str, source: Source, clock: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__(link, name, clock)
        self._sources = (source,)
        self._integral = Integral()

    def read(self) -> Reading:
        milliwatts = self._link.read(self._sources)[0]
        if isinstance(milliwatts, NvmlError):
            raise milliwatts
        if milliwatts == 0:
            raise MeterError(f"{self.device} reports 0 W, which no GPU draws", cure="restart the driver")
        watts = milliwatts / 1000
        if not self._integral.add(self._clock(), watts):
            log.warning("%s: its power was not read for too long to integrate: the count starts anew", self.device)
        return Reading(Microjoules(round(self._integral.microjoules)), Watts(watts))


class NvmlCounterMeter(_GpuMeter):
    """A GPU by its energy counter; its power sensor, where it has one, checks the counter. Read from one thread."""

    kind = "nvml-counter"

    def __init__(
        self, link: Link, name: str, sources: Sequence[Source], clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        super().__init__(link, name, clock)
        self._sources = sources
        self._comparison = Comparison()
        self._counter = -1
        self._moved_at = clock()
        self._disagreement_told = False

    @property
    def accuracy_ratio(self) -> float | None:
        return max(ACCURACY_RATIO, self.disagreement or 0.0)

    @property
    def disagreement(self) -> float | None:
        return self._comparison.ratio

    def by_power(self) -> NvmlPowerMeter | None:
        """The same GPU by its power sensor, for when the counter proves broken; None where it has no such sensor."""
        if len(self._sources) < 2:
            return None
        return NvmlPowerMeter(self._link, self.name, self._sources[1], self._clock)

    def counter(self) -> int:
        """Millijoules, for inferring the period. Raises NvmlError."""
        energy = self._link.read(self._sources[:1])[0]
        if isinstance(energy, NvmlError):
            raise energy
        return energy

    def read(self) -> Reading:
        energy, *power = self._link.read(self._sources)
        if isinstance(energy, NvmlError):
            raise energy
        now = self._clock()
        self._check_that_it_moves(now, energy)
        watts = power[0] / 1000 if power and not isinstance(power[0], NvmlError) else None
        reading = Reading(Microjoules(energy * 1000), None if watts is None else Watts(watts))
        if watts is not None:
            self._compare(now, reading.energy, watts)
        return reading

    def _check_that_it_moves(self, now: int, energy: int) -> None:
        if energy != self._counter:
            self._counter, self._moved_at = energy, now
        elif now - self._moved_at > STANDSTILL:
            raise MeterError(
                f"the energy counter of {self.device} has stood still for {(now - self._moved_at) / 1e9:.0f} s",
                cure="none needed if it moves again; if not, restart the proxy (it will integrate power) or the driver",
            )

    def _compare(self, now: int, energy: Microjoules, watts: float) -> None:
        self._comparison.add(now, energy, watts)
        ratio = self._comparison.ratio
        if ratio is not None and ratio > NOTABLE_DISAGREEMENT and not self._disagreement_told:
            self._disagreement_told = True
            log.warning(
                "%s: the energy counter and the integrated power disagree by %.0f %%; the counter counts, and "
                "the meter's accuracy says so (cure: a newer driver, or an outside meter to tell which is right)",
                self.device,
                ratio * 100,
            )
