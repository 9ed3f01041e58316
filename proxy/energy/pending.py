"""The steps on one device that no settled window has consumed yet, column-wise: a window costs no Python loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

#: The columns of `Steps.sums`.
PARTICIPANTS, TOKENS, ATTENTION, CONTEXT = range(4)

#: A step of one participant: backend, started, ended, repeat, slot, tokens, context. A plain tuple, for it is the
#: commonest thing there is where the relay observes requests one by one.
Alone = tuple[int, int, int, int, int, int, int]


class Batch(NamedTuple):
    """A step of several participants, column-wise."""

    backend: int
    started: int
    ended: int
    slots: Ints
    tokens: Floats
    contexts: Floats


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

    def reordered(self, order: Ints) -> "Steps":
        """The same steps in this order."""
        count = self.count.astype(np.int64)
        begin, counts = np.cumsum(count) - count, count[order]
        shift = begin[order] - (np.cumsum(counts) - counts)
        entries = shift.repeat(counts) + np.arange(len(self.owner))
        return Steps(
            self.backend[order], self.started[order], self.ended[order], self.repeat[order], self.sums[order],
            np.arange(len(order)).repeat(counts), self.slot[entries], self.tokens[entries], self.contexts[entries],
            self.attention[entries], self.predicted[entries],
        )  # fmt: skip

    def per_step(self, entries: Floats) -> Floats:
        """Sums of a per-entry column by step."""
        return np.bincount(self.owner, weights=entries, minlength=len(self)).astype(np.float64)


_NONE, _NOTHING = np.zeros(0, dtype=np.int64), np.zeros(0)
NO_STEPS = Steps(
    _NONE, _NONE, _NONE, _NOTHING, np.zeros((0, 4)), _NONE, _NONE, _NOTHING, _NOTHING, _NOTHING, _NOTHING
)  # fmt: skip


#: With so many participants pending, the steps that are nobody's are merged.
_MOST_ENTRIES = 200_000


class PendingSteps:
    """Keeps steps as they come, and turns them into arrays only when somebody looks."""

    def __init__(self) -> None:
        self.steps = NO_STEPS
        """All that have joined and were not dropped."""
        self._merge_at = _MOST_ENTRIES
        self._alone: list[Alone] = []
        self._alone_of: dict[int, list[Alone]] = {}
        self.batches: list[Batch] = []
        """Those that were not taken yet."""
        self._is_batch: list[bool] = []  # of all that were not taken yet, as they came

    def add_alone(self, step: Alone) -> None:
        self._alone.append(step)
        self._is_batch.append(False)
        slot = step[4]
        known = self._alone_of.get(slot)
        if known is None:
            self._alone_of[slot] = [step]
        else:
            known.append(step)

    def add_batch(self, step: Batch) -> None:
        self.batches.append(step)
        self._is_batch.append(True)

    def alone_of(self, slot: int) -> Sequence[Alone]:
        """The steps of this slot alone that were not taken yet."""
        return self._alone_of.get(slot, ())

    def take_new(self) -> Steps:
        """The steps added since the last call; `join` is to put them to the others."""
        new = _joined(_steps_alone(self._alone), _steps_in_batches(self.batches))
        if self._alone and self.batches:  # as they came: what is learnt must not depend on when somebody looked
            is_batch = np.array(self._is_batch)
            new = new.reordered(np.where(is_batch, len(self._alone) - 1 + is_batch.cumsum(), (~is_batch).cumsum() - 1))
        if len(new):
            self._alone, self._alone_of, self.batches, self._is_batch = [], {}, [], []
        return new

    def join(self, new: Steps) -> None:
        self.steps = _joined(self.steps, new)

    def drop_until(self, time: int) -> None:
        """Forget steps that ended by `time`."""
        self.steps = self.steps.where(self.steps.ended > time)

    def disown(self, gone: Bools, heir: int) -> None:
        """Give what is left of the work of the slots that are `gone` (by slot) to another account."""
        slot = self.steps.slot
        slot[gone[slot]] = heir
        if len(slot) > self._merge_at:
            self._merge(heir)
            self._merge_at = max(_MOST_ENTRIES, 2 * len(self.steps.slot))

    def _merge(self, heir: int) -> None:
        """Make one step for each backend of those that are the heir's alone.

        While a meter is silent no window consumes steps; what is kept must grow with the open requests, not with time.
        """
        steps = self.steps
        theirs = steps.per_step((steps.slot != heir).astype(np.float64)) == 0
        self.steps = _joined(_one_for_each_backend(steps.where(theirs), heir), steps.where(~theirs))


def _one_for_each_backend(steps: Steps, heir: int) -> Steps:
    """From the first start to the last end, of unknown work: priced by time, and nothing is learnt from it."""
    backends = np.unique(steps.backend)
    if not len(backends):
        return NO_STEPS
    started = [steps.started[steps.backend == backend].min() for backend in backends]
    ended = [steps.ended[steps.backend == backend].max() for backend in backends]
    ones, each = np.ones(len(backends)), np.arange(len(backends))
    slots, unknown = np.full(len(backends), heir, dtype=np.int64), np.zeros(len(backends))
    return _steps(backends, _ints(started), _ints(ended), ones, each, ones, slots, unknown, unknown)


def _steps_alone(steps: list[Alone]) -> Steps:
    if not steps:
        return NO_STEPS
    backend, started, ended, repeat, slot, tokens, contexts = np.array(steps, dtype=np.int64).T.copy()
    work = tokens.astype(np.float64), contexts.astype(np.float64)
    each = np.arange(len(steps))
    return _steps(backend, started, ended, repeat.astype(np.float64), each, np.ones(len(steps)), slot, *work)


def _steps_in_batches(batches: list[Batch]) -> Steps:
    if not batches:
        return NO_STEPS
    backend, started, ended, slots, tokens, contexts = zip(*batches, strict=True)
    count = np.array([len(each) for each in slots], dtype=np.int64)
    join = np.concatenate
    return _steps(
        _ints(backend), _ints(started), _ints(ended), np.ones(len(count)),
        np.arange(len(count)).repeat(count), count.astype(np.float64), join(slots), join(tokens), join(contexts),
    )  # fmt: skip


def _steps(
    backend: Ints, started: Ints, ended: Ints, repeat: Floats, owner: Ints, count: Floats,
    slot: Ints, tokens: Floats, contexts: Floats,
) -> Steps:  # fmt: skip
    attention = tokens * np.maximum(contexts - (tokens - 1) / 2, 0.0)
    sums = np.empty((len(count), 4))
    sums[:, PARTICIPANTS] = count
    for place, column in enumerate((tokens, attention, contexts), start=1):
        sums[:, place] = np.bincount(owner, weights=column)
    nothing = np.zeros(len(owner))
    return Steps(backend, started, ended, repeat, sums, owner, slot, tokens, contexts, attention, nothing)


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _joined(first: Steps, second: Steps) -> Steps:
    if not len(first):
        return second
    if not len(second):
        return first
    join = np.concatenate
    return Steps(
        join((first.backend, second.backend)), join((first.started, second.started)),
        join((first.ended, second.ended)), join((first.repeat, second.repeat)), join((first.sums, second.sums)),
        join((first.owner, second.owner + len(first))), join((first.slot, second.slot)),
        join((first.tokens, second.tokens)), join((first.contexts, second.contexts)),
        join((first.attention, second.attention)), join((first.predicted, second.predicted)),
    )  # fmt: skip
