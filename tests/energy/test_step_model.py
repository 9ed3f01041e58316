"""The cost model of a backend's steps: what must hold whatever was learnt."""

import numpy as np

from proxy.energy.fit import OnlineFit
from proxy.energy.step_model import DURATION, StepModel


def test_a_first_guess_of_energy_has_no_zero_where_a_duration_was_fitted_as_zero() -> None:
    """A prior of 0 has no relative doubt: the fit would divide by it."""
    model = StepModel()
    fitted = np.array([1e-3, 1e-9, 1e-5, 1e-9, 2e-3, 1e-9])
    model.seconds = OnlineFit(fitted, np.full(len(DURATION), 1.0), 1000.0)
    model.seconds.coefficients[:] = np.array([1e-3, 0.0, 1e-5, 0.0, 2e-3, 0.0])
    model.begin_energy(100.0, np.array([2.0, 10.0, 100.0, 50.0]))
    assert model.energy is not None
    assert (model.energy > 0).all()
