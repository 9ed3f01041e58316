"""The host's energy by CodeCarbon's CPU and RAM power models: an estimate, the meter of last resort.

CodeCarbon's EmissionsTracker is not used: it starts threads, writes files and looks addresses up. Only its power
models are: the CPU's thermal design power scaled by 10 % + 90 % of the load's cube, a flat figure per memory module.

What this does not know: frequency, instructions, other hardware, and whether the CPU's table entry is right. Against
RAPL such models are off by some ten percent up to a factor of two, hence the wide `accuracy_ratio`.
"""

import csv
import logging
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from proxy.energy.quantities import Microjoules, Nanoseconds, Watts
from proxy.meter.base import MeterError, Reading

#: Half, in either direction: CodeCarbon states no error of its own, its RAM figure is a flat guess and a CPU that its
#: table does not know gets 4 W per thread.
ACCURACY_RATIO = 0.5

#: /proc/stat counts CPU time in ticks of 10 ms: a load over less than ten of them is mostly noise, and dear to read.
SHORTEST_INTERVAL = Nanoseconds(100_000_000)


class EstimateMeter:
    """The host's energy, integrated over time from `power()`, which says the watts since it was last asked.

    `clock` is in monotonic nanoseconds. `EstimateMeter.of_this_machine()` joins it to CodeCarbon's models.
    """

    device = "host"
    kind = "codecarbon"
    estimated = True
    accuracy_ratio: float | None = ACCURACY_RATIO

    def __init__(self, name: str, power: Callable[[], float], clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.name = name
        self._power = power
        self._clock = clock
        self._read_at = clock()
        self._microjoules = 0.0
        self._last = Reading(Microjoules(0), None)

    @classmethod
    def of_this_machine(cls) -> "EstimateMeter":
        """Raises MeterError where CodeCarbon is missing or has changed its models' interface."""
        try:
            name, power = _codecarbon_power()
        except Exception as error:
            raise MeterError(
                f"CodeCarbon's power models could not be used ({type(error).__name__}: {error})",
                cure="install the version that constraints.txt pins",
            ) from error
        return cls(name, power)

    def read(self) -> Reading:
        now = self._clock()
        elapsed = now - self._read_at
        if elapsed >= SHORTEST_INTERVAL:
            watts = self._power_now()
            self._microjoules += watts * elapsed / 1000
            self._read_at = now
            self._last = Reading(Microjoules(round(self._microjoules)), Watts(watts))
        return self._last

    def _power_now(self) -> float:
        try:
            return self._power()
        except Exception as error:
            raise MeterError(
                f"the CPU's load could not be read ({type(error).__name__}: {error})", cure="make /proc/stat readable"
            ) from error

    def close(self) -> None:
        pass


def _codecarbon_power() -> tuple[str, Callable[[], float]]:
    """The CPU's name, and a function that says the watts of CPU and memory since it was last called."""
    from codecarbon.core.util import count_physical_cpus  # noqa: PLC0415 - 0.2 s that machines with RAPL need not spend
    from codecarbon.external.hardware import CPU, MODE_CPU_LOAD  # noqa: PLC0415
    from codecarbon.external.ram import RAM  # noqa: PLC0415

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL + 1)
    model = _cpu_model()
    cpu: Any = CPU.from_utils("", MODE_CPU_LOAD, model, _design_power(model) * count_physical_cpus())
    cpu.start()
    memory_watts: float = RAM().total_power().W
    return model, lambda: float(cpu.total_power().W) + memory_watts


def _cpu_model() -> str:
    """The name that CodeCarbon would find; py-cpuinfo takes a second for what Linux says in one line."""
    from codecarbon.core.util import detect_cpu_model  # noqa: PLC0415

    return cpu_name() or detect_cpu_model() or "unknown CPU"


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """The processor's own name as Linux tells it, None where it does not."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _design_power(model: str) -> float:
    """Thermal design power in watts by CodeCarbon's table and matching, or its fallback of some watts per thread.

    CodeCarbon's matching gets the table as plain lists: `TDP()` would load pandas (1.5 s, 60 MB) for one look-up.
    """
    from codecarbon.core.cpu import DEFAULT_POWER_PER_CORE, TDP  # noqa: PLC0415
    from codecarbon.core.util import count_cpus  # noqa: PLC0415

    table = resources.files("codecarbon") / "data" / "hardware" / "cpu_power.csv"
    with table.open(encoding="utf-8") as lines:
        watts = {row["Name"]: row["TDP"] for row in csv.DictReader(lines)}
    match = TDP.__new__(TDP)._get_matching_cpu(model, {"Name": list(watts)})
    try:
        return float(watts[match])
    except (KeyError, ValueError):  # unknown, or one of the table's few cells that are no number
        return float(DEFAULT_POWER_PER_CORE * count_cpus())
