"""The steps on one device that no settled window has consumed yet, column-wise: a window costs no Python loop."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from proxy.energy.events import Step

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Steps:
    """Some steps and their participants ("entries"). Entry `e` belongs to step `owner[e]`; times are nanoseconds."""

    backend: Ints
    started: Ints
    ended: Ints
    count: Ints
    owner: Ints
    slot: Ints
    tokens: Floats
    contexts: Floats
    predicted: Floats  # microjoules, as the cost model priced the entry when it came in

    def __len__(self) -> int:
        return len(self.backend)

    def overlap(self, start: int, end: int) -> Ints:
        """Nanoseconds that each step spent between `start` and `end`."""
        overlap: Ints = np.maximum(np.minimum(self.ended, end) - np.maximum(self.started, start), 0)
        return overlap

    def where(self, chosen: npt.NDArray[np.bool_]) -> "Steps":
        """Only the chosen steps, with their entries."""
        if chosen.all():
            return self
        entries = chosen[self.owner]
        renumbered = np.cumsum(chosen) - 1
        return Steps(
            self.backend[chosen], self.started[chosen], self.ended[chosen], self.count[chosen],
            renumbered[self.owner[entries]], self.slot[entries], self.tokens[entries], self.contexts[entries],
            self.predicted[entries],
        )  # fmt: skip

    def per_step(self, entries: Floats) -> Floats:
        """Sums of a per-entry column by step."""
        return np.bincount(self.owner, weights=entries, minlength=len(self)).astype(np.float64)


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)


_NONE, _NOTHING = _ints([]), np.zeros(0)
NO_STEPS = Steps(_NONE, _NONE, _NONE, _NONE, _NONE, _NONE, _NOTHING, _NOTHING, _NOTHING)


class PendingSteps:
    """Appends cheaply to lists; turns them into arrays only when somebody looks."""

    def __init__(self) -> None:
        self._steps = NO_STEPS
        self._clear()

    def _clear(self) -> None:
        self._backend: list[int] = []
        self._started: list[int] = []
        self._ended: list[int] = []
        self._count: list[int] = []
        self._slot: list[int] = []
        self._tokens: list[int] = []
        self._contexts: list[int] = []

    def add(self, backend: int, step: Step, slots: list[int]) -> None:
        """`slots` stand for the step's requests; a step without participants has one whose work is unknown."""
        self._backend.append(backend)
        self._started.append(step.started)
        self._ended.append(max(step.ended, step.started + 1))
        self._count.append(len(slots))
        self._slot.extend(slots)
        self._tokens.extend(step.tokens or (0,))
        self._contexts.extend(step.contexts or (0,))

    def take_new(self) -> Steps:
        """The steps added since the last call; `join` is to put them to the others."""
        if not self._backend:
            return NO_STEPS
        count = _ints(self._count)
        new = Steps(
            _ints(self._backend), _ints(self._started), _ints(self._ended), count,
            np.repeat(np.arange(len(count)), count), _ints(self._slot),
            np.array(self._tokens, dtype=np.float64), np.array(self._contexts, dtype=np.float64),
            np.zeros(len(self._slot)),
        )  # fmt: skip
        self._clear()
        return new

    def join(self, new: Steps) -> None:
        self._steps = _joined(self._steps, new)

    @property
    def steps(self) -> Steps:
        """All that have joined and were not dropped."""
        return self._steps

    def drop_until(self, time: int) -> None:
        """Forget steps that ended by `time`."""
        self._steps = self._steps.where(self._steps.ended > time)

    def disown(self, slot: int, heir: int) -> None:
        """Give what is left of a request's work to another account."""
        self._steps.slot[self._steps.slot == slot] = heir
        self._slot = [heir if each == slot else each for each in self._slot]


def _joined(first: Steps, second: Steps) -> Steps:
    if not len(first):
        return second
    join = np.concatenate
    return Steps(
        join((first.backend, second.backend)), join((first.started, second.started)),
        join((first.ended, second.ended)), join((first.count, second.count)),
        join((first.owner, second.owner + len(first))), join((first.slot, second.slot)),
        join((first.tokens, second.tokens)), join((first.contexts, second.contexts)), join((first.predicted, second.predicted)),
    )  # fmt: skip
