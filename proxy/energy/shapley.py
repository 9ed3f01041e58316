"""The fair share of a batched step: the Shapley value of its cost, in closed form.

A participant's Shapley value is what it adds to the cost of those who came before it, averaged over all orders of
arrival. A constant falls to all in equal parts, what adds up falls to its owners. What is left is the roofline

    max(Σ compute, fixed + Σ memory) = fixed + Σ memory + max(Σ gain - fixed, 0),    gain = compute - memory

and of that the last term, the excess of compute over memory time. Let participants arrive at random: at time u of the
unit interval each is there with probability u. Many small ones together then gained u·G, nearly without chance; the few
large ones (prompts among decodes) are there or not, and all their combinations are enumerated. Each participant
adds, at the time it comes, its gain if those before it exceed `fixed` already, and less if they do not. In u these are
polynomials between the points where the excess begins, so that Gauss's rule integrates them exactly.
"""

from itertools import product

import numpy as np

from proxy.energy.pending import Floats, Ints

#: Up to so many participants of a step are taken one by one: those whose gain is such a part of all, or of `fixed`.
_LARGE = 3
_LARGE_PART = 0.15
#: Beyond so many times `fixed` a step's gains leave so little to chance that there is no need.
_MANY_FIXED = 10.0
#: Which of the large ones have come: (combinations, large ones).
_COME: Floats = np.array(list(product((0.0, 1.0), repeat=_LARGE)))
#: The chance that a large one has come by u, or not, by combination, is `_ABSENT + _SIGN · u`.
_ABSENT, _SIGN = 1 - _COME.T[:, :, None], 2 * _COME.T[:, :, None] - 1
#: Three nodes integrate polynomials up to the fifth degree.
_NODES, _WEIGHTS = (part / 2 for part in np.polynomial.legendre.leggauss(3))
_NODES = _NODES + 0.5


def roofline_shares(compute: Floats, memory: Floats, fixed: float, owner: Ints, count: Floats) -> Floats:
    """Each participant's part of `max(Σ compute, fixed + Σ memory)` of its step.

    `compute` and `memory` are per participant (seconds, or any one unit), `owner` says which step each belongs to (in
    rising order), and `count` how many participants each step has. The shares sum to the maximum; the tests tell how
    near each is to the exact value.
    """
    gain = compute - memory
    total = np.bincount(owner, weights=gain, minlength=len(count)).astype(np.float64)
    large = _large_ones(gain, fixed, owner, count, total)
    # Without large ones: the excess begins at u = fixed / G, and from then on each gain counts in full.
    counted = 1 - np.divide(fixed, total, out=np.ones(len(count)), where=total > fixed)
    added = gain * counted[owner]
    if len(large):
        _add_one_by_one(added, gain, fixed, owner, total, large)
    shares: Floats = (fixed / count)[owner] + memory + added
    return shares


def _large_ones(gain: Floats, fixed: float, owner: Ints, count: Floats, total: Floats) -> Ints:
    """The entries to be taken one by one, by step; none where they are too many, for equals share equally."""
    limit = np.where(count > 1, _LARGE_PART * np.maximum(total, fixed), np.inf)
    limit[total > _MANY_FIXED * fixed] = np.inf
    large = np.flatnonzero(gain > limit[owner])
    of_step = np.bincount(owner[large], minlength=len(count))
    return large[of_step[owner[large]] <= _LARGE]


def _add_one_by_one(added: Floats, gain: Floats, fixed: float, owner: Ints, total: Floats, large: Ints) -> None:
    """Overwrite, in the steps that have large participants, what each participant adds to the excess."""
    steps, row = np.unique(owner[large], return_inverse=True)
    place = np.arange(len(large)) - np.searchsorted(row, row)
    gains = np.zeros((len(steps), _LARGE))
    gains[row, place] = gain[large]
    small, each = _excess_shares(gains, total[steps] - gains.sum(axis=1), fixed)
    factor = np.full(len(total), np.nan)
    factor[steps] = small
    concerned = np.flatnonzero(~np.isnan(factor[owner]))
    added[concerned] = gain[concerned] * factor[owner[concerned]]
    added[large] = each[row, place]


def _excess_shares(gains: Floats, small_gain: Floats, fixed: float) -> tuple[Floats, Floats]:
    """What each step's small ones add, relative to their gain, and what each of its large ones adds."""
    had = gains @ _COME.T - fixed  # (steps, combinations): the excess that is reached without the small ones
    begin, end = _when_positive(had, small_gain[:, None])
    u = begin[..., None] + (end - begin)[..., None] * _NODES
    weight = (end - begin)[..., None] * _WEIGHTS
    excess = (u * small_gain[:, None, None] + had[..., None]) * weight
    first, second, third = (_ABSENT[k] + _SIGN[k] * u for k in range(_LARGE))
    pair = first * second
    small = (pair * third * weight).sum(axis=(1, 2))
    each = np.stack(
        [
            (excess * second * third * _SIGN[0]).sum(axis=(1, 2)),
            (excess * first * third * _SIGN[1]).sum(axis=(1, 2)),
            (excess * pair * _SIGN[2]).sum(axis=(1, 2)),
        ],
        axis=1,
    )
    return small, each


def _when_positive(had: Floats, slope: Floats) -> tuple[Floats, Floats]:
    """From when to when, within 0..1, `had + slope · u` is positive."""
    root = np.minimum(np.maximum(-had / np.where(slope == 0, -1e-300, slope), 0.0), 1.0)
    rising = slope > 0
    end = np.where(rising, 1.0, np.where(had > 0, root, 0.0))
    return np.where(rising, root, 0.0), end
