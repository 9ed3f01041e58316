"""How far a share may lie from the truth. Checked by simulation: at least nine of ten true shares lie inside.

The meter is taken to be right; its own error stands apart. What is left:

- each window's energy differs from what its steps would explain, independently from window to window (noise of the
  reading, jitter of the tick): squares add up;
- the cost model divides a window a little wrongly, in the same way in every window: that adds up plainly, in so far as
  somebody else could have had the energy;
- nobody knows to the millisecond when the counter ticked: at the beginning and end of a request's work;
- while provisional: the open tail is predicted; and reports that were lost may have told anything.
"""

from typing import Generic, NamedTuple, TypeVar

from proxy.energy.pending import Floats

#: From the mean size of a normal error to nine tenths of it: 1.645 standard deviations of 1.25 mean sizes each.
NINE_TENTHS = 1.645 * 1.25
#: The split is never believed more than this, and least of all from a model that has seen few windows.
_LEAST_SPLIT_ERROR, _SPLIT_ERRORS, _COLD_SPLIT_ERROR, _COLD_WINDOWS = 0.04, 1.5, 0.25, 10.0
#: A prediction is never believed more than this, and least of all one of a model that has seen few windows.
_TAIL_ERROR, _COLD_TAIL_ERROR, _COLD_TAIL_WINDOWS, _MOST_TAIL_ERROR = 0.1, 0.9, 5.0, 0.8


class Tail(NamedTuple):
    """Microjoules predicted for what no settled window has measured, and by how much it may be less or more."""

    energy: float
    below: float
    above: float

    def plus(self, other: "Tail") -> "Tail":
        return Tail(self.energy + other.energy, self.below + other.below, self.above + other.above)


NO_TAIL = Tail(0.0, 0.0, 0.0)


#: One share's figure, or an array of several shares'.
Amount = TypeVar("Amount", float, Floats)


class Doubts(NamedTuple, Generic[Amount]):
    """What may be wrong with shares, in microjoules (`noise` in their squares).

    `edges` is the part of a share that the uncertain instants at its two ends may move.
    """

    active: Amount
    noise: Amount
    split: Amount
    lost: Amount
    lost_ratio: Amount
    edges: Amount


def split_error(fit_error: float, windows: float) -> float:
    """The relative error of the cost model's split, from its error over seconds and how much it has seen."""
    return max(_LEAST_SPLIT_ERROR, _SPLIT_ERRORS * fit_error) + _COLD_SPLIT_ERROR / (1 + windows / _COLD_WINDOWS)


def tail_error(window_error: float, doubt: float, windows: float) -> float:
    """The relative error of what is predicted and not measured yet.

    `window_error` is how far windows are from their predictions, `doubt` (relative) how far off the model was to begin
    with, and `windows` how many it has learnt from.
    """
    cold = min(_COLD_TAIL_ERROR, 2 * doubt) / (1 + windows / _COLD_TAIL_WINDOWS)
    return min(_TAIL_ERROR + NINE_TENTHS * window_error + cold, _MOST_TAIL_ERROR)


def tail_of(energy: float, error: float) -> Tail:
    """A prediction that may be wrong by a factor of 1 - error, in either direction."""
    return Tail(energy, error * energy, error / (1 - error) * energy)


def interval(doubts: Doubts[Amount], tail: Tail) -> tuple[Amount, Amount]:
    """Low (it may be below 0) and high around a share and its tail; or around many."""
    known = doubts.active
    half = NINE_TENTHS * (doubts.noise + (known * doubts.edges) ** 2) ** 0.5 + doubts.split + doubts.lost_ratio * known
    centre = known + tail.energy
    return centre - half - tail.below, centre + half + tail.above + doubts.lost
