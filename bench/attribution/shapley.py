"""The fair share of a step, by definition: the Shapley value of E(S), found without any closed form.

A participant's share is what it adds to the energy of those who came before it, averaged over all orders of arrival.
"""

from collections.abc import Callable
from functools import cache
from math import comb

import numpy as np

from bench.attribution.gpu import Floats, Ints

#: Energies of sets, from the sums of their members' work: shape (..., columns) to (...).
Energy = Callable[[Floats], Floats]

#: Up to here all 2^n sets are enumerated.
LARGEST_ENUMERATED = 10
PERMUTATIONS = 100


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
    """The mean over random orders, each with its reverse (which halves most of the variance). Sums to E exactly."""
    orders = _orders(len(work), permutations, rng)
    reached = energy(np.cumsum(work[orders], axis=1))
    added = np.diff(reached, axis=1, prepend=0.0)
    shares = np.zeros_like(added)
    np.put_along_axis(shares, orders, added, axis=1)
    return np.asarray(shares.mean(axis=0))


def _orders(count: int, permutations: int, rng: np.random.Generator) -> Ints:
    half = rng.random((permutations // 2, count)).argsort(axis=1)
    return np.concatenate([half, half[:, ::-1]])


@cache
def _subsets(count: int) -> tuple[Floats, Floats]:
    """Membership (2^n, n), and the weights (n, 2^n) that turn the energies of all sets into Shapley values."""
    members = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
    size = members.sum(axis=1)
    joining = np.array([1 / (count * comb(count - 1, s)) for s in range(count)] + [0.0])
    weights = np.where(members == 1, joining[size - 1][:, None], -joining[size][:, None])
    return members.astype(float), weights.T.copy()
