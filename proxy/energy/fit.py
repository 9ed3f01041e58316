"""Online non-negative least squares with forgetting and a prior, robust against what does not fit."""

from dataclasses import dataclass

import numpy as np

from proxy.energy.pending import Floats

#: Beyond so many times the usual deviation a row is an outlier: the further off it is, the less it pulls.
_OUTLIER = 2.5
_LEAST_SPREAD, _SPREAD_SPEED = 0.1, 0.02
#: Below this a coefficient is nothing, in any unit (and its square would not be a number any more).
_LEAST_PRIOR = 1e-60
#: The first rows are all believed: the prior may be what is wrong.
_TRUSTING_ROWS = 20


@dataclass(frozen=True, slots=True)
class Structure:
    """Says that the coefficients are about `basis` (size, fewer) times a few positive ones.

    Those begin at `start`, doubted by `doubt` relative to it; the coefficients may stray by `loose`, relative to them.
    """

    basis: Floats
    start: Floats
    doubt: Floats
    loose: Floats


class OnlineFit:
    """Coefficients θ ≥ 0 that minimise Σ ((y - x·θ) / σ)² + Σ ((θ - θ₀) / (doubt·θ₀))², old rows forgotten.

    The prior θ₀ is positive, and `doubt` its standard deviation relative to it. `horizon` is the number of rows after
    which a row counts for 1/e. `spread` is the usual deviation of recent rows, in units of σ.
    """

    def __init__(self, prior: Floats, doubt: Floats, horizon: float) -> None:
        self._horizon = horizon
        self.rows = 0.0
        self.spread = 1.0
        nothing = np.zeros(0)
        self._normal, self._moment, self._prior, self._precision = np.zeros((0, 0)), nothing, nothing, nothing
        self.widen(prior, doubt)

    def widen(self, prior: Floats, doubt: Floats) -> None:
        """More coefficients, of which only a prior is known."""
        prior = np.maximum(prior, _LEAST_PRIOR)
        size, more = len(self._prior), len(prior)
        normal, moment = np.zeros((size + more, size + more)), np.zeros(size + more)
        normal[:size, :size], moment[:size] = self._normal, self._moment
        self._normal, self._moment = normal, moment
        self._prior = np.append(self._prior, prior)
        self._precision = np.append(self._precision, 1.0 / (doubt * prior) ** 2)
        self.solve()

    def lean_on(self, structure: Structure) -> None:
        """Make the prior what a simpler model, with fewer coefficients, would make of the same rows."""
        basis, start = structure.basis, structure.start
        normal = basis.T @ self._normal @ basis * np.outer(start, start) + np.diag(structure.doubt**-2.0)
        moment = (basis.T @ self._moment) * start + structure.doubt**-2.0
        self._prior = np.maximum(basis @ (non_negative(normal, moment) * start), _LEAST_PRIOR)
        # What the simpler model takes for nothing may still be something.
        self._precision = 1.0 / (structure.loose * np.maximum(self._prior, 0.1 * (basis @ start))) ** 2

    def add(self, features: Floats, observed: Floats, sigma: Floats) -> None:
        """Rows of features (rows, size), what was observed, and each row's standard deviation."""
        deviation = np.abs(observed - features @ self.coefficients) / sigma
        weight = self._trust(deviation) / sigma**2
        kept = np.exp(-len(observed) / self._horizon)
        self._normal = self._normal * kept + (features * weight[:, None]).T @ features
        self._moment = self._moment * kept + (weight * observed) @ features
        self._follow(deviation)

    def _trust(self, deviation: Floats) -> Floats:
        if self.rows < _TRUSTING_ROWS:
            return np.ones(len(deviation))
        trust: Floats = np.minimum(1.0, _OUTLIER * self.spread / np.maximum(deviation, 1e-300)) ** 2
        return trust

    def _follow(self, deviation: Floats) -> None:
        usual = deviation if self.rows < _TRUSTING_ROWS else np.minimum(deviation, 2 * _OUTLIER * self.spread)
        self.rows += len(deviation)
        speed = min(max(_SPREAD_SPEED * len(deviation), len(deviation) / self.rows), 1.0)
        self.spread = max(self.spread + (float(usual.mean()) - self.spread) * speed, _LEAST_SPREAD)

    def solve(self) -> None:
        """Take the rows added so far into the coefficients."""
        # Scaled by the prior, all coefficients are of the order of one.
        scale = np.maximum(self._prior, 1e-300)
        normal = (self._normal + np.diag(self._precision)) * np.outer(scale, scale)
        moment = (self._moment + self._precision * self._prior) * scale
        self.coefficients = non_negative(normal, moment) * scale


def non_negative(normal: Floats, moment: Floats) -> Floats:
    """The θ ≥ 0 that minimises ½ θ·N·θ - m·θ for a positive definite N (Lawson and Hanson's active sets)."""
    size = len(moment)
    unbounded = _solved(normal, moment)
    if (unbounded >= 0).all():
        return unbounded
    theta: Floats = np.zeros(size)
    free = np.zeros(size, dtype=bool)
    for _ in range(3 * size):
        gradient = moment - normal @ theta
        gradient[free] = 0.0
        best = int(np.argmax(gradient))
        if gradient[best] <= 1e-10 * (abs(moment[best]) + 1e-300):
            break
        free[best] = True
        theta = _walk(normal, moment, theta, free)
    return theta


def _solved(normal: Floats, moment: Floats) -> Floats:
    """N⁻¹·m; the shortest solution where rows far apart in size have left N without full rank."""
    try:
        solution: Floats = np.linalg.solve(normal, moment).astype(np.float64)
    except np.linalg.LinAlgError:
        solution = np.linalg.lstsq(normal, moment, rcond=None)[0].astype(np.float64)
    return solution


def _walk(normal: Floats, moment: Floats, theta: Floats, free: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Floats:
    """To the minimum over the free coefficients, or to where the first of them becomes 0, and on from there."""
    while free.any():
        goal: Floats = np.zeros(len(theta))
        goal[free] = _solved(normal[np.ix_(free, free)], moment[free])
        blocked = free & (goal <= 0)
        if not blocked.any():
            return goal
        step = float(np.min(theta[blocked] / np.maximum(theta[blocked] - goal[blocked], 1e-300)))
        theta = theta + step * (goal - theta)
        free &= ~(blocked & (theta <= 1e-12 * max(float(theta.max()), 1e-300)))
        theta[~free] = 0.0
    return theta
