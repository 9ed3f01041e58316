"""Which replica takes a request: the live one with the least outstanding work, or the one its session knows.

Pure: decides from what it has been told; time (seconds, monotonic) is given in, others act.
"""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from proxy.routing.breaker import Breaker, BreakerPolicy, State

#: A session stays with its replica until that has so many times the mean work: caches are worth some waiting, not any.
_AFFINITY_BOUND = 2.0


@dataclass(slots=True)
class _Replica:
    name: str
    order: int
    breaker: Breaker
    live: bool = False
    leaving: bool = False
    work: float = 0.0
    requests: int = 0
    served: int = 0


class Balancer:
    """The replicas of one model. Every `choose` that gives one is followed by one `release`.

    Between the two, `succeeded` or `failed` tell how the replica answered; neither, if the client left before.
    """

    def __init__(self, replicas: Iterable[str], policy: BreakerPolicy | None = None) -> None:
        self._policy = policy or BreakerPolicy()
        self._replicas: dict[str, _Replica] = {}
        self.keep(replicas)

    def keep(self, names: Iterable[str]) -> None:
        """These are the replicas from now on: new ones join, others leave once what they have under way is done."""
        names = list(names)
        # Of equally busy ones the newcomer must not get every request until it has served as many as the others.
        served = min((replica.served for replica in self._replicas.values()), default=0)
        for order, name in enumerate(names):
            replica = self._replicas.setdefault(name, _Replica(name, order, Breaker(self._policy), served=served))
            replica.order = order
        for replica in [*self._replicas.values()]:
            replica.leaving = replica.name not in names
            self._drop_if_gone(replica)

    def _drop_if_gone(self, replica: _Replica) -> None:
        if replica.leaving and not replica.requests:
            del self._replicas[replica.name]

    def set_live(self, name: str, live: bool) -> None:
        """One that comes up anew starts without a past. One that has left is nobody's concern."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        if live and not replica.live:
            replica.breaker.reset()
        replica.live = live

    def choose(
        self, now: float, *, work: float = 1.0, affinity: bytes | None = None, avoid: Collection[str] = ()
    ) -> str | None:
        """Pick a replica for `work` and count it as outstanding; None if there is none that may be asked.

        Those in `avoid` are taken only if there is no other. `affinity` (a session, the beginning of a prompt) leads
        to the same replica each time, as long as that has not too much work.
        """
        staying = [replica for replica in self._replicas.values() if replica.live and not replica.leaving]
        able = [replica for replica in staying if replica.breaker.allows(now)]
        if not able:
            return None
        chosen = able[0] if len(able) == 1 else self._best(able, now, work, affinity, avoid)
        chosen.breaker.begin(now)
        chosen.work += work
        chosen.requests += 1
        chosen.served += 1
        return chosen.name

    def _best(
        self, able: list[_Replica], now: float, work: float, affinity: bytes | None, avoid: Collection[str]
    ) -> _Replica:
        fresh = [replica for replica in able if replica.name not in avoid] or able
        return self._probed(fresh, now) or self._known(fresh, work, affinity) or _least_busy(fresh)

    def succeeded(self, name: str) -> None:
        self._replicas[name].breaker.succeeded()

    def failed(self, name: str, now: float) -> None:
        self._replicas[name].breaker.failed(now)

    def release(self, name: str, work: float, *, judged: bool) -> None:
        """The request has left the replica; `judged` if `succeeded` or `failed` has been told."""
        replica = self._replicas[name]
        replica.requests -= 1
        replica.work = replica.work - work if replica.requests else 0.0  # no remainder of many sums
        if not judged:
            replica.breaker.abandoned()
        self._drop_if_gone(replica)

    def outstanding(self, name: str) -> int:
        """How many requests it has under way; none, if it is no replica."""
        replica = self._replicas.get(name)
        return replica.requests if replica is not None else 0

    def state(self, name: str, now: float) -> State:
        return self._replicas[name].breaker.state(now)

    def retry_in(self, now: float) -> float | None:
        """Seconds until a live replica may be asked again; None if none is live."""
        staying = [replica for replica in self._replicas.values() if replica.live and not replica.leaving]
        return min((replica.breaker.opens_in(now) for replica in staying), default=None)

    def _probed(self, able: list[_Replica], now: float) -> _Replica | None:
        """One whose pause is over: a single request finds out whether it has recovered."""
        return next((replica for replica in able if replica.breaker.state(now) == "half-open"), None)

    def _known(self, able: list[_Replica], work: float, affinity: bytes | None) -> _Replica | None:
        if affinity is None:
            return None
        bound = _AFFINITY_BOUND * (sum(replica.work for replica in able) + work) / len(able)
        ranked = sorted(able, key=lambda replica: _rank(affinity, replica.name))
        return next((replica for replica in ranked if replica.work + work <= max(bound, work)), None)


def _least_busy(able: list[_Replica]) -> _Replica:
    """Of equally busy ones the one that has served least, so that a quiet node uses all of them."""
    return min(able, key=lambda replica: (replica.work, replica.served, replica.order))


def _rank(affinity: bytes, name: str) -> bytes:
    """Rendezvous hashing: a replica that goes away moves only its own sessions."""
    return hashlib.blake2b(affinity + b"\0" + name.encode(), digest_size=8).digest()
