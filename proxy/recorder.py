"""`joulegate serve --record`: the ledger's events, as they come in, as a trace on disk that may be left on.

The callers only append to a bounded queue; a thread of its own encodes, writes and rotates. What does not fit, or
cannot be written, is dropped and counted, and the trace says so (`loss`). Files hold whole lines only, even on a full
disk. Each file of a rotation can be replayed alone: it begins with the devices, requests and loadings under way.

A trace holds request ids, times and amounts of work; no prompts, keys or addresses. Only its owner may read it.
"""

import itertools
import logging
import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec.structs import replace

from proxy.energy.events import (
    UNKNOWN_REQUEST,
    BackendState,
    Device,
    Event,
    Finish,
    Loss,
    Model,
    Processes,
    Sample,
    Start,
    Step,
)
from proxy.errors import JoulegateError
from proxy.trace import encode

log = logging.getLogger(__name__)

MAX_BYTES = 128 * 1024 * 1024
BACKUPS = 4
QUEUE_LIMIT = 100_000
FLUSH_SECONDS = 0.25
RETRY_SECONDS = 1.0
LOG_PAUSE = 60.0

#: Ids of requests of which a step may still be reported after they finished.
REMEMBERED_REQUESTS = 50_000


class RecordingError(JoulegateError):
    """A trace cannot be written where it should be; `str()` says where and why."""


class Recorder:
    """Records to `path`; full files become `path.1` (the youngest) to `path.<backups>`. Raises RecordingError.

    An existing `path` is kept as a backup, never overwritten. On disk there are at most (backups + 1) * max_bytes.
    """

    def __init__(
        self, path: Path, max_bytes: int = MAX_BYTES, backups: int = BACKUPS, *, queue_limit: int = QUEUE_LIMIT
    ) -> None:
        self.lost = 0
        self._files = _Files(path, max_bytes, backups)
        self._state = _State()
        self._queue: deque[Sequence[Event]] = deque()
        self._queued = 0
        self._queue_limit = queue_limit
        self._lost_steps: Counter[str] = Counter()
        self._lock = threading.Lock()  # of the queue; held for moments
        self._writing = threading.Lock()
        self._retry_at = self._told_at = float("-inf")
        self._stopping = threading.Event()
        try:
            self._files.open()
        except OSError as error:
            raise RecordingError(f"cannot record to {path}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="joulegate-recorder", daemon=True)
        self._thread.start()

    def record(self, events: Sequence[Event]) -> None:
        """Take events in, in the order the ledger gets them. From any thread; never blocks on the disk."""
        with self._lock:
            if self._queued + len(events) > self._queue_limit:
                events = self._without_the_bulk(events)
            self._queue.append(events)
            self._queued += len(events)

    def _without_the_bulk(self, events: Sequence[Event]) -> Sequence[Event]:
        """What a full queue still takes: all but steps and samples; nothing once it is twice as full."""
        bulk = (Step, Sample, Processes) if self._queued < 2 * self._queue_limit else object
        self._lose(event for event in events if isinstance(event, bulk))
        return [event for event in events if not isinstance(event, bulk)]

    def close(self) -> None:
        """Write what is queued and end. The trace is complete when this returns."""
        self._stopping.set()
        self._thread.join(timeout=10)
        self.flush()
        self._files.close()

    def _run(self) -> None:
        while not self._stopping.wait(FLUSH_SECONDS):
            if time.monotonic() >= self._retry_at:
                self.flush()

    def flush(self) -> None:
        """Write what is queued now. Happens by itself four times a second."""
        with self._writing:
            self._write_queue()

    def _write_queue(self) -> None:
        chunk, events = bytearray(), list[Event]()
        if not self._files.is_open:
            self._files.next(self._state.head())
        for event in self._take():
            recordable = self._state.recordable(event)
            if recordable is None:
                continue
            line = encode(recordable)
            if self._files.is_full_with(len(chunk), len(line)):
                self._write(bytes(chunk), events)
                chunk, events = bytearray(), []
                self._files.next(self._state.head())
            chunk += line
            events.append(event)
            self._state.note(event)
        self._write(bytes(chunk), events)

    def _write(self, chunk: bytes, events: Sequence[Event]) -> None:
        if not events:
            return
        try:
            self._files.write(chunk)
        except OSError as error:
            self._files.close()
            self._retry_at = time.monotonic() + RETRY_SECONDS
            with self._lock:
                self._lose(events)
            self._tell(error)

    def _take(self) -> list[Event]:
        """What is queued, after word of what was lost before it."""
        with self._lock:
            batches, self._queue = self._queue, deque()
            losses: list[Event] = [Loss(backend, count) for backend, count in self._lost_steps.items()]
            self._queued = 0
            self._lost_steps = Counter()
        return [*losses, *itertools.chain.from_iterable(batches)]

    def _lose(self, events: Iterable[Event]) -> None:
        for event in events:
            self.lost += 1
            if isinstance(event, Step):
                self._lost_steps[event.backend] += 1
            elif isinstance(event, Loss):
                self._lost_steps[event.backend] += event.reports

    def _tell(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._told_at >= LOG_PAUSE:
            self._told_at = now
            log.warning(
                "the trace %s could not be written (%s), %d events are missing in it so far; cure: make room or let "
                "this user write there; recording goes on",
                self._files.path,
                error.strerror,
                self.lost,
            )


class _State:
    """What a file must begin with to be replayed alone, and which ids are requests of the proxy's."""

    def __init__(self) -> None:
        self._devices: dict[str, Device] = {}
        self._open: dict[str, Start] = {}
        self._loading: dict[tuple[str, tuple[str, ...]], BackendState] = {}
        self._known: OrderedDict[str, None] = OrderedDict()

    def head(self) -> bytes:
        events: list[Event] = [*self._devices.values(), *self._loading.values(), *self._open.values()]
        return b"".join(encode(event) for event in events)

    def recordable(self, event: Event) -> Event | None:
        """The event rid of what only the live ledger may meet; None for one of a device that is not declared.

        That is devices without a meter, and ids that the proxy never gave: a replay would take them for requests, while
        the live ledger books them as nobody's.
        """
        if isinstance(event, Step):
            return self._replayable(event)
        if isinstance(event, BackendState):
            return replace(event, devices=self._metered(event.devices))
        if isinstance(event, Sample | Processes | Model) and event.device not in self._devices:
            return None
        return event

    def note(self, event: Event) -> None:
        """Remember what the next file must begin with once this event is written."""
        if isinstance(event, Device):
            self._devices[event.device] = event
        elif isinstance(event, Start):
            self._begin(event)
        elif isinstance(event, Finish):
            self._open.pop(event.request, None)
        elif isinstance(event, BackendState):
            self._load(replace(event, devices=self._metered(event.devices)))

    def _begin(self, event: Start) -> None:
        self._open[event.request] = event
        self._known[event.request] = None
        while len(self._known) > REMEMBERED_REQUESTS + len(self._open):
            self._known.popitem(last=False)

    def _load(self, event: BackendState) -> None:
        key = (event.backend, event.devices)
        if event.loading:
            self._loading[key] = event
        else:
            self._loading.pop(key, None)

    def _replayable(self, step: Step) -> Step:
        known, devices = self._known, self._metered(step.devices)
        if devices == step.devices and all(request in known for request in step.requests):
            return step
        requests = [request if request in known else UNKNOWN_REQUEST for request in step.requests]
        return replace(step, devices=devices, requests=requests)

    def _metered(self, devices: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(device for device in devices if device in self._devices)


class _Files:
    """The file being written, and the full ones before it. Methods raise OSError."""

    def __init__(self, path: Path, max_bytes: int, backups: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._head = b""
        self._file = -1
        self._size = 0
        self._head_size = 0

    @property
    def is_open(self) -> bool:
        return self._file >= 0

    def is_full_with(self, pending: int, line: int) -> bool:
        """A line longer than a whole file gets a file of its own."""
        has_content = self._size + pending > self._head_size
        return has_content and self._size + pending + line > self._max_bytes

    def next(self, head: bytes) -> None:
        """What is written from now on goes to a new file that begins with `head`."""
        self.close()
        self._head = head

    def open(self) -> None:
        """Begin the new file; the one before becomes a backup."""
        self._rotate()
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            self._put(self._head)
        except OSError:
            self.close()
            raise
        self._head_size = self._size

    def write(self, lines: bytes) -> None:
        """All of `lines`, or none of them."""
        if not self.is_open:
            self.open()
        self._put(lines)

    def close(self) -> None:
        file, self._file, self._size, self._head_size = self._file, -1, 0, 0
        if file >= 0:
            os.close(file)

    def _put(self, lines: bytes) -> None:
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, self._size, os.SEEK_SET)
            raise
        self._size += len(lines)

    def _rotate(self) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0 or not self._backups:
            self.path.unlink(missing_ok=True)
            return
        for number in range(self._backups - 1, 0, -1):
            if self._backup(number).exists():
                os.replace(self._backup(number), self._backup(number + 1))
        os.replace(self.path, self._backup(1))

    def _backup(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")
