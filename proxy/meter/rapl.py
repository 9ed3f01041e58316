"""The host's energy from RAPL through Linux's powercap sysfs: CPU packages and DRAM (Intel, and AMD since Linux 5.8).

Counters are in microjoules, tick about every millisecond and wrap at `max_energy_range_uj` (after minutes to hours):
here a drop is not a new epoch, it is unwrapped. `psys` (the whole board) contains the packages; `core` and `uncore` are
parts of them; `intel-rapl-mmio` is a second view of the same counters. All of these are left out: nothing counts twice.
"""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from proxy.energy.quantities import Microjoules, Nanoseconds
from proxy.meter.base import FIRST_ORIGIN, MeterError, Reading, next_origin
from proxy.meter.estimate import cpu_name

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")

#: Studies put RAPL within a few percent of external meters on server parts since Haswell.
ACCURACY_RATIO = 0.05

#: No package draws more for long: in a pause shorter than range / this, a counter cannot wrap twice.
HIGHEST_WATTS = 1000

#: Two packages whose counters stand this close (1 J) are one counter seen through two dies (some AMD parts).
MIRROR_MICROJOULES = 1_000_000

_ZONE = re.compile(r"intel-rapl:\d+(:\d+)?$")  # not intel-rapl-mmio
_COUNTED = re.compile(r"(package-\d+(-die-\d+)?|dram)$")


def unwrapped_rise(before: int, after: int, span: int) -> int:
    """The rise of a counter that counts 0..span and starts over, if it wrapped at most once."""
    rise = after - before
    return rise if rise >= 0 else rise + span


@dataclass(slots=True)
class Zone:
    """One powercap zone: its counter's file (kept open: a read is then one system call) and how far it had counted."""

    name: str
    path: Path
    span: int
    file: int = -1
    last: int = 0

    def open(self) -> None:
        try:
            self.file = os.open(self.path / "energy_uj", os.O_RDONLY | os.O_CLOEXEC)
            self.last = self.count()
        except OSError as error:
            raise _meter_error(error, self.path / "energy_uj") from error

    def count(self) -> int:
        """The counter now; raises OSError."""
        text = os.pread(self.file, 32, 0)
        try:
            return int(text)
        except ValueError as error:
            raise OSError(errno.EIO, f"not a number: {text!r}") from error

    def rise_to(self, now: int) -> int:
        """Microjoules since the last call."""
        rise = unwrapped_rise(self.last, now, self.span)
        self.last = now
        return rise

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class RaplMeter:
    """The sum of the machine's package and DRAM counters below `root`; raises MeterError where none can be read."""

    device = "host"
    kind = "rapl"
    estimated = False
    accuracy_ratio: float | None = ACCURACY_RATIO

    def __init__(self, root: Path = POWERCAP, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._zones = _open_zones(root)
        self._clock = clock
        self._read_at = clock()
        self._total = self._origin = FIRST_ORIGIN
        self._longest_pause = Nanoseconds(min(zone.span for zone in self._zones) * 1000 // HIGHEST_WATTS)
        self.name = f"{cpu_name() or 'CPU'} ({'+'.join(zone.name for zone in self._zones)})"

    def read(self) -> Reading:
        now = self._clock()
        try:
            counts = [zone.count() for zone in self._zones]
        except OSError as error:
            raise _meter_error(error, self._zones[0].path.parent) from error
        rise = sum(zone.rise_to(count) for zone, count in zip(self._zones, counts, strict=True))
        if now - self._read_at > self._longest_pause:
            self._start_new_epoch(now - self._read_at)
        else:
            self._total = Microjoules(self._total + rise)
        self._read_at = now
        return Reading(self._total, None)

    def _start_new_epoch(self, pause: int) -> None:
        """Nobody knows how often the counters wrapped in so long a pause: say nothing of it, not too little."""
        log.warning("RAPL was not read for %.0f s, may have wrapped twice, and its count starts anew", pause / 1e9)
        self._total = self._origin = next_origin(self._origin)

    def close(self) -> None:
        for zone in self._zones:
            zone.close()


def _open_zones(root: Path) -> Sequence[Zone]:
    zones = list(_counted_zones(root))
    if not zones:
        raise MeterError(
            f"no RAPL package below {root} (virtual machines have none)",
            cure="on bare metal: modprobe intel_rapl_msr; in a container: mount the host's directory",
        )
    try:
        for zone in zones:
            zone.open()
    except MeterError:
        for zone in zones:
            zone.close()
        raise
    return _without_mirrors(zones)


def _counted_zones(root: Path) -> Iterator[Zone]:
    """Package and DRAM zones, each once, whether `root` lists all zones flat (/sys/class/powercap) or nested."""
    seen: set[str] = set()
    for path in sorted([*root.glob("intel-rapl*"), *root.glob("*/intel-rapl:*"), *root.glob("*/*/intel-rapl:*")]):
        if path.name in seen or not _ZONE.match(path.name):
            continue
        seen.add(path.name)
        try:
            name = (path / "name").read_text().strip()
            if _COUNTED.match(name):
                yield Zone(name, path, int((path / "max_energy_range_uj").read_text()))
        except (OSError, ValueError) as error:
            raise _meter_error(error, path) from error


def _without_mirrors(zones: Sequence[Zone]) -> Sequence[Zone]:
    kept: list[Zone] = []
    for zone in zones:
        twin = next((other for other in kept if _mirrors(zone, other)), None)
        if twin is None:
            kept.append(zone)
        else:
            log.info("RAPL: %s shows the counter of %s and is left out", zone.path.name, twin.path.name)
            zone.close()
    return kept


def _mirrors(zone: Zone, other: Zone) -> bool:
    packages = zone.name.startswith("package") and other.name.startswith("package")
    return packages and zone.last > 0 and abs(zone.last - other.last) <= MIRROR_MICROJOULES


def _meter_error(error: OSError | ValueError, path: Path) -> MeterError:
    if isinstance(error, PermissionError):
        return MeterError(
            f"RAPL may not be read ({path}: permission denied)",
            cure="sudo chmod -R a+r /sys/class/powercap/intel-rapl* (until the next boot; a udev rule makes it last), "
            "or run with CAP_DAC_READ_SEARCH",
        )
    return MeterError(f"RAPL could not be read ({path}: {error})", cure="see in dmesg why the kernel dropped it")
