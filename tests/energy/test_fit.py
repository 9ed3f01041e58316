"""Online non-negative least squares: right, forgetting, and not to be poisoned."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from proxy.energy.fit import OnlineFit, non_negative
from proxy.energy.pending import Floats

TRUTH = np.array([2.0, 0.5, 0.0, 3.0])


def rows(count: int, seed: int, truth: Floats = TRUTH, noise: float = 0.02) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    features = rng.uniform(0.1, 2.0, (count, len(truth)))
    observed = features @ truth * rng.normal(1.0, noise, count)
    return features, observed, 0.04 * observed


def fitted(*batches: tuple[Floats, Floats, Floats], horizon: float = 1e6) -> OnlineFit:
    fit = OnlineFit(np.ones(len(TRUTH)), np.full(len(TRUTH), 10.0), horizon)
    for batch in batches:
        for i in range(0, len(batch[0]), 10):
            fit.add(*(column[i : i + 10] for column in batch))
            fit.solve()
    return fit


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_the_same_as_scipys(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    features, observed = rng.normal(size=(size + 5, size)), rng.normal(size=size + 5)
    expected, _ = nnls(features, observed)
    assert non_negative(features.T @ features, features.T @ observed) == pytest.approx(expected, abs=1e-6)


def test_finds_the_coefficients_and_never_goes_below_zero() -> None:
    fit = fitted(rows(500, 1))
    assert fit.coefficients == pytest.approx(TRUTH, abs=0.1)
    assert (fit.coefficients >= 0).all()


def test_outliers_do_not_poison_it() -> None:
    features, observed, sigma = rows(600, 2)
    rng = np.random.default_rng(3)
    bad = (rng.random(600) < 0.1) & (np.arange(600) > 60)
    fit = fitted((features, np.where(bad, observed * 5, observed), sigma))
    assert features @ fit.coefficients == pytest.approx(features @ TRUTH, rel=0.05)


def test_follows_a_change() -> None:
    changed = TRUTH * 1.3
    fit = fitted(rows(500, 4), rows(1500, 5, changed), horizon=100.0)
    features, _, _ = rows(50, 6)
    assert features @ fit.coefficients == pytest.approx(features @ changed, rel=0.03)


def test_without_rows_it_is_the_prior() -> None:
    assert OnlineFit(TRUTH + 1, np.ones(4), 10.0).coefficients == pytest.approx(TRUTH + 1)


def test_more_coefficients_may_join() -> None:
    fit = fitted(rows(300, 7))
    fit.widen(np.array([7.0]), np.array([0.5]))
    assert fit.coefficients[:4] == pytest.approx(TRUTH, abs=0.1)
    assert fit.coefficients[4] == pytest.approx(7.0)
