"""Largest remainder: real-valued shares become integers that still add up to the whole."""

import numpy as np
import numpy.typing as npt


def largest_remainder(total: int, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Divide the integer `total` in proportion to non-negative `weights`; the parts sum to `total` exactly.

    Ties go to the earlier entry, so the same input always gives the same output. Raises ValueError when there is
    something to divide and no weight is positive.
    """
    weight = float(weights.sum())
    if total == 0:
        return np.zeros(len(weights), dtype=np.int64)
    if not weight > 0:
        raise ValueError("nothing to divide by: no weight is positive")
    quotas = weights * (total / weight)
    parts = np.floor(quotas).astype(np.int64)
    left = total - int(parts.sum())
    if left == 0:
        return parts
    candidates = np.flatnonzero(weights > 0)
    order = candidates[np.argsort(parts[candidates] - quotas[candidates], kind="stable")]
    if left < 0:  # floats rounded upwards: take back where the most is
        order = candidates[np.argsort(-parts[candidates], kind="stable")]
    each, rest = divmod(abs(left), len(order))
    sign = 1 if left > 0 else -1
    parts[order] += sign * each
    parts[order[:rest]] += sign
    return parts
