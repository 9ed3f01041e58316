"""Circuit breaker: a backend that fails again and again is left alone for a while, then tried with one request.

    state       event        next
    closed      failed       closed, or open after so many failures in a row
    closed      succeeded    closed
    open        (pause over) half-open
    half-open   succeeded    closed
    half-open   failed       open, for twice as long

Pure: time (seconds, monotonic) is given in.
"""

from dataclasses import dataclass
from typing import Literal

State = Literal["closed", "open", "half-open"]


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """`failures` in a row open it for `pause` seconds, doubled with every probe that fails, `pause_cap` at most."""

    failures: int = 5
    pause: float = 1.0
    pause_cap: float = 30.0


class Breaker:
    """One backend's breaker. `allows` asks, `begin` sends a request, then `succeeded`, `failed` or `abandoned`."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self.reset()

    def reset(self) -> None:
        """The backend has been started anew: what was known of it is void."""
        self._failures = 0
        self._pause = self._policy.pause
        self._open_until: float | None = None
        self._probing = False

    def state(self, now: float) -> State:
        if self._open_until is None:
            return "closed"
        return "open" if now < self._open_until else "half-open"

    def allows(self, now: float) -> bool:
        """Half-open it lets one request through at a time."""
        state = self.state(now)
        return state == "closed" or (state == "half-open" and not self._probing)

    def opens_in(self, now: float) -> float:
        """Seconds until a request may be tried; 0 if one may be now, or as soon as the probe under way is back."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - now)

    def begin(self, now: float) -> None:
        self._probing = self.state(now) == "half-open"

    def succeeded(self) -> None:
        self.reset()

    def failed(self, now: float) -> None:
        state = self.state(now)
        if state == "closed":
            self._failures += 1
            if self._failures >= self._policy.failures:
                self._open_until = now + self._pause
        elif state == "half-open":
            self._pause = min(2 * self._pause, self._policy.pause_cap)
            self._open_until = now + self._pause
        self._probing = False

    def abandoned(self) -> None:
        """The client left before the backend had shown how it is: another may try."""
        self._probing = False
