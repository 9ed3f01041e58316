"""`joulegate serve --record`: the ledger's events, as they come in, as a trace on disk that may be left on.

The callers only append to a bounded queue; a thread of its own encodes, writes and rotates. What does not fit, or cannot
be written, is dropped and counted, and the trace says so (`loss`). Every file of a rotation can be replayed alone: it
begins with the devices, and with the requests and loadings under way.

A trace holds request ids, times and amounts of work; no prompts, keys or addresses. Files are readable by their owner only.
"""

import logging
import os
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from proxy.energy.events import UNKNOWN_REQUEST, BackendState, Device, Event, Finish, Loss, Start, Step
from proxy.errors import JoulegateError
from proxy.trace import encode

log = logging.getLogger(__name__)

MAX_BYTES = 128 * 1024 * 1024
BACKUPS = 4
QUEUE_LIMIT = 100_000
FLUSH_SECONDS = 0.25
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
        self._lock = threading.Lock()
        self._told_at = float("-inf")
        self._stopping = threading.Event()
        try:
            self._files.open([])
        except OSError as error:
            raise RecordingError(f"cannot record to {path}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._run, name="joulegate-recorder", daemon=True)
        self._thread.start()

    def record(self, events: Sequence[Event]) -> None:
        """Take events in, in the order the ledger gets them. From any thread; never blocks on the disk."""
        with self._lock:
            if self._queued + len(events) > self._queue_limit:
                self._lose(events)
                return
            self._queue.append(events)
            self._queued += len(events)

    def close(self) -> None:
        """Write what is queued and end. The trace is complete when this returns."""
        self._stopping.set()
        self._thread.join(timeout=10)
        self._files.close()

    def _run(self) -> None:
        while not self._stopping.wait(FLUSH_SECONDS):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        events = self._take()
        if not events:
            return
        try:
            self._files.write(self._lines(events), self._state)
        except OSError as error:
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
        return losses + [event for batch in batches for event in batch]

    def _lose(self, events: Iterable[Event]) -> None:
        for event in events:
            self.lost += 1
            if isinstance(event, Step):
                self._lost_steps[event.backend] += 1
            elif isinstance(event, Loss):
                self._lost_steps[event.backend] += event.reports

    def _lines(self, events: Iterable[Event]) -> Iterator[bytes]:
        for event in events:
            yield encode(self._state.as_recorded(event))

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

    def head(self) -> list[bytes]:
        return [encode(event) for event in (*self._devices.values(), *self._loading.values(), *self._open.values())]

    def as_recorded(self, event: Event) -> Event:
        """Note what the event changes, and rid it of what only the live ledger may meet.

        That is steps on devices without a meter, and ids that the proxy never gave: a replay would take them for
        requests, while the live ledger books them as nobody's.
        """
        if isinstance(event, Step):
            return self._replayable(event)
        if isinstance(event, Device):
            self._devices[event.device] = event
        elif isinstance(event, Start):
            self._begin(event)
        elif isinstance(event, Finish):
            self._open.pop(event.request, None)
        elif isinstance(event, BackendState):
            return self._load(event)
        return event

    def _begin(self, event: Start) -> None:
        self._open[event.request] = event
        self._known[event.request] = None
        while len(self._known) > REMEMBERED_REQUESTS + len(self._open):
            self._known.popitem(last=False)

    def _load(self, event: BackendState) -> BackendState:
        event = replace(event, devices=self._metered(event.devices))
        key = (event.backend, event.devices)
        if event.loading:
            self._loading[key] = event
        else:
            self._loading.pop(key, None)
        return event

    def _replayable(self, step: Step) -> Step:
        known, devices = self._known, self._metered(step.devices)
        if devices == step.devices and all(request in known for request in step.requests):
            return step
        requests = [request if request in known else UNKNOWN_REQUEST for request in step.requests]
        return replace(step, devices=devices, requests=requests)

    def _metered(self, devices: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(device for device in devices if device in self._devices)


class _Files:
    """The file being written, and the full ones before it."""

    def __init__(self, path: Path, max_bytes: int, backups: int) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._file: BinaryIO | None = None
        self._size = 0
        self._head_size = 0

    def write(self, lines: Iterable[bytes], state: _State) -> None:
        """Write lines, to the next file where this one is full, and flush. Raises OSError."""
        for line in lines:
            if self._file is None or (self._size + len(line) > self._max_bytes and self._size > self._head_size):
                self.open(state.head())
            self._put(line)
        if self._file is not None:
            self._file.flush()

    def open(self, head: Sequence[bytes]) -> None:
        """Begin a new file with `head`; the one before becomes a backup."""
        self.close()
        self._rotate()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = open(descriptor, "wb")  # noqa: SIM115 - closed by close()
        self._size = 0
        for line in head:
            self._put(line)
        self._head_size = self._size

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _put(self, line: bytes) -> None:
        assert self._file is not None
        self._file.write(line)
        self._size += len(line)

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
