"""What each open request has got of one device so far, by slot."""

from typing import NamedTuple

import numpy as np

from proxy.energy.pending import Floats, Ints
from proxy.energy.registry import FOREVER, NEVER, grown


class Row(NamedTuple):
    """One row of the columns below."""

    active: int
    first_start: int
    last_end: int
    idle_part: float
    meanwhile: float
    split: float
    noise: float
    awaited: float
    lost: float


class Rows(NamedTuple):
    """Some rows of the columns below, column-wise."""

    active: Ints
    first_start: Ints
    last_end: Ints
    idle_part: Floats
    meanwhile: Floats
    split: Floats
    noise: Floats
    awaited: Floats
    lost: Floats


class Tallies:
    """Columns by slot. Energies are microjoules; only `active` is exact, the others describe it.

    `idle_part`: its equal part of the idle power while its steps ran. `meanwhile`: all the device used while it was
    open. `split`: how much of it the cost model may have given wrongly; `noise`: the sum of squares of what windows do
    not explain. `awaited`: predicted for work that no settled window has consumed. `lost`: predicted for work that
    came too late. `last_price`, `last_tokens`: of its latest step. `first_start`, `last_end`: of its steps here.
    """

    FLOATS = ("idle_part", "meanwhile", "split", "noise", "awaited", "lost", "last_price", "last_tokens")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.active = np.zeros(capacity, dtype=np.int64)
        self.first_start = np.full(capacity, FOREVER, dtype=np.int64)
        self.last_end = np.full(capacity, NEVER, dtype=np.int64)
        self._name(np.zeros((len(self.FLOATS), capacity)))

    def _name(self, floats: Floats) -> None:
        self._floats = floats
        self.idle_part, self.meanwhile, self.split, self.noise, self.awaited, self.lost = floats[:6]
        self.last_price, self.last_tokens = floats[6:]

    def grow(self, capacity: int) -> None:
        self.active = grown(self.active, capacity, 0)
        self.first_start = grown(self.first_start, capacity, FOREVER)
        self.last_end = grown(self.last_end, capacity, NEVER)
        longer = np.zeros((len(self.FLOATS), capacity))
        longer[:, : self.capacity] = self._floats
        self._name(longer)
        self.capacity = capacity

    def clear(self, slots: Ints) -> None:
        self.active[slots], self.first_start[slots], self.last_end[slots] = 0, FOREVER, NEVER
        self._floats[:, slots] = 0.0

    def row(self, slot: int) -> Row:
        """One request's figures."""
        floats = self._floats[: len(Row._fields) - 3, slot].tolist()
        return Row(int(self.active[slot]), int(self.first_start[slot]), int(self.last_end[slot]), *floats)

    def rows(self, slots: Ints) -> Rows:
        """These requests' figures."""
        floats = self._floats[: len(Rows._fields) - 3, slots]
        return Rows(self.active[slots], self.first_start[slots], self.last_end[slots], *floats)

    def touched(self, slot: int) -> bool:
        """Whether the request had a step on this device."""
        return bool(self.last_end[slot] > NEVER)
