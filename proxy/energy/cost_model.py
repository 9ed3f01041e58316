"""What steps cost: a first, simple model behind the seam that the fitted one will fill."""

import numpy as np

from proxy.energy.pending import Floats, Steps

#: Where nothing is known yet, a device idles at this part of its busy power (an assumption; the interval says so).
IDLE_GUESS = 0.25
_FORGET_SECONDS = 30.0


class CostModels:
    """The cost models of all backends on one device."""

    def __init__(self) -> None:
        self._busy_watts: float | None = None

    def busy_watts(self, idle_watts: float | None) -> float:
        if self._busy_watts is not None:
            return self._busy_watts
        return idle_watts / IDLE_GUESS if idle_watts else 1.0

    def price(self, steps: Steps, idle_watts: float | None) -> Floats:
        """Predicted microjoules of each entry; a step's entries sum to the step."""
        work = np.where(steps.tokens > 0, steps.tokens, 1.0)
        energy = self.busy_watts(idle_watts) * (steps.ended - steps.started) / 1000
        return work * (energy / np.maximum(steps.per_step(work), 1.0))[steps.owner]

    def learn(self, energy: float, busy: int) -> None:
        """`energy` microjoules (idle taken off) were used in `busy` nanoseconds of steps."""
        watts = energy / busy * 1000
        old = watts if self._busy_watts is None else self._busy_watts
        self._busy_watts = old + (watts - old) * min(1.0, busy / 1e9 / _FORGET_SECONDS)
