"""What each open request has got of one device so far, by slot."""

import numpy as np

from proxy.energy.registry import FOREVER, NEVER, grown


class Tallies:
    """Columns by slot. Energies are microjoules; only `active` is exact, the others describe it.

    `idle_part`: its equal part of the idle power while its steps ran. `meanwhile`: all the device used while it was
    open. `split`: how much of it the cost model may have given wrongly; `noise`: the sum of squares of what windows do not
    explain. `awaited`: predicted for work that no settled window has consumed. `lost`: predicted for work that
    came too late. `first_start`, `last_end`: of its steps on this device.
    """

    FLOATS = ("idle_part", "meanwhile", "split", "noise", "awaited", "lost")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.active = np.zeros(capacity, dtype=np.int64)
        self.first_start = np.full(capacity, FOREVER, dtype=np.int64)
        self.last_end = np.full(capacity, NEVER, dtype=np.int64)
        self.idle_part, self.meanwhile, self.split, self.noise, self.awaited, self.lost = np.zeros((6, capacity))

    def grow(self, capacity: int) -> None:
        if capacity <= self.capacity:
            return
        self.active = grown(self.active, capacity, 0)
        self.first_start = grown(self.first_start, capacity, FOREVER)
        self.last_end = grown(self.last_end, capacity, NEVER)
        for name in self.FLOATS:
            column = np.zeros(capacity)
            column[: self.capacity] = getattr(self, name)
            setattr(self, name, column)
        self.capacity = capacity

    def clear(self, slot: int) -> None:
        self.active[slot], self.first_start[slot], self.last_end[slot] = 0, FOREVER, NEVER
        for name in self.FLOATS:
            getattr(self, name)[slot] = 0.0

    def touched(self, slot: int) -> bool:
        """Whether the request had a step on this device."""
        return bool(self.last_end[slot] > NEVER)
