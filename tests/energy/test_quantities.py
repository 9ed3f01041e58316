"""Units are converted once, and what is no number of them is refused."""

import pytest

from proxy.energy.quantities import microjoules, nanoseconds


def test_a_conversion_rounds_to_the_nearest_whole() -> None:
    assert (microjoules(1.2345675), microjoules(0.1), nanoseconds(0.0000000014)) == (1234568, 100000, 1)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e308, -1e308, 10**400], ids=str)
def test_what_is_no_finite_number_of_the_smaller_unit_is_refused_with_a_reason(value: float) -> None:
    with pytest.raises(ValueError, match="energy is (out of range|not a finite number)"):
        microjoules(value)
    with pytest.raises(ValueError, match="time is (out of range|not a finite number)"):
        nanoseconds(value)
