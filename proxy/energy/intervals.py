"""How far a share may lie from the truth. Checked by simulation: at least nine of ten true shares lie inside.

The meter is taken to be right; its own error stands apart. What is left:

- each window's energy differs from what its steps would explain, independently from window to window (noise of the
  reading, jitter of the tick): squares add up;
- the cost model divides a window a little wrongly, in the same way in every window: that adds up plainly, in so far as
  somebody else could have had the energy;
- nobody knows to the millisecond when the counter ticked: at the beginning and end of a request's work;
- while provisional: the open tail is predicted; and reports that were lost may have told anything.
"""

import math
from dataclasses import dataclass

#: From the mean size of a normal error to nine tenths of it: 1.645 standard deviations of 1.25 mean sizes each.
NINE_TENTHS = 1.645 * 1.25
#: The split is never believed more than this, and least of all from a model that has seen few windows.
_LEAST_SPLIT_ERROR, _SPLIT_ERRORS, _COLD_SPLIT_ERROR, _COLD_WINDOWS = 0.04, 1.5, 0.25, 10.0
_TAIL_ERROR = 0.1


@dataclass(frozen=True, slots=True)
class Doubts:
    """What may be wrong with one share, in microjoules (`noise` in their squares), and in nanoseconds."""

    active: float
    tail: float
    noise: float
    split: float
    lost: float
    lost_ratio: float
    work_length: int
    instant_error: float


def split_error(fit_error: float, windows: float) -> float:
    """The relative error of the cost model's split, from its error over seconds and how much it has seen."""
    return max(_LEAST_SPLIT_ERROR, _SPLIT_ERRORS * fit_error) + _COLD_SPLIT_ERROR / (1 + windows / _COLD_WINDOWS)


def interval(doubts: Doubts) -> tuple[int, int]:
    """Low and high around the share and its tail."""
    known = doubts.active
    edges = known * min(doubts.instant_error / max(doubts.work_length, 1), 1.0)
    half = NINE_TENTHS * math.sqrt(max(doubts.noise, 0.0) + edges**2) + doubts.split
    half += _TAIL_ERROR * doubts.tail + doubts.lost_ratio * known
    centre = known + doubts.tail
    return max(math.floor(centre - half), 0), math.ceil(centre + half + doubts.lost)
