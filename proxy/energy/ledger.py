"""The ledger: events in, settled attributions out. It does no I/O and has no clock; one thread drives it.

Theory of operation
-------------------
Every device's counter is cut into *windows* between two changes of its reading (`timeline.py`). A window waits, its
energy *pending*, until all who may have worked in it have told what they did; then it is divided, once, among the
requests whose steps overlap it and the accounts `idle`, `foreign` and `unattributed` (`device.py`), in integers
that add up to the window's energy exactly. Hence, per device and at any time:

    requests + idle + foreign + unattributed + pending == sum of the counter's rises

A request is OPEN from its `Start` (or, in a replay, the first step that names it), FINISHED from its `Finish`, and
SETTLED when every window that overlaps it on every device it concerns has settled. Then it is handed out once by
`drain`, and forgotten.

When a window settles. Each backend that uses the device has a *horizon*, up to which its work is known:

- with open work: the end of the latest step it reported (an engine reports its steps in order); where the relay
  observes each request on its own, the least of these over its open requests;
- with open work and no report ever: nothing, on any device, but only for its first few requests;
- without open work: a moment ago (`GRACE`), since reports travel a little slower than answers do;
- in a replay without `start` records nobody announces work: only reports count.

A window settles when all horizons lie past its end, or 30 s after its end whatever is missing, or at `close`. It is
never reopened: a step that comes later is lost work. It is counted and widens its request's interval.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from proxy.energy.attribution import METHODS, Attribution, DeviceBalance, DeviceShare, Method
from proxy.energy.backend import GRACE, Backend
from proxy.energy.device import DeviceBook
from proxy.energy.errors import EventError
from proxy.energy.events import (
    BackendState,
    Device,
    Event,
    Finish,
    Loss,
    Model,
    Outcome,
    Processes,
    Sample,
    Start,
    Step,
)
from proxy.energy.pending import Alone, Batch, Bools, Floats, Ints
from proxy.energy.quantities import Nanoseconds
from proxy.energy.registry import NEVER, PROXY_BACKEND, UNATTRIBUTED, Registry, Request
from proxy.energy.spans import Use
from proxy.energy.timeline import LIMIT
from proxy.energy.waiting import done

__all__ = ["GRACE", "PROXY_BACKEND", "SETTLE_AFTER", "EventError", "Ledger"]

SETTLE_AFTER = Nanoseconds(30_000_000_000)
#: How long a window waits for news of other processes on a device that has had such news before.
_PROCESSES_GRACE = 1_500_000_000
_LOOK_EVERY = 200_000_000
#: More tokens than this in a step, or more context, are no plausible work.
_MOST_WORK = 1 << 53
_RANK: dict[Method, int] = {method: rank for rank, method in enumerate(METHODS)}


class Ledger:
    """See the module's theory of operation.

    `known_only` (live): a participant without a prior `Start` is nobody the proxy knows; its share goes to
    `unattributed`, and steps may name devices that have no meter. Otherwise (replay) a step's first mention opens the
    request, and a device must have been declared.
    """

    def __init__(self, *, known_only: bool = False, settle_after: Nanoseconds = SETTLE_AFTER) -> None:
        self._known_only = known_only
        self._announced = known_only
        self._settle_after = settle_after
        self._now = NEVER
        self._settled_until: int = NEVER  # on every device with a meter
        self._looked_at = NEVER  # when time-outs of waiting requests were last looked after
        self._registry = Registry()
        self._devices: dict[str, DeviceBook] = {}
        self._measuring: set[str] = set()  # of these, the ones whose meter does not estimate
        self._backends: dict[str, Backend] = {}
        self._backend_names: list[str] = []
        self._places: dict[tuple[str, tuple[str, ...]], tuple[Backend, list[DeviceBook]]] = {}
        self._backend(PROXY_BACKEND)
        self._waiting: dict[str, Request] = {}
        self._orphans: set[str] = set()  # opened by a finish or the proxy's own step: their backend is yet to be seen
        self._settled: list[Attribution] = []
        self._handlers: dict[type, Callable[..., None]] = {
            Step: self._step, Sample: self._sample, Start: self._start, Finish: self._finish,
            Processes: self._processes, Device: self._device, Model: self._model, Loss: self._loss,
            BackendState: self._backend_state,
        }  # fmt: skip

    # --- events ---

    def apply(self, event: Event) -> None:
        """Take one event in. Raises EventError, its state unharmed, for one that cannot be."""
        self._handlers[type(event)](event)

    def advance(self, now: Nanoseconds) -> None:
        """Let time-outs act: it is `now`."""
        self._pass(now)
        self._settle_windows()
        if self._now - self._looked_at >= _LOOK_EVERY:
            self._settle_waiting()

    def close(self) -> None:
        """The end: everything settles with what was measured; what has no finish is `unfinished`."""
        for book in self._devices.values():
            while book.windows:
                book.settle()
        self._settle_waiting(everything=True)
        unfinished = list(self._registry.open.values())
        for request in unfinished:
            self._registry.finish(request, self._last_end(request), "unfinished")
        self._settle(unfinished)

    def _device(self, event: Device) -> None:
        known = self._devices.get(event.device)
        if known is None:
            self._devices[event.device] = DeviceBook(event, self._registry, self._backend_names)
            self._places.clear()
        else:
            known.device = event
        self._measuring = {name for name, book in self._devices.items() if not book.device.estimated}

    def _sample(self, event: Sample) -> None:
        book = self._metered(event.device)
        _check_time(event.at)
        book.sample(event)
        self.advance(event.at)

    def _step(self, event: Step) -> None:
        _check_step(event)
        if len(event.requests) > 1:
            self._batch(event)
        else:
            self._alone(event)

    def _batch(self, event: Step) -> None:
        tokens, contexts = _work(event.tokens, event), _work(event.contexts, event)
        backend, books = self._place(event)
        if backend.has_heard(event):
            return
        ended = max(event.ended, event.started + 1)
        step = Batch(backend.index, event.started, ended, self._slots_of(event, backend), tokens, contexts)
        for book in books:
            book.pending_steps.add_batch(step)
        self._note_report(backend, event)
        self._settle_after_step(backend, books)

    def _alone(self, event: Step) -> None:
        """A step of one participant; one without any has one whose work is unknown."""
        repeat, tokens, context = _work_alone(event)
        backend, books = self._place(event)
        if backend.has_heard(event):
            return
        slot = self._slot_of(event.requests[0], event) if event.requests else UNATTRIBUTED
        step: Alone = (backend.index, event.started, max(event.ended, event.started + 1), repeat, slot, tokens, context)
        for book in books:
            book.pending_steps.add_alone(step)
        self._note_report(backend, event)
        self._settle_after_step(backend, books)

    def _start(self, event: Start) -> None:
        _check_time(event.at)
        if not event.request:
            raise EventError("a request needs an id")
        if self._registry.settled_lately(event.request):
            raise EventError(f"request {event.request} has settled already")
        self._announced = True
        self._pass(event.at)
        known = self._registry.open.get(event.request)
        if known is None:
            self._open(event.request, event.backend, event.at, announced=True)
        elif not known.announced:
            raise EventError(f"request {event.request} starts after its first step")

    def _finish(self, event: Finish) -> None:
        _check_time(event.at)
        request = self._registry.open.get(event.request)
        if request is None:
            if self._registry.settled_lately(event.request):
                return
            if self._known_only or not event.request:
                raise EventError(f"finish of an unknown request: {event.request!r}")
            request = self._open(event.request, "", event.at, announced=False)
        self._pass(event.at)
        if request.finished is None:
            self._close_request(request, event.at, event.outcome)
            at = request.finished or event.at
            if not self._devices or at <= self._settled_until:
                self._settle_waiting()

    def _processes(self, event: Processes) -> None:
        book = self._metered(event.device)
        _check_time(event.at)
        shares = dict(event.backend_shares)
        if not 0 <= event.foreign_share <= 1 or not all(0 <= share <= 1 for share in shares.values()):
            raise EventError(f"shares of {event.device}'s use must lie within 0..1")
        book.uses.add(event.at, Use(event.foreign_share, shares))
        self._settle_windows()

    def _model(self, event: Model) -> None:
        book = self._metered(event.device)
        if not all(math.isfinite(value) and value >= 0 for value in event.coefficients.values()):
            raise EventError(f"coefficients of {event.backend} on {event.device} must be finite and not negative")
        backend = self._backend(event.backend)
        backend.devices[event.device] = None
        book.recall(backend.index, event.coefficients)

    def _loss(self, event: Loss) -> None:
        if event.reports < 0:
            raise EventError(f"lost reports cannot be {event.reports}")
        backend = self._backend(event.backend)
        backend.reports_lost += event.reports

    def _backend_state(self, event: BackendState) -> None:
        _check_time(event.at)
        books = [(name, book) for name in event.devices if (book := self._devices.get(name)) is not None]
        backend = self._backend(event.backend)
        for name, book in books:
            backend.devices[name] = None
            book.loading.set(event.backend, event.at, loading=event.loading)

    # --- finding and opening things ---

    def _metered(self, device: str) -> DeviceBook:
        book = self._devices.get(device)
        if book is None:
            raise EventError(f"unknown device: {device}")
        return book

    def _place(self, step: Step) -> tuple[Backend, list[DeviceBook]]:
        """Who did a step, and where; found once, for it is the same again and again."""
        key = step.backend, step.devices
        place = self._places.get(key)
        if place is None:
            if not self._known_only:
                for name in step.devices:
                    self._metered(name)
            names = [name for name in dict.fromkeys(step.devices) if name in self._devices]
            place = self._backend(step.backend), [self._devices[name] for name in names]
            place[0].devices |= dict.fromkeys(names)
            self._places[key] = place
        return place

    def _backend(self, name: str) -> Backend:
        backend = self._backends.get(name)
        if backend is None:
            backend = self._backends[name] = Backend(name, len(self._backends))
            self._backend_names.append(name)
        return backend

    def _open(self, request: str, backend: str, at: Nanoseconds, *, announced: bool) -> Request:
        of = self._backend(backend)
        opened = self._registry.begin(request, backend, of.index, at, announced=announced)
        of.opens(opened)
        if not announced and backend in {"", PROXY_BACKEND}:
            self._orphans.add(request)
        return opened

    def _close_request(self, request: Request, at: Nanoseconds, outcome: Outcome) -> None:
        at = max(at, request.started)
        self._registry.finish(request, at, outcome)
        self._waiting[request.request] = request
        self._backend(request.backend).closes(request)

    def _pass(self, now: Nanoseconds) -> None:
        self._now = max(self._now, now)

    def _slots_of(self, step: Step, backend: Backend) -> Ints:
        if self._registry.version == backend.slots_version and step.requests == backend.requests:
            return backend.slots
        found = list(map(self._registry.slots.get, step.requests))
        if None in found:
            found = [self._slot_of(request, step) for request in step.requests]
        slots = np.array(found, dtype=np.int64)
        backend.requests, backend.slots, backend.slots_version = step.requests, slots, self._registry.version
        return slots

    def _slot_of(self, request: str, step: Step) -> int:
        known = self._registry.slots.get(request)
        if known is not None:
            return known
        if self._known_only or self._registry.settled_lately(request):
            return UNATTRIBUTED
        return self._open(request, step.backend, step.started, announced=False).slot

    def _note_report(self, backend: Backend, step: Step) -> None:
        backend.hears(step)
        if backend.name == PROXY_BACKEND:
            return
        for name in {*step.requests} & self._orphans if self._orphans else ():
            self._adopt(self._registry.open[name], backend)
        if step.source == "relay":
            rank = _RANK["measured-tokens" if all(step.tokens) else "measured-window"]
            for name in step.requests:
                if (request := self._registry.open.get(name)) is not None:
                    request.rank = max(request.rank, rank)

    def _adopt(self, request: Request, backend: Backend) -> None:
        """In a replay, the first backend but the proxy's own that works for a request is the request's."""
        self._orphans.discard(request.request)
        self._backend(request.backend).closes(request)
        self._registry.adopt(request, backend.name, backend.index)
        if request.finished is None:
            backend.opens(request)

    # --- settling ---

    def _is_ready(self, name: str, book: DeviceBook) -> bool:
        end, book.waits_for = book.windows[0].end, None
        if self._now >= end + self._settle_after:
            return True
        users = [
            backend
            for backend in self._backends.values()
            if name in backend.devices or (self._announced and backend.may_surprise)
        ]
        if not users and (not self._announced or self._now < end + GRACE):
            return False
        known = book.uses.known_until
        if known is not None and known < end and self._now < end + _PROCESSES_GRACE:
            return False
        book.waits_for = next((backend for backend in users if not self._knows(backend, end)), None)
        return book.waits_for is None

    def _knows(self, backend: Backend, end: int) -> bool:
        """Whether a backend's work is known until then."""
        return backend.knows_all_until(end, self._now) if self._announced else backend.reported >= end

    def _settle_after_step(self, backend: Backend, books: list[DeviceBook]) -> None:
        """Settle the windows that waited for this backend's word alone: others need more than a step."""
        for book in books:
            if book.waits_for is backend and self._knows(backend, book.windows[0].end):
                self._settle_windows()
                return

    def _settle_windows(self) -> None:
        progress = False
        for name, book in self._devices.items():
            while book.windows and self._is_ready(name, book):
                book.settle()
                progress = True
        untils = [book.settled_until for book in self._devices.values() if book.settled_until is not None]
        self._settled_until = min(untils, default=NEVER)
        if progress:
            self._settle_waiting()

    def _settle_waiting(self, *, everything: bool = False) -> None:
        """Hand out the finished requests of which every window has settled, or will never come."""
        self._looked_at = self._now
        waiting = list(self._waiting.values())
        if not waiting:
            return
        if not everything:
            waiting = [each for each, is_done in zip(waiting, self._done(waiting).tolist(), strict=True) if is_done]
        self._settle(waiting)

    def _done(self, waiting: Sequence[Request]) -> Bools:
        slots = np.array([request.slot for request in waiting], dtype=np.int64)
        return done(self._registry, self._backends.values(), self._devices, slots, self._now, self._settle_after)

    def _settle(self, requests: Sequence[Request]) -> None:
        if not requests:
            return
        for book in self._devices.values():
            book.look()
        slots = np.array([request.slot for request in requests], dtype=np.int64)
        self._settled += self._attributions(requests, slots)
        gone = np.zeros(self._registry.capacity, dtype=bool)
        gone[slots] = True
        for book in self._devices.values():
            book.abandon(gone, slots)
        for request in requests:
            self._waiting.pop(request.request, None)
            self._orphans.discard(request.request)
            self._backend(request.backend).closes(request)
        self._registry.forget(requests)

    def _last_end(self, request: Request) -> Nanoseconds:
        for book in self._devices.values():
            book.look()
        ends = [int(book.tallies.last_end[request.slot]) for book in self._devices.values()]
        return Nanoseconds(max([request.started, *ends]))

    # --- facts ---

    def attribution(self, request: str, at: Nanoseconds | None = None) -> Attribution | None:
        """What is known of a request now: provisional, or settled and not yet drained. None for an unknown one."""
        known = self._registry.open.get(request)
        if known is None:
            return next((each for each in reversed(self._settled) if each.request == request), None)
        ended = known.finished if known.finished is not None else at if at is not None else self._now
        return self._attribution(known, *self._provisional_shares(known, ended), ended=ended, settled=False)

    def _attribution(
        self, request: Request, devices: dict[str, DeviceShare], unmeasured: tuple[str, ...],
        *, ended: int, settled: bool,
    ) -> Attribution:  # fmt: skip
        return Attribution(
            request.request, request.backend, request.outcome, settled, self._method(request, devices),
            request.started, Nanoseconds(max(ended, request.started)), devices, unmeasured,
        )  # fmt: skip

    def _provisional_shares(self, request: Request, until: int) -> tuple[dict[str, DeviceShare], tuple[str, ...]]:
        """By device it worked on; a backend that reports steps and had none for it did nothing, as far as it told."""
        backend = self._backends[request.backend]
        known_idle = backend.devices if backend.reports else ()
        told_until = until if backend.relayed else max(backend.reported, request.started)
        lost_ratio = backend.lost_ratio(request)
        shares: dict[str, DeviceShare] = {}
        unmeasured: tuple[str, ...] = ()
        for name, book in self._devices.items():
            silence = book.unsettled(told_until, until) if name in known_idle else 0
            share = book.provisional(request, lost_ratio, silence, len(backend.open) + 1)
            if share is None:
                if name in known_idle:
                    shares[name] = book.nothing(silence, len(backend.open) + 1)
            elif book.settled_until is None:
                unmeasured += (name,)
            else:
                shares[name] = share
        return shares, unmeasured

    def _attributions(self, requests: Sequence[Request], slots: Ints) -> list[Attribution]:
        """The settled facts of these requests, device by device for all of them."""
        shares: list[dict[str, DeviceShare]] = [{} for _ in requests]
        unmeasured: list[tuple[str, ...]] = [()] * len(requests)
        lost_ratios = np.array([self._backend(request.backend).lost_ratio(request) for request in requests])
        for name, book in self._devices.items():
            self._add_shares(name, book, slots, lost_ratios, shares, unmeasured)
        for place, request in enumerate(requests):
            if request.announced and not shares[place] and not self._backends[request.backend].reports:
                unmeasured[place] = tuple(self._devices)  # its backend told nothing: it may have worked anywhere
        return [
            self._attribution(request, own, none, ended=request.finished or request.started, settled=True)
            for request, own, none in zip(requests, shares, unmeasured, strict=True)
        ]

    def _add_shares(
        self, name: str, book: DeviceBook, slots: Ints, lost_ratios: Floats,
        shares: list[dict[str, DeviceShare]], unmeasured: list[tuple[str, ...]],
    ) -> None:  # fmt: skip
        worked = book.tallies.last_end[slots] > NEVER
        unseen = worked & ~book.measured(slots)
        for place in np.flatnonzero(unseen).tolist():
            unmeasured[place] += (name,)
        if book.settled_until is None:
            return
        reporting = np.array([bool(each.reports) and name in each.devices for each in self._backends.values()])
        known = np.flatnonzero((worked | reporting[self._registry.backend[slots]]) & ~unseen)
        for place, share in zip(known.tolist(), book.shares(slots[known], lost_ratios[known]), strict=True):
            shares[place][name] = share

    def _method(self, request: Request, devices: dict[str, DeviceShare]) -> Method:
        if devices and self._measuring.isdisjoint(devices):
            return "estimated"
        backend = self._backends[request.backend]
        if not backend.reports:
            return "measured-window"
        return METHODS[request.rank or (_RANK["measured-tokens"] if backend.relayed else 0)]

    def drain(self, most: int | None = None) -> list[Attribution]:
        """The attributions that have settled and were not drained yet, in that order: all of them, or `most`."""
        settled = self._settled[:most]
        self._settled = self._settled[len(settled) :]
        return settled

    def devices(self) -> list[DeviceBalance]:
        return [book.balance() for book in self._devices.values()]

    def models(self) -> list[Model]:
        """The coefficients learnt, to be given back as events after a restart."""
        return [
            Model(backend.name, name, coefficients)
            for name, book in self._devices.items()
            for backend in self._backends.values()
            if (coefficients := book.coefficients(backend.index))
        ]


def _check_time(time: int) -> None:
    if not -LIMIT < time < LIMIT:
        raise EventError(f"time is out of range: {time}")


def _check_step(step: Step) -> None:
    if not -LIMIT < step.started <= step.ended < LIMIT:
        _check_time(step.started)
        _check_time(step.ended)
        raise EventError(f"step of {step.backend} ends before it begins: {step.ended} < {step.started}")
    if not len(step.requests) == len(step.tokens) == len(step.contexts):
        raise EventError(f"step of {step.backend} has columns of different lengths")


def _work(column: Sequence[int], step: Step) -> Floats:
    amounts = np.array(column, dtype=np.float64)
    if not (amounts.min() >= 0 and amounts.max() <= _MOST_WORK):
        raise _implausible(step)
    return amounts


def _work_alone(step: Step) -> tuple[int, int, int]:
    """Repetitions, tokens and context. What a relay saw of a request beyond its prompt was computed token by token."""
    if not step.requests:
        return 1, 0, 0
    tokens, context = step.tokens[0], step.contexts[0]
    if not (0 <= tokens <= _MOST_WORK and 0 <= context <= _MOST_WORK):
        raise _implausible(step)
    if step.source == "relay" and 1 < tokens < context:
        return tokens, 1, context - tokens // 2
    return 1, tokens, context


def _implausible(step: Step) -> EventError:
    negative = min(*step.tokens, *step.contexts) < 0
    return EventError(f"step of {step.backend} has {'negative' if negative else 'implausibly much'} work")
