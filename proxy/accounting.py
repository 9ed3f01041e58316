"""The accountant: joins what the ledger divides with what the proxy knows of each request.

Everything here runs on the event loop; the sampler's thread hands its events over before they arrive. Requests become
tickets, attempts upstream become ledger accounts, and settled shares become receipts that go to the sinks (the store,
the metrics). What is kept in memory is bounded by what is open, plus a fixed number of recent receipts.
"""

import asyncio
import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

from msgspec import structs

from backends.steps import StepReport
from proxy.energy.attribution import Attribution, Method
from proxy.energy.carbon import Intensity
from proxy.energy.events import (
    UNKNOWN_REQUEST,
    Device,
    Event,
    Finish,
    Loss,
    Model,
    Outcome,
    Sample,
    Source,
    Start,
    Step,
)
from proxy.energy.ledger import SETTLE_AFTER, EventError, Ledger
from proxy.energy.quantities import Nanoseconds
from proxy.energy.receipt import HOST, Accounting, Boundary, Receipt, Request, Tokens, receipt

log = logging.getLogger("joulegate.accounting")

#: The name under which the proxy's own CPU time is divided among the requests in flight.
PROXY = "proxy"
_RECENT_RECEIPTS = 1_000
#: No meter has told anything for so long.
_SILENT = Nanoseconds(5_000_000_000)
#: A receipt still provisional after this long is stored as such, so that a crash loses little more than a second of
#: them. Most settle before: windows of the host wait up to half a second for news of who used it.
_STORE_PROVISIONAL_AFTER = Nanoseconds(750_000_000)
#: Hundreds may settle with one window: between so many of them requests are served.
_SETTLED_AT_A_TIME = 24


#: What is known of the costs of all backends, or of one, on a device.
Recall = Callable[[Device, str | None], Sequence[Model]]


class ReceiptSink(Protocol):
    """Takes receipts as they settle; `provisional` is what the client was told before, if it was told anything."""

    def settled(self, receipt: Receipt, provisional: Receipt | None) -> None: ...

    def still_provisional(self, receipt: Receipt) -> None: ...


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a receipt's method and meter will be if nothing fails; None where there is no meter for it."""

    method: Method | None
    meter: str | None


#: The host's monotonic clock. Not a function around it: every request asks for the time a dozen times.
now: Callable[[], Nanoseconds] = cast("Callable[[], Nanoseconds]", time.monotonic_ns)


class Ticket:
    """One request's place in the books: its attempts upstream, and its receipt when it is done."""

    __slots__ = (
        "_accountant",
        "_shares",
        "_terms",
        "attempts",
        "finished_at",
        "measurable",
        "provisional",
        "request",
        "tokens",
    )

    def __init__(self, accountant: "Accountant", request: Request) -> None:
        self._accountant = accountant
        self._shares: dict[str, Attribution] = {}
        self._terms = accountant.terms
        self.request = request
        self.attempts: list[str] = []
        self.tokens = Tokens()
        self.measurable = True
        self.provisional: Receipt | None = None
        self.finished_at: Nanoseconds | None = None

    @property
    def terms(self) -> Accounting:
        """Those that held when it was opened, for the devices there are now."""
        now_valid = self._accountant.terms
        return self._terms if self._terms is now_valid else replace(self._terms, devices=now_valid.devices)

    def attempt(self, backend: str) -> str:
        """Begin an attempt on `backend`; returns the id that goes upstream as `X-Request-Id`."""
        number = len(self.attempts)
        attempt = self.request.id if number == 0 else f"{self.request.id}.{number}"
        self.attempts.append(attempt)
        self._accountant.begin(self, attempt, backend)
        return attempt

    def fail_attempt(self) -> None:
        """The last attempt failed and another will be made: what it burnt counts as wasted."""
        self._accountant.end_attempt(self.attempts[-1])

    def finish(self, outcome: Outcome, tokens: Tokens) -> Receipt:
        """End the request and return its receipt as far as it is known now."""
        self.tokens = tokens
        self.finished_at = now()
        self._accountant.end(self, outcome)
        told = self.receipt()
        if told.figures is None and self._accountant.charge_now(self):
            told = self.receipt()
        self.provisional = told
        self._accountant.has_told(self)
        return told

    def take(self, share: Attribution) -> bool:
        """Note a settled attempt; True when the whole receipt is settled."""
        self._shares[share.request] = share
        return self.settled

    @property
    def settled(self) -> bool:
        """Whether it is over and all of its attempts have settled."""
        return self.finished_at is not None and len(self._shares) == len(self.attempts)

    def receipt(self) -> Receipt:
        settled, of = self._shares, self._accountant.share
        known = [share for name in self.attempts if (share := settled.get(name) or of(name)) is not None]
        terms = self.terms
        if not self.measurable or self._has_failed(known, terms):
            known = [structs.replace(share, devices={}) for share in known]
        return receipt(self.request, known, self.tokens, terms)

    def _has_failed(self, shares: Sequence[Attribution], terms: Accounting) -> bool:
        """Whether a meter that its figures need was not read for so long that they would be false."""
        if not self._accountant.silent_meters:
            return False
        devices = {device for share in shares for device in share.devices if terms.within(device)}
        return self._accountant.has_failed(devices, self.finished_at)


@dataclass(frozen=True, slots=True)
class _Survey:
    """Of some places, which have a meter; and whether all that count have one: the accelerators, if there are any."""

    metered: tuple[str, ...]
    measurable: bool

    @classmethod
    def of(cls, places: tuple[str, ...], devices: Mapping[str, Device]) -> "_Survey":
        accelerators = [place for place in places if place != HOST]
        measurable = bool(places) and all(place in devices for place in accelerators or places)
        return cls(tuple(place for place in places if place in devices), measurable)


class Accountant:
    """All events go through here, to the ledger and to the recording; settled shares come out as receipts.

    `places` says on which metered devices a backend's steps run (its accelerators, and the host for a local one); it
    may change meanwhile. `later` (the event loop's `call_soon`) has requests served while many settle; without it they
    settle at once.
    """

    def __init__(
        self,
        ledger: Ledger,
        terms: Accounting,
        places: Mapping[str, tuple[str, ...]],
        sinks: Sequence[ReceiptSink] = (),
        record: Callable[[Sequence[Event]], None] | None = None,
        recall: Recall | None = None,
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self._ledger = ledger
        self.terms = terms
        self._places = places
        self._sinks = sinks
        self._record = record
        self._recall = recall
        self._later = later
        self._settling = False  # the rest of what has settled is to come
        self._devices: dict[str, Device] = dict(terms.devices)
        self._sampled: dict[str, Nanoseconds] = {}  # by device, when its meter was last read
        self.silent_meters: frozenset[str] = frozenset()
        """Those that were not read for so long that the ledger waits for them no more."""
        self._surveys: dict[tuple[str, ...], _Survey] = {}
        self._tickets: dict[str, Ticket] = {}
        self._in_flight: dict[str, bool] = {}
        self._finished_since: dict[str, bool] = {}
        self._unsettled: dict[str, Ticket] = {}
        self._told: deque[tuple[Nanoseconds, Ticket]] = deque()
        self._recent: OrderedDict[str, Receipt] = OrderedDict()
        self._waiting: dict[str, list[asyncio.Future[Receipt]]] = {}
        self._proxy_until = now()
        self.refused_events = 0
        self.reports: Counter[str] = Counter()
        self.reports_lost: Counter[str] = Counter()

    # requests

    def open(self, request: Request) -> Ticket:
        return Ticket(self, request)

    def begin(self, ticket: Ticket, attempt: str, backend: str) -> None:
        measurable = self._measurable(backend)
        if not measurable:
            ticket.measurable = False
        self._tickets[attempt] = ticket
        self._in_flight[attempt] = measurable
        self._unsettled[ticket.request.id] = ticket
        self.apply(Start(attempt, now(), backend))

    def end_attempt(self, attempt: str) -> None:
        """An attempt that is not its request's last has failed."""
        self._finished_since[attempt] = self._in_flight.pop(attempt)
        self.apply(Finish(attempt, now(), "failed"))

    def end(self, ticket: Ticket, outcome: Outcome) -> None:
        for attempt in ticket.attempts:
            measurable = self._in_flight.pop(attempt, None)
            if measurable is not None:
                self._finished_since[attempt] = measurable
        self.apply(Finish(ticket.attempts[-1], ticket.finished_at or now(), outcome))

    def charge_now(self, ticket: Ticket) -> bool:
        """Charge the proxy's own work up to now: all there is of a request that its engine had no step for."""
        if not ticket.measurable or HOST not in self._devices:
            return False
        self._charge_proxy()
        return True

    def has_told(self, ticket: Ticket) -> None:
        """The client has its receipt; as long as that is all there is of it, it may have to be stored so."""
        self._told.append((ticket.finished_at or now(), ticket))
        if ticket.settled:  # its last attempt did so before, in the pause before another that was not made
            self._complete(ticket)

    def share(self, attempt: str) -> Attribution | None:
        return self._ledger.attribution(attempt, now())

    def has_failed(self, devices: Collection[str], finished_at: Nanoseconds | None) -> bool:
        """Whether a meter failed before a request's end, for so long that the ledger does not wait for it any more."""
        devices = self.silent_meters.intersection(devices)
        at = now()
        needed = min(at if finished_at is None else finished_at, Nanoseconds(at - SETTLE_AFTER))
        return any(self._sampled.get(device, 0) < needed for device in devices)

    def expectation(self, backend: str, terms: Accounting, *, reports_steps: bool) -> Expectation:
        """The provenance to announce before any energy is known."""
        places = [place for place in self._places.get(backend, ()) if terms.within(place)]
        devices = [self._devices[place] for place in places if place in self._devices]
        if not devices or not self._measurable(backend):
            return Expectation(None, None)
        measured: Method = "measured-steps" if reports_steps else "measured-tokens"
        method = "estimated" if all(device.estimated for device in devices) else measured
        return Expectation(method, "+".join(dict.fromkeys(device.meter for device in devices)))

    # what may change while it runs

    def adopt(self, boundary: Boundary, pue: float, intensity: Intensity) -> None:
        """Other terms, for requests that are yet to come."""
        self.terms = replace(self.terms, boundary=boundary, pue=pue, intensity=intensity)

    def introduce(self, backend: str) -> None:
        """One more backend, of which `places` knows: tell the ledger what is known of its costs."""
        for device in self._devices.values():
            self._remember(device, backend)

    # events

    def apply(self, event: Event) -> None:
        """Give one event to the ledger; one that it refuses is logged and harms nothing else."""
        try:
            self._ledger.apply(event)
        except EventError as error:
            self.refused_events += 1
            log.warning("the ledger refused an event: %s", error)
            return
        except Exception:
            # A defect of ours must not take an answer away from a client; the law's metric would show it.
            self.refused_events += 1
            log.exception("the ledger failed on a %s", type(event).__name__)
            return
        if self._record is not None:
            self._record((event,))

    def observe(self, events: Iterable[Event]) -> None:
        """Take what the meters said, after the proxy's own work until now, and settle what can be settled."""
        self._charge_proxy()
        for event in events:
            if isinstance(event, Device):
                self._found(event)
                continue
            if isinstance(event, Sample):
                self._sampled[event.device] = event.at
            self.apply(event)
        self._advance()
        if not self._settling:
            self._settle_some()
        if not self._settling:  # else what is still to be handed out would be taken for slow
            self._store_the_slow()

    def steps(self, backend: str, reports: Iterable[StepReport]) -> None:
        """Take step reports of a backend; participants whose id is not ours become unattributed in the ledger."""
        for report in reports:
            self.reports[backend] += 1
            devices = self._metered(backend, report.devices)
            if devices:
                self.apply(
                    Step(
                        backend,
                        devices,
                        Nanoseconds(report.started),
                        Nanoseconds(report.ended),
                        report.requests,
                        report.tokens,
                        report.contexts,
                    )
                )

    def virtual_step(
        self, backend: str, attempt: str, started: Nanoseconds, ended: Nanoseconds, tokens: int, context: int
    ) -> None:
        """Take a step that the relay inferred from what it forwarded; 0 tokens mean that the work is not known."""
        devices = self._metered(backend, self._places.get(backend, ()))
        if devices and ended > started:
            source: Source = "relay"
            self.apply(Step(backend, devices, started, ended, (attempt,), (tokens,), (context,), source))

    def lost(self, backend: str, reports: int) -> None:
        self.reports_lost[backend] += reports
        self.apply(Loss(backend, reports))

    # receipts

    def receipt(self, id: str) -> Receipt | None:
        """A receipt that is open, unsettled or recent; None where only the store may know."""
        ticket = self._unsettled.get(id)
        if ticket is not None:
            return ticket.receipt()
        return self._recent.get(id)

    async def settled_receipt(self, id: str, within: float) -> Receipt | None:
        """Wait until a receipt is settled, `within` seconds at most; then whatever is known."""
        if id not in self._unsettled:
            return self._recent.get(id)
        future: asyncio.Future[Receipt] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(id, []).append(future)
        try:
            return await asyncio.wait_for(future, within)
        except TimeoutError:
            return self.receipt(id)
        finally:
            self._stop_waiting(id, future)

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    @property
    def unsettled(self) -> int:
        """How many requests are open or not settled yet."""
        return len(self._unsettled)

    def close(self) -> None:
        """The end: settle everything with what was measured."""
        self._charge_proxy()
        self._ledger.close()
        self._later = None
        self._settle_some()

    # within

    def _measurable(self, backend: str) -> bool:
        """Whether every device that this backend works on has a meter: half a figure would be a false one."""
        places = self._places.get(backend, ())
        return self._surveyed(places).measurable

    def _metered(self, backend: str, devices: tuple[str, ...]) -> tuple[str, ...]:
        if HOST not in devices and HOST in self._places.get(backend, ()):
            devices = (*devices, HOST)
        return self._surveyed(devices).metered

    def _surveyed(self, places: tuple[str, ...]) -> "_Survey":
        """Kept until there is another device: every request asks."""
        known = self._surveys.get(places)
        if known is None:
            known = self._surveys[places] = _Survey.of(places, self._devices)
        return known

    def _advance(self) -> None:
        """Where no sample tells the ledger the time, the clock does; else it acts on events alone, as a replay does."""
        at = now()
        if at - max(self._sampled.values(), default=Nanoseconds(0)) > _SILENT:
            self._ledger.advance(at)
        self.silent_meters = frozenset(
            device for device in self._devices if self._sampled.get(device, 0) < at - SETTLE_AFTER
        )

    def _found(self, device: Device) -> None:
        """A device is there, or is told of anew; at first, what is known of the backends' costs on it goes with it."""
        new = device.device not in self._devices
        self._devices[device.device] = device
        self._surveys.clear()
        self.terms = replace(self.terms, devices=dict(self._devices))
        self.apply(device)
        if new:
            self._remember(device, None)

    def _remember(self, device: Device, backend: str | None) -> None:
        for model in self._recall(device, backend) if self._recall is not None else ():
            self.apply(model)

    def _charge_proxy(self) -> None:
        """The proxy's own work on the host since the last time, shared equally by the requests in flight."""
        started, self._proxy_until = self._proxy_until, now()
        present = {**self._in_flight, **self._finished_since}
        self._finished_since.clear()
        if not present or HOST not in self._devices:
            return
        ids = [attempt if measurable else UNKNOWN_REQUEST for attempt, measurable in present.items()]
        ones = [1] * len(ids)
        self.apply(Step(PROXY, (HOST,), started, self._proxy_until, ids, ones, [0] * len(ids), "relay"))

    def _settle_some(self) -> None:
        """Hand out what has settled; the rest, where there is more, after whatever else is to be done by now."""
        self._settling = False
        shares = self._ledger.drain(None if self._later is None else _SETTLED_AT_A_TIME)
        for share in shares:
            ticket = self._tickets.pop(share.request, None)
            if ticket is not None and ticket.take(share):
                self._complete(ticket)
        if self._later is not None and len(shares) == _SETTLED_AT_A_TIME:
            self._later(self._settle_some)
            self._settling = True

    def _complete(self, ticket: Ticket) -> None:
        self._unsettled.pop(ticket.request.id, None)
        final = ticket.receipt()
        self._recent[final.request.id] = final
        if len(self._recent) > _RECENT_RECEIPTS:
            self._recent.popitem(last=False)
        for future in self._waiting.pop(final.request.id, ()):
            if not future.done():
                future.set_result(final)
        for sink in self._sinks:
            try:
                sink.settled(final, ticket.provisional)
            except Exception:  # it must not keep the other sinks, nor other receipts, from theirs
                log.exception("an error of our own in keeping a receipt")

    def _store_the_slow(self) -> None:
        """Those that take longer to settle are stored as the client was told, in the order they ended."""
        told, unsettled, horizon = self._told, self._unsettled, now() - _STORE_PROVISIONAL_AFTER
        while told and told[0][0] < horizon:
            _, ticket = told.popleft()
            if ticket.provisional is not None and ticket.request.id in unsettled:
                for sink in self._sinks:
                    sink.still_provisional(ticket.provisional)

    def _stop_waiting(self, id: str, future: "asyncio.Future[Receipt]") -> None:
        waiting = self._waiting.get(id)
        if waiting and future in waiting:
            waiting.remove(future)
            if not waiting:
                del self._waiting[id]
