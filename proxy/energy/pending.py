"""The steps on one device that no settled window has consumed yet, column-wise: a window costs no Python loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from proxy.energy.events import Step

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: The columns of `Steps.sums`.
PARTICIPANTS, TOKENS, ATTENTION, CONTEXT = range(4)


class Alone(NamedTuple):
    """A step with one participant."""

    backend: int
    started: int
    ended: int
    repeat: float
    tokens: float
    context: float


class New(NamedTuple):
    """What steps not looked at yet say of one slot: `alone` has its steps if all of these have one participant.

    `first_start`, `last_end` and `batch`, the mean number of participants, are of all such steps, of whomever.
    """

    first_start: int
    last_end: int
    tokens: list[int]
    batch: float
    alone: list[Alone] | None


@dataclass(frozen=True, slots=True)
class Steps:
    """Some steps and their participants ("entries"). Entry `e` belongs to step `owner[e]`; times are nanoseconds.

    `repeat` is 1, but for groups of tokens that the relay saw go by one after the other: those stand for as many steps
    of one token. An entry's `attention` is what its tokens attend to in all: of a causal chunk, the early tokens see
    less context than the last one. `sums` has, by step, the number
    of participants and the sums of their tokens, attention and context.
    """

    backend: Ints
    started: Ints
    ended: Ints
    repeat: Floats
    sums: Floats
    owner: Ints
    slot: Ints
    tokens: Floats
    contexts: Floats
    attention: Floats
    predicted: Floats  # microjoules, as the cost model prices the entry

    def __len__(self) -> int:
        return len(self.backend)

    @property
    def count(self) -> Floats:
        """Participants of each step."""
        return self.sums[:, PARTICIPANTS]

    @property
    def lengths(self) -> Floats:
        """Nanoseconds of each step."""
        return (self.ended - self.started).astype(np.float64)

    def overlap(self, start: int, end: int) -> Ints:
        """Nanoseconds that each step spent between `start` and `end`."""
        overlap: Ints = np.maximum(np.minimum(self.ended, end) - np.maximum(self.started, start), 0)
        return overlap

    def where(self, chosen: Bools) -> "Steps":
        """Only the chosen steps, with their entries. A view, where they follow one another."""
        places = np.flatnonzero(chosen)
        if len(places) == len(self):
            return self
        if not len(places):
            return NO_STEPS
        first, last = int(places[0]), int(places[-1])
        return self._run(first, last + 1) if last - first + 1 == len(places) else self._picked(chosen)

    def _run(self, first: int, end: int) -> "Steps":
        begin, finish = self.owner.searchsorted((first, end)).tolist()
        steps, entries = slice(first, end), slice(begin, finish)
        return Steps(
            self.backend[steps], self.started[steps], self.ended[steps], self.repeat[steps], self.sums[steps],
            self.owner[entries] - first, self.slot[entries], self.tokens[entries], self.contexts[entries],
            self.attention[entries], self.predicted[entries],
        )  # fmt: skip

    def _picked(self, steps: Bools) -> "Steps":
        entries = steps[self.owner]
        renumbered = np.cumsum(steps) - 1
        return Steps(
            self.backend[steps], self.started[steps], self.ended[steps], self.repeat[steps], self.sums[steps],
            renumbered[self.owner[entries]], self.slot[entries], self.tokens[entries], self.contexts[entries],
            self.attention[entries], self.predicted[entries],
        )  # fmt: skip

    def per_step(self, entries: Floats) -> Floats:
        """Sums of a per-entry column by step."""
        return np.bincount(self.owner, weights=entries, minlength=len(self)).astype(np.float64)


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)


_NONE, _NOTHING = _ints([]), np.zeros(0)
NO_STEPS = Steps(
    _NONE, _NONE, _NONE, _NOTHING, np.zeros((0, 4)), _NONE, _NONE, _NOTHING, _NOTHING, _NOTHING, _NOTHING
)  # fmt: skip


class PendingSteps:
    """Appends cheaply to lists; turns them into arrays only when somebody looks."""

    def __init__(self) -> None:
        self.steps = NO_STEPS
        """All that have joined and were not dropped."""
        self._clear()

    def _clear(self) -> None:
        self._backend: list[int] = []
        self._started: list[int] = []
        self._ended: list[int] = []
        self._repeat: list[int] = []
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
        repeat, tokens, contexts = _unrolled(step)
        self._repeat.append(repeat)
        self._tokens.extend(tokens)
        self._contexts.extend(contexts)

    def has_new(self, slot: int) -> bool:
        """Whether a step that was not taken yet names this slot."""
        return slot in self._slot

    def new_of(self, slot: int) -> New | None:
        """This slot's part of the steps that were not taken yet; None for none."""
        count = self._slot.count(slot)
        if not count:
            return None
        places, place = list[int](), -1
        for _ in range(count):
            place = self._slot.index(slot, place + 1)
            places.append(place)
        tokens = [self._tokens[place] for place in places]
        first, last = min(self._started), max(self._ended)
        batch = len(self._slot) / len(self._count)
        if batch > 1:
            return New(first, last, tokens, batch, None)
        columns = self._backend, self._started, self._ended, self._repeat, self._tokens, self._contexts
        return New(first, last, tokens, batch, [Alone(*(column[place] for column in columns)) for place in places])

    def take_new(self) -> Steps:
        """The steps added since the last call; `join` is to put them to the others."""
        if not self._backend:
            return NO_STEPS
        tokens, contexts = np.array(self._tokens, dtype=np.float64), np.array(self._contexts, dtype=np.float64)
        owner = np.repeat(np.arange(len(self._count)), self._count)
        attention = tokens * np.maximum(contexts - (tokens - 1) / 2, 0.0)
        sums = np.empty((len(self._count), 4))
        sums[:, PARTICIPANTS] = self._count
        for place, column in enumerate((tokens, attention, contexts), start=1):
            sums[:, place] = np.bincount(owner, weights=column)
        new = Steps(
            _ints(self._backend), _ints(self._started), _ints(self._ended),
            np.array(self._repeat, dtype=np.float64), sums,
            owner, _ints(self._slot), tokens, contexts, attention, np.zeros(len(owner)),
        )  # fmt: skip
        self._clear()
        return new

    def join(self, new: Steps) -> None:
        self.steps = _joined(self.steps, new)

    def drop_until(self, time: int) -> None:
        """Forget steps that ended by `time`."""
        self.steps = self.steps.where(self.steps.ended > time)

    def disown(self, slot: int, heir: int) -> None:
        """Give what is left of a request's work to another account."""
        self.steps.slot[self.steps.slot == slot] = heir
        if slot in self._slot:
            self._slot = [heir if each == slot else each for each in self._slot]


def _unrolled(step: Step) -> tuple[int, Sequence[int], Sequence[int]]:
    """Repetitions, tokens and contexts. What a relay saw of a request beyond its prompt was computed token by token."""
    if step.source == "relay" and len(step.tokens) == 1 and 1 < step.tokens[0] < step.contexts[0]:
        tokens = step.tokens[0]
        return tokens, (1,), (step.contexts[0] - tokens // 2,)
    return 1, step.tokens or (0,), step.contexts or (0,)


def _joined(first: Steps, second: Steps) -> Steps:
    if not len(first):
        return second
    join = np.concatenate
    return Steps(
        join((first.backend, second.backend)), join((first.started, second.started)),
        join((first.ended, second.ended)), join((first.repeat, second.repeat)), join((first.sums, second.sums)),
        join((first.owner, second.owner + len(first))), join((first.slot, second.slot)),
        join((first.tokens, second.tokens)), join((first.contexts, second.contexts)),
        join((first.attention, second.attention)), join((first.predicted, second.predicted)),
    )  # fmt: skip
