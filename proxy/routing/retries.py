"""Whether a failed attempt is made again, and after what pause. Pure: time and chance are given in."""

from dataclasses import dataclass

#: Answers of a backend that another, or the same a little later, may not give.
RETRYABLE = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """At most `retries`, none that would begin later than `within` seconds after the first attempt did.

    A backend that closed the connection over a request may have died of it: that is tried once more only, so that one
    poisonous request does not take every replica with it.
    """

    retries: int = 2
    retries_after_loss: int = 1
    pause: float = 0.1
    pause_cap: float = 2.0
    within: float = 20.0

    def wait(self, failures: int, elapsed: float, chance: float, *, asked: float, lost: bool) -> float | None:
        """Seconds to wait before another attempt, None for no other.

        `failures` attempts have failed so far (1 or more) within `elapsed` seconds; `chance` lies in 0..1; `asked` is
        how long the backend itself asked to be left alone; `lost` if it closed the connection.
        """
        if failures > (self.retries_after_loss if lost else self.retries):
            return None
        full = min(self.pause * 2 ** (failures - 1), self.pause_cap)
        pause = max(asked, full * chance)
        return pause if asked <= self.pause_cap and elapsed + pause <= self.within else None
