"""The fair share of a step, by definition: the Shapley value of E(S), found without any closed form.

A participant's share is what it adds to the energy of those who came before it, averaged over all orders of arrival.
Small steps are enumerated. In large ones orders are sampled, but not blindly: a step's few large participants (chunks
of prompts) decide on which side of the roofline it falls, so a plain sample of 100 orders leaves a request's truth
wrong by 2 %. Here only the many small ones are shuffled, and each shuffle is turned so that everyone stands at every
place; all ways of inserting the large ones are summed exactly. That leaves 0.03 %.
"""

from collections.abc import Callable
from functools import cache
from math import comb, lgamma
from typing import NamedTuple

import numpy as np

from bench.attribution.gpu import Floats, Ints

#: Energies of sets, from the sums of their members' work: shape (..., columns) to (...).
Energy = Callable[[Floats], Floats]

#: Up to here all 2^n sets are enumerated.
LARGEST_ENUMERATED = 10
#: At least so many; where large participants are inserted, each shuffle stands for thousands of permutations.
PERMUTATIONS = 100
#: At most so many participants are inserted exactly: those with over so many times the mean work, of any kind.
INSERTED, INSERTED_FROM = 2, 4.0


def shapley(work: Floats, energy: Energy, rng: np.random.Generator) -> Floats:
    """Joules of each participant: exact for small steps, from sampled permutations for large ones."""
    if len(work) <= LARGEST_ENUMERATED:
        return enumerated(work, energy)
    return sampled(work, energy, rng, PERMUTATIONS)


def enumerated(work: Floats, energy: Energy) -> Floats:
    """The exact value; 2^n evaluations of the energy."""
    members, weights = _subsets(len(work))
    return np.asarray(weights @ energy(members @ work))


def sampled(work: Floats, energy: Energy, rng: np.random.Generator, permutations: int) -> Floats:
    """An unbiased estimate from shuffles of the small participants, each with its reverse. Sums to E exactly."""
    large = _large(work)
    small = np.setdiff1d(np.arange(len(work)), large)
    orders = _orders(len(small), permutations >> len(large), rng)
    reached = energy(_arrivals(work[small], orders, _subsets(len(large))[0] @ work[large]))
    chances = _chances(len(small), len(large))
    shares = np.empty(len(work))
    shares[small] = _small_shares(reached, orders, chances)
    for place, participant in enumerate(large.tolist()):
        shares[participant] = _large_share(reached.mean(axis=0), place, chances)
    return shares


def _arrivals(small: Floats, orders: Ints, sets: Floats) -> Floats:
    """Sums of work by (shuffle, set of large ones, small ones before, column); columns lie apart, for speed."""
    sums = np.zeros((small.shape[1], len(orders), len(sets), len(small) + 1))
    np.cumsum(small.T[:, orders][:, :, None], axis=3, out=sums[..., 1:])
    sums += sets.T[:, None, :, None]
    return np.moveaxis(sums, 0, -1)


def _large(work: Floats) -> Ints:
    part = (work / np.maximum(work.sum(axis=0), 1e-300)).max(axis=1) * len(work)
    largest = np.argsort(-part)[:INSERTED]
    return np.asarray(largest[part[largest] > INSERTED_FROM])


def _orders(count: int, least: int, rng: np.random.Generator) -> Ints:
    """Shuffles, each turned to all places, so that everyone stands everywhere equally often; `least` or more orders."""
    turned = (np.arange(count) + np.arange(count)[:, None]) % count
    return np.concatenate([rng.permutation(count)[turned] for _ in range(-(-least // count))])


class _Chances(NamedTuple):
    """Of a set of large ones (rows) being just those who came before, given the place in the shuffle (columns).

    `small`: of the participant at that place. `large`: of a large one, jointly with the number of small ones before it.
    """

    small: Floats
    large: Floats


@cache
def _chances(small: int, large: int) -> _Chances:
    """Arrival times are uniform and independent: so the chances are Beta functions."""
    before_small = np.array([
        [_beta(j + 1 + k, small - j + large - k) - _beta(j + 1, small - j) for j in range(small)]
        for k in range(large + 1)
    ])  # fmt: skip
    choose = [lgamma(small + 1) - lgamma(j + 1) - lgamma(small - j + 1) for j in range(small + 1)]
    before_large = np.array([
        [choose[j] + _beta(j + k + 1, small - j + large - k) for j in range(small + 1)] for k in range(large)
    ]).reshape(large, small + 1)  # fmt: skip
    return _Chances(np.exp(before_small), np.exp(before_large))


def _beta(a: int, b: int) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)


def _small_shares(reached: Floats, orders: Ints, chances: _Chances) -> Floats:
    sets = reached.shape[1]
    added = np.einsum("psj,sj->pj", np.diff(reached, axis=2), chances.small[_sizes(sets)])
    shares = np.zeros_like(added)
    np.put_along_axis(shares, orders, added, axis=1)
    return np.asarray(shares.mean(axis=0))


def _large_share(reached: Floats, place: int, chances: _Chances) -> float:
    """`reached` is by (set of large ones, small ones before)."""
    sets = np.arange(len(reached))
    without = sets[(sets >> place) & 1 == 0]
    added = reached[without | (1 << place)] - reached[without]
    return float((added * chances.large[_sizes(len(reached))[without]]).sum())


@cache
def _sizes(sets: int) -> Ints:
    return np.array([mask.bit_count() for mask in range(sets)])


@cache
def _subsets(count: int) -> tuple[Floats, Floats]:
    """Membership (2^n, n), and the weights (n, 2^n) that turn the energies of all sets into Shapley values."""
    members = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    size = members.sum(axis=1)
    joining = np.array([1 / (count * comb(count - 1, s)) for s in range(count)] + [0.0])
    weights = np.where(members == 1, joining[size - 1][:, None], -joining[size][:, None])
    return members.astype(float), weights.T.copy()
