"""The C stand-in for libnvidia-ml.so.1, built and driven from Python: see `nvml_stub` in tests/nvml/fixtures.py.

The power of each simulated GPU is a function of time that the test writes as it goes (`busy`, `watts`); the counter is
its integral, so that `energy()` says the truth for any span.
"""

import itertools
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("stub.c")


def build(directory: Path, *flags: str) -> Path:
    """Compile the library into `directory`; returns `directory`, for LD_LIBRARY_PATH."""
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / "libnvidia-ml.so.1"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wl,-soname,libnvidia-ml.so.1", *flags]
    subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True, timeout=60)
    return directory


@dataclass
class Gpu:
    """A simulated GPU. `settings` are further lines of the control file, `KEY` to `VALUE` (see stub.c)."""

    name: str = "NVIDIA H100 80GB HBM3"
    uuid: str = ""
    idle_watts: float = 60.0
    busy_watts: float = 400.0
    settings: dict[str, str] = field(default_factory=lambda: {"tick": "0.02", "average": "1"})
    faults: dict[str, int] = field(default_factory=dict)
    processes: dict[int, int] = field(default_factory=dict)
    since: tuple[float, float] = (0.0, 123.0)
    watts: list[tuple[float, float]] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [
            f"name {self.name}",
            f"uuid {self.uuid}",
            *(f"{key} {value}" for key, value in self.settings.items()),
            *(f"fault {what} {code}" for what, code in self.faults.items()),
            *(f"process {pid} {percent}" for pid, percent in self.processes.items()),
            f"since {self.since[0]!r} {self.since[1]!r}",
            *(f"watts {at!r} {watts!r}" for at, watts in self.watts),
        ]


class NvmlStub:
    """A machine's GPUs. Every method takes effect at once in all processes that run with `env`."""

    def __init__(self, library: Path, control: Path, gpus: Sequence[Gpu] | None = None) -> None:
        self.control = control
        self.env: Mapping[str, str] = {"LD_LIBRARY_PATH": str(library), "NVML_STUB": str(control)}
        self.reset(gpus)

    def reset(self, gpus: Sequence[Gpu] | None = None) -> None:
        """A machine anew, all idle, with the counters' history of the last minute."""
        self.gpus = list(gpus) if gpus is not None else [Gpu()]
        self._library: dict[str, int] = {}
        now = time.monotonic()
        for index, gpu in enumerate(self.gpus):
            gpu.uuid = gpu.uuid or f"GPU-{index:08x}-aaaa-bbbb-cccc-dddddddddddd"
            gpu.watts = [(now - 60, gpu.idle_watts)]
            gpu.since = (now - 60, gpu.since[1])
        self._write()

    def busy(self, share: float, gpu: int = 0) -> None:
        """From now on the GPU draws its idle power plus `share` (0..1) of what it can add."""
        this = self.gpus[gpu]
        self.watts(this.idle_watts + share * (this.busy_watts - this.idle_watts), gpu)

    def watts(self, watts: float, gpu: int = 0) -> None:
        self.gpus[gpu].watts.append((time.monotonic(), watts))
        self._write()

    def energy(self, began: float, ended: float, gpu: int = 0) -> float:
        """The joules that the GPU truly used between two monotonic times (seconds)."""
        points = [*self.gpus[gpu].watts, (float("inf"), 0.0)]
        spans = itertools.pairwise(points)
        return sum(watts * max(0.0, min(until, ended) - max(at, began)) for (at, watts), (until, _) in spans)

    def set(self, key: str, value: object, gpu: int = 0) -> None:
        """One of stub.c's settings: tick, average, noise, gain, delay, mig, mig_uuid, virtualization, name."""
        self.gpus[gpu].settings[key] = str(value)
        self._write()

    def fault(self, what: str, code: int, gpu: int = 0) -> None:
        """From now on NVML answers `code` to `what` (see stub.c; `any` for everything); 0 mends it."""
        self.gpus[gpu].faults[what] = code
        self._write()

    def processes(self, percent_by_pid: Mapping[int, int], gpu: int = 0) -> None:
        self.gpus[gpu].processes = dict(percent_by_pid)
        self._write()

    def stand_still(self, gpu: int = 0) -> None:
        self.set("stuck", repr(time.monotonic()), gpu)

    def move_again(self, gpu: int = 0) -> None:
        self.set("stuck", 0, gpu)

    def restart_counter(self, gpu: int = 0) -> None:
        """The counter begins at 0 again, as after a driver's reload."""
        self.gpus[gpu].since = (time.monotonic(), 0.0)
        self._write()

    def reload_driver(self) -> None:
        """All sessions and handles that were opened before are stale from now on."""
        self._library["reload"] = self._library.get("reload", 0) + 1
        self._write()

    def refuse_init(self, code: int) -> None:
        """nvmlInit answers `code` from now on; 0 mends it."""
        self._library["init"] = code
        self._write()

    def _write(self) -> None:
        lines = [f"nvml {key} {value}" for key, value in self._library.items()]
        lines += [f"{index} {line}" for index, gpu in enumerate(self.gpus) for line in gpu.lines()]
        replacement = self.control.with_suffix(".new")
        replacement.write_text("\n".join(lines) + "\n")
        os.replace(replacement, self.control)
