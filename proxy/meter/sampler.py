"""The sampler: reads all meters on a thread of its own, and emits what they say as the ledger's events.

A meter that fails is told of once with its cure (again every minute), tried again within a second, and never holds up
the others' events; a meter whose driver hangs shows as down by the age of its last reading.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from proxy.energy.events import Device, Event, Processes, Sample
from proxy.energy.quantities import Nanoseconds
from proxy.meter.base import ComparedMeter, Meter, MeterError, SharedMeter
from proxy.meter.processes import ProcessTable

log = logging.getLogger(__name__)

HOST = "host"

#: Processes are looked at this often (seconds): often enough not to hold up the ledger's windows.
PROCESSES_PAUSE = 0.5

#: A meter that fails is tried again after one period, then after twice as long, up to this many seconds.
LONGEST_RETRY_PAUSE = 1.0

#: A meter whose last good reading is older (seconds, and in periods) is down, whatever it says.
STALE_SECONDS = 2.0
STALE_PERIODS = 5

#: One line of log per meter and kind of trouble (one cure is one kind) in so many seconds.
LOG_PAUSE = 60.0

#: A meter's accuracy is emitted anew when it has changed by more than this.
NOTABLE_ACCURACY_CHANGE = 0.02


@dataclass(frozen=True, slots=True)
class MeterStatus:
    """A meter as `joulegate_meter_up` and the devices' list show it. `error` is why it is down, with the cure."""

    device: str
    kind: str
    name: str
    up: bool
    error: str | None
    disagreement: float | None


def next_due(due: float, now: float, period: float) -> float:
    """The first whole number of periods after `due` that is yet to come: no drift, and missed rounds stay missed."""
    return due + period * (1 + max(0, int((now - due) / period)))


class _Troubles:
    """Which lines were logged lately."""

    def __init__(self) -> None:
        self._told: dict[str, float] = {}

    def are_news(self, what: str) -> bool:
        now = time.monotonic()
        if now - self._told.get(what, float("-inf")) < LOG_PAUSE:
            return False
        self._told[what] = now
        return True


class _Watched:
    """One meter and how it fares."""

    def __init__(self, meter: Meter, period: float) -> None:
        self.meter = meter
        self.error: str | None = None
        self._period = period
        self._retry_pause = period
        self._retry_at = 0.0
        self._read_at = float("-inf")
        self._troubles = _Troubles()
        self._accuracy = meter.accuracy_ratio

    def device(self) -> Device:
        meter = self.meter
        self._accuracy = meter.accuracy_ratio
        return Device(meter.device, meter.name, meter.kind, meter.estimated, self._accuracy)

    def accuracy_has_changed(self) -> bool:
        now = self.meter.accuracy_ratio
        if now is None or self._accuracy is None:
            return now is not self._accuracy
        return abs(now - self._accuracy) > NOTABLE_ACCURACY_CHANGE

    def sample(self) -> Sample | None:
        """A sample taken now; None if the meter fails or waits to be tried again."""
        began = time.monotonic_ns()
        if self.error is not None and began / 1e9 < self._retry_at:
            return None
        try:
            reading = self.meter.read()
        except Exception as error:  # a meter's bug must not end the sampling of the others
            self._failed(error)
            return None
        ended = time.monotonic_ns()
        self._succeeded(ended)
        return Sample(self.meter.device, Nanoseconds((began + ended) // 2), reading.energy, reading.power)

    def processes(self, ours: Collection[int]) -> Processes | None:
        """The device's foreign share, from a meter that can tell."""
        if not isinstance(self.meter, SharedMeter) or self.error is not None:
            return None
        try:
            share = self.meter.foreign_share(ours)
        except MeterError as error:
            if self._troubles.are_news(f"processes: {error.why}"):
                log.warning("%s: who uses it could not be read: %s", self.meter.device, error)
            return None
        if share is None:
            return None
        return Processes(self.meter.device, Nanoseconds(time.monotonic_ns()), share)

    def status(self) -> MeterStatus:
        meter = self.meter
        age = time.monotonic() - self._read_at
        error = self.error
        if error is None and age > max(STALE_SECONDS, STALE_PERIODS * self._period):
            error = "no reading yet" if age == float("inf") else f"no reading for {age:.0f} s: its driver may hang"
        disagreement = meter.disagreement if isinstance(meter, ComparedMeter) else None
        return MeterStatus(meter.device, meter.kind, meter.name, error is None, error, disagreement)

    def _failed(self, error: Exception) -> None:
        self._retry_pause = self._period if self.error is None else min(2 * self._retry_pause, LONGEST_RETRY_PAUSE)
        self._retry_at = time.monotonic() + self._retry_pause
        self.error = str(error) if isinstance(error, MeterError) else f"{type(error).__name__}: {error}"
        if self._troubles.are_news((error.cure or error.why) if isinstance(error, MeterError) else self.error):
            bug = None if isinstance(error, MeterError) else error
            log.warning("%s: the %s meter failed: %s", self.meter.device, self.meter.kind, self.error, exc_info=bug)

    def _succeeded(self, now: int) -> None:
        self._read_at = now / 1e9
        if self.error is not None:
            self.error = None
            log.warning("%s: the %s meter works again", self.meter.device, self.meter.kind)


class Sampler:
    """Reads `meters` `hz` times a second and hands events to `emit`, on the sampler's thread: `emit` must not block.

    `our_pids` says each backend's process ids by its name, the proxy's own under `proxy`; children are found. `emit`
    gets each meter's `Device` before its first `Sample` (and again when its accuracy changes).
    """

    def __init__(
        self,
        meters: Sequence[Meter],
        emit: Callable[[Sequence[Event]], None],
        *,
        hz: float,
        our_pids: Callable[[], Mapping[str, Collection[int]]],
    ) -> None:
        self._period = 1 / hz
        self._watched = [_Watched(meter, self._period) for meter in meters]
        self._emit = emit
        self._our_pids = our_pids
        self._table = ProcessTable()
        self._troubles = _Troubles()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="joulegate-sampler", daemon=True)
        self._look_at_processes = any(
            isinstance(each.meter, SharedMeter) or each.meter.device == HOST for each in self._watched
        )
        self._processes_due_at = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread (a meter whose driver hangs is left behind), then close the meters."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        if self._thread.is_alive():
            log.warning("the sampler still waits for a meter's driver: left behind")
            return
        for each in self._watched:
            each.meter.close()

    def status(self) -> list[MeterStatus]:
        """How each meter fares now; from any thread."""
        return [each.status() for each in self._watched]

    def _run(self) -> None:
        self._hand_over([each.device() for each in self._watched])
        due = time.monotonic()
        while not self._stopping.wait(max(0.0, due - time.monotonic())):
            self._hand_over(self._round())
            due = next_due(due, time.monotonic(), self._period)

    def _round(self) -> list[Event]:
        events: list[Event] = []
        for each in self._watched:
            sample = each.sample()
            if sample is not None:
                events.append(sample)
            if each.accuracy_has_changed():
                events.append(each.device())
        now = time.monotonic()
        if self._look_at_processes and now >= self._processes_due_at:
            self._processes_due_at = now + PROCESSES_PAUSE
            events += self._processes()
        return events

    def _processes(self) -> list[Event]:
        try:
            self._table.refresh(self._our_pids())
        except Exception as error:  # whoever supplies the ids must not end the sampling
            if self._troubles.are_news(f"pids: {error}"):
                log.warning("our processes could not be found", exc_info=error)
            return []
        ours = self._table.pids
        shares: list[Event] = [share for each in self._watched if (share := each.processes(ours)) is not None]
        return shares + self._host_processes()

    def _host_processes(self) -> list[Event]:
        if not any(each.meter.device == HOST for each in self._watched):
            return []
        shares = self._table.shares()
        if shares is None:
            return []
        return [Processes(HOST, Nanoseconds(time.monotonic_ns()), shares.foreign, shares.backends)]

    def _hand_over(self, events: Sequence[Event]) -> None:
        if not events:
            return
        try:
            self._emit(events)
        except Exception as error:  # a receiver that is closing must not end the thread with a traceback
            if self._troubles.are_news(f"emit: {error}"):
                log.warning("%d events could not be handed over", len(events), exc_info=error)
