"""The closed form of a step's fair shares against the definition: enumeration, and many sampled orders."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.energy.pending import Floats
from proxy.energy.shapley import roofline_shares


def roofline(compute: Floats, memory: Floats, fixed: float) -> float:
    return max(float(compute.sum()), fixed + float(memory.sum())) if len(compute) else 0.0


def closed_form(compute: Floats, memory: Floats, fixed: float) -> Floats:
    owner = np.zeros(len(compute), dtype=np.int64)
    return roofline_shares(compute, memory, fixed, owner, np.array([float(len(compute))]))


def over_orders(compute: Floats, memory: Floats, fixed: float, orders: list[tuple[int, ...]]) -> Floats:
    """What each adds to those before it, in the mean over the orders."""
    shares = np.zeros(len(compute))
    for order in orders:
        compute_before, memory_before = np.cumsum(compute[list(order)]), fixed + np.cumsum(memory[list(order)])
        shares[list(order)] += np.diff(np.maximum(compute_before, memory_before), prepend=0.0)
    return shares / len(orders)


times = st.floats(0.0, 50.0)


@given(st.lists(st.tuples(times, times), min_size=1, max_size=40), st.floats(0.001, 100.0))
def test_shares_sum_to_the_step_and_none_is_negative(work: list[tuple[float, float]], fixed: float) -> None:
    compute, memory = np.array(work).T
    shares = closed_form(compute, memory, fixed)
    assert shares.sum() == pytest.approx(roofline(compute, memory, fixed))
    assert (shares >= 0).all()


@given(st.lists(times, min_size=1, max_size=6), st.floats(0.001, 100.0))
def test_exact_where_memory_always_bounds(memory: list[float], fixed: float) -> None:
    held = np.array(memory)
    exact = over_orders(np.zeros(len(held)), held, fixed, list(permutations(range(len(held)))))
    assert closed_form(np.zeros(len(held)), held, fixed) == pytest.approx(exact)


@given(st.integers(1, 6), st.floats(0.01, 10), st.floats(0, 10), st.floats(0.01, 100))
def test_exact_for_equals(count: int, compute: float, memory: float, fixed: float) -> None:
    shares = closed_form(np.full(count, compute), np.full(count, memory), fixed)
    assert shares == pytest.approx(np.full(count, shares.mean()))


def test_close_to_enumeration_in_small_steps() -> None:
    """Decodes with one prompt among them, in units of the time it takes to read the weights."""
    rng = np.random.default_rng(1)
    errors = []
    for _ in range(60):
        n = int(rng.integers(2, 8))
        tokens = np.where(np.arange(n) == 0, rng.integers(1, 600), 1)
        compute, memory = tokens / 220, rng.uniform(0, 0.02, n)
        exact = over_orders(compute, memory, 1.0, list(permutations(range(n))))
        errors.append(np.abs(closed_form(compute, memory, 1.0) / exact - 1).mean())
    assert float(np.mean(errors)) < 0.02


@pytest.mark.parametrize("prompts", [0, 1, 4, 16])
def test_close_to_sampled_orders_in_large_steps(prompts: int) -> None:
    rng = np.random.default_rng(2)
    n = 120
    tokens = np.where(np.arange(n) < prompts, rng.integers(50, 500, n), 1)
    compute, memory = tokens / 220, rng.uniform(0, 0.02, n)
    # All rotations of each order: everybody comes first equally often.
    orders = [tuple(np.roll(order, turn)) for order in (rng.permutation(n) for _ in range(25)) for turn in range(n)]
    exact = over_orders(compute, memory, 1.0, orders)
    assert np.abs(closed_form(compute, memory, 1.0) / exact - 1).mean() < 0.05


def test_each_step_is_divided_alone() -> None:
    compute, memory = np.array([3.0, 1.0, 5.0]), np.array([0.5, 0.5, 0.1])
    together = roofline_shares(compute, memory, 1.0, np.array([0, 0, 1]), np.array([2.0, 1.0]))
    assert together == pytest.approx(
        [*closed_form(compute[:2], memory[:2], 1.0), *closed_form(compute[2:], memory[2:], 1.0)]
    )
