"""Whose CPU time it was: ours by backend, or other processes', from /proc.

A backend's time is that of its whole process tree, children that came and went included (Linux adds a child's time to
its parent when the parent waits for it). The proxy is the parent of its backends, so its own children's time is left
out of its own: a backend that ends would otherwise be counted to the proxy at once.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: The name under which the proxy's own processes stand among the backends.
PROXY = "proxy"

#: The whole process table is read again after this many times what reading it took: at most 0.2 % of a core.
WALK_PAUSE_FACTOR = 500
SHORTEST_WALK_PAUSE = 1.0  # seconds


@dataclass(frozen=True, slots=True)
class HostShares:
    """Parts (0..1) of the host's busy CPU time: they sum to 1, or are all 0 where nothing ran."""

    foreign: float
    backends: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Process:
    parent: int
    own: int  # user + system, in clock ticks
    with_children: int  # and of its children that ended and were waited for


class ProcessTable:
    """The processes of our backends, by backend, and their CPU time. One thread at a time."""

    def __init__(self, proc: Path = Path("/proc"), clock: Callable[[], float] = time.monotonic) -> None:
        self._proc = str(proc)
        self._clock = clock
        self._backend_of: dict[int, str] = {}
        self._roots: dict[int, str] = {}
        self._walk_again_at = float("-inf")
        self._times_before: dict[str, int] = {}
        self._busy_before: int | None = None

    def refresh(self, our_pids: Mapping[str, Collection[int]]) -> None:
        """Find the trees below `our_pids` again, if they changed or that is due."""
        roots = {pid: name for name, pids in our_pids.items() for pid in pids}
        began = self._clock()
        if roots == self._roots and began < self._walk_again_at:
            return
        self._roots = roots
        self._backend_of = _trees(self._all_processes(), roots)
        now = self._clock()
        self._walk_again_at = now + max(SHORTEST_WALK_PAUSE, WALK_PAUSE_FACTOR * (now - began))

    @property
    def pids(self) -> Collection[int]:
        """All of ours."""
        return self._backend_of.keys()

    def shares(self) -> HostShares | None:
        """Since the previous call; None at the first, and where /proc cannot be read."""
        busy = self._busy_ticks()
        times = self._backend_ticks()
        before, self._busy_before = self._busy_before, busy
        used = {name: max(0, ticks - self._times_before.get(name, ticks)) for name, ticks in times.items()}
        self._times_before = times
        if before is None or busy is None:
            return None
        whole = max(busy - before, sum(used.values()))
        if whole <= 0:
            return HostShares(0.0, dict.fromkeys(used, 0.0))
        return HostShares((whole - sum(used.values())) / whole, {name: ticks / whole for name, ticks in used.items()})

    def _backend_ticks(self) -> dict[str, int]:
        totals: dict[str, int] = dict.fromkeys(self._roots.values(), 0)
        for pid, name in self._backend_of.items():
            process = self._process(pid)
            if process is not None:
                totals[name] += process.own if name == PROXY else process.with_children
        return totals

    def _busy_ticks(self) -> int | None:
        """User, nice, system and interrupt time of all CPUs: not idle, not waiting, not stolen by a hypervisor."""
        try:
            with open(f"{self._proc}/stat", "rb") as file:
                user, nice, system, _idle, _iowait, irq, softirq = map(int, file.readline().split()[1:8])
        except (OSError, ValueError):
            return None
        return user + nice + system + irq + softirq

    def _all_processes(self) -> dict[int, _Process]:
        try:
            pids = [int(name) for name in os.listdir(self._proc) if name.isdigit()]
        except OSError:
            return {}
        return {pid: process for pid in pids if (process := self._process(pid)) is not None}

    def _process(self, pid: int) -> _Process | None:
        """None for one that has just ended."""
        try:
            with open(f"{self._proc}/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()  # a command may hold spaces and brackets
            own = int(fields[11]) + int(fields[12])
            return _Process(int(fields[1]), own, own + int(fields[13]) + int(fields[14]))
        except (OSError, ValueError, IndexError):
            return None


def _trees(processes: Mapping[int, _Process], roots: Mapping[int, str]) -> dict[int, str]:
    """By process, the backend of its nearest ancestor (or itself) among the roots; others are left out."""
    found: dict[int, str | None] = {pid: name for pid, name in roots.items() if pid in processes}
    for pid in processes:
        path = []
        ancestor = pid
        while ancestor in processes and ancestor not in found:
            path.append(ancestor)
            ancestor = processes[ancestor].parent
        found.update(dict.fromkeys(path, found.get(ancestor)))
    return {pid: name for pid, name in found.items() if name is not None}
