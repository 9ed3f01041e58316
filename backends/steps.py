"""Step reports: what an engine did, step by step, told to the proxy over a local socket.

The format is one msgpack map per message of a `SOCK_SEQPACKET` Unix socket, see `StepMessage`. The engine's side
(`StepReporter`) needs no event loop and never blocks: what it cannot send it keeps, what it cannot keep it drops, and
what it drops it counts and tells. The proxy's side (`StepReceiver`) believes only processes of its own user that name
a backend it knows.

Times are nanoseconds of the monotonic clock, which all processes of one host share.
"""

import asyncio
import errno
import functools
import logging
import os
import re
import secrets
import socket
import stat
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

logger = logging.getLogger(__name__)

#: The version of the messages; a receiver refuses any other.
VERSION = 1

#: Environment variables by which the supervisor tells an engine where and as whom to report.
SOCKET_VARIABLE = "JOULEGATE_STEPS_SOCKET"
BACKEND_VARIABLE = "JOULEGATE_BACKEND"
DEVICES_VARIABLE = "JOULEGATE_DEVICES"
#: Set for engines that the supervisor started, as opposed to those that only report to it.
SUPERVISED_VARIABLE = "JOULEGATE_SUPERVISED"

#: A message is refused beyond this size, and no kernel default lets one grow larger.
MAX_MESSAGE_BYTES = 1 << 20

_MESSAGE_PARTICIPANTS = 1024  # steps are joined into one message up to this many
_KEPT_PARTICIPANTS = 65_536  # what a sender keeps while nobody listens, some 10 MB
_KEPT_STEPS = 4096
_KEPT_STATES = 16
_WHY_CHARACTERS = 500
_SEND_BUFFER_BYTES = 1 << 20
_RECONNECT_NANOSECONDS = 500_000_000
_FULL_NANOSECONDS = 5_000_000  # how long a full socket is left alone

_FUTURE_NANOSECONDS = 1_000_000_000  # a step that ended later than this from now was timed by another clock
_MAX_CONNECTIONS = 64
_MAX_SOURCES = 1024
_MESSAGES_PER_WAKE = 64
_UNIX_PATH_BYTES = 107  # sockaddr_un's 108 with the final zero

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]


class StepReport(msgspec.Struct, frozen=True, array_like=True):
    """One step: who worked (column-wise, one entry per participant), how much, on which devices and when.

    `requests[i]` is the id the proxy gave, or "" for work it did not ask for; it computed `tokens[i]` and held a
    context of `contexts[i]` at the step's end. A request may stand in several entries.
    """

    started: Count
    ended: Count
    devices: tuple[str, ...]
    requests: list[str]
    tokens: list[Count]
    contexts: list[Count]

    def __post_init__(self) -> None:
        if not len(self.requests) == len(self.tokens) == len(self.contexts):
            raise ValueError("requests, tokens and contexts differ in length")
        if self.ended < self.started:
            raise ValueError("the step ends before it starts")


class LoadingState(msgspec.Struct, frozen=True, array_like=True):
    """An engine begins (`loading=True`) or ends loading or warming up on its devices."""

    at: Count
    loading: bool
    devices: tuple[str, ...]


class StepMessage(msgspec.Struct, frozen=True):
    """What goes over the socket.

    `source` names the sending process (an engine may have several, and each restart is another). `sequence` counts the
    steps it has sent before this message, so that a gap is the number of steps lost on the way; `lost` counts the
    steps it dropped itself. Both only rise. `unable` is why the engine will tell no steps at all, "" while it does.
    """

    v: int
    backend: str
    source: str
    sequence: Count
    lost: Count
    steps: list[StepReport] = []
    states: list[LoadingState] = []
    unable: str = ""


_ATTEMPT = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?:\.[0-9]{1,4})?(?![0-9a-f])")


@functools.lru_cache(maxsize=16_384)
def attempt_id(engine_id: str) -> str:
    """The id the proxy gave, found inside the id an engine made of it (`chatcmpl-<id>-1f2e3d4c`); "" without one."""
    found = _ATTEMPT.search(engine_id)
    return found.group() if found else ""


# --- the engine's side ---

#: A step's column of ids, or what `encoded` made of it.
Ids = Sequence[str] | msgspec.Raw


class StepReporter:
    """Tells an engine's steps to the proxy; safe to call from several threads, never blocks, never raises.

    Steps leave at once, or `group` at a time but at most `max_age` seconds late. Without a proxy at the socket they
    are kept (the oldest are dropped first) and a new connection is tried twice a second.
    """

    def __init__(
        self, path: Path | None, backend: str, devices: tuple[str, ...], *, group: int = 1, max_age: float = 0.02
    ) -> None:
        self.backend = backend
        self.devices = devices
        self._group = group
        self._max_age = max_age
        self._lock = threading.Lock()
        self._outbox = _Outbox(backend)
        self._line = _Line(path) if path else None
        self._pending = threading.Event()
        self._flusher: threading.Thread | None = None
        self._closed = False

    @classmethod
    def from_environment(
        cls, *, group: int = 1, max_age: float = 0.02, environment: Mapping[str, str] = os.environ
    ) -> "StepReporter":
        """The reporter the supervisor asked for; one that does nothing outside the supervisor."""
        path = environment.get(SOCKET_VARIABLE)
        devices = tuple(part.strip() for part in environment.get(DEVICES_VARIABLE, "host").split(",") if part.strip())
        backend = environment.get(BACKEND_VARIABLE, "")
        return cls(Path(path) if path else None, backend, devices, group=group, max_age=max_age)

    @property
    def active(self) -> bool:
        """Whether there is anybody to report to."""
        return self._line is not None

    @property
    def lost(self) -> int:
        """Steps dropped so far because nobody took them."""
        return self._outbox.lost

    def report(
        self,
        started_ns: int,
        ended_ns: int,
        requests: Ids,
        tokens: Sequence[int],
        contexts: Sequence[int],
        *,
        devices: tuple[str, ...] | None = None,
    ) -> None:
        """Report one step; the columns must not be changed afterwards."""
        if self._line is None:
            return
        step = (started_ns, ended_ns, devices or self.devices, requests, tokens, contexts)
        with self._lock:
            self._outbox.add(step)
            if self._outbox.steps >= self._group:
                self._flush()
            left = self._outbox.steps
        if left:
            self._send_later()

    def state(self, loading: bool) -> None:
        """Tell that loading or warm-up begins or ends now."""
        if self._line is None:
            return
        with self._lock:
            self._outbox.add_state(LoadingState(time.monotonic_ns(), loading, self.devices))
            self._flush()
            left = not self._outbox.empty
        if left:
            self._send_later()

    def unable(self, why: str) -> None:
        """Tell that this engine's steps cannot be known, so that the proxy does without them."""
        with self._lock:
            self._outbox.unable = why[:_WHY_CHARACTERS]
            self._outbox.add_state(LoadingState(time.monotonic_ns(), False, self.devices))  # it goes with a message
            self._flush()
            left = not self._outbox.empty
        if left and self._line is not None:
            self._send_later()

    def flush(self) -> None:
        """Send what is there now, as far as the proxy takes it."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Send what is left and hang up."""
        self._closed = True
        self._pending.set()
        with self._lock:
            self._flush()
            if self._line:
                self._line.close()

    def _flush(self) -> None:
        while self._line and not self._outbox.empty and self._line.ready():
            outcome = self._line.send(self._outbox.message())
            if outcome == _LATER:
                return
            self._outbox.taken() if outcome == _SENT else self._outbox.refused()

    def _send_later(self) -> None:
        """Have a thread of our own send what an idle engine would otherwise sit on."""
        if self._flusher is None and not self._closed:
            self._flusher = threading.Thread(target=self._keep_flushing, name="step-reporter", daemon=True)
            self._flusher.start()
        self._pending.set()

    def _keep_flushing(self) -> None:
        while not self._closed:
            self._pending.wait()
            time.sleep(self._max_age)
            with self._lock:
                self._flush()
                if self._outbox.empty:
                    self._pending.clear()


#: A step on its way out: the fields of `StepReport`, unchecked, as the engine gave them.
_Outgoing = tuple[int, int, tuple[str, ...], Ids, Sequence[int], Sequence[int]]


def _participants(step: _Outgoing) -> int:
    return len(step[4])


def encoded(ids: Sequence[str]) -> msgspec.Raw:
    """Ids that will be reported many times, as they go over the socket."""
    return msgspec.Raw(msgspec.msgpack.encode(ids))


class _Outbox:
    """Steps that wait to be sent, bounded; knows what a message holds and counts what was sent and lost."""

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self._source = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._steps: deque[_Outgoing] = deque()
        self._states: deque[LoadingState] = deque(maxlen=_KEPT_STATES)
        self._participants = 0
        self._sequence = 0
        self._in_message = 0
        self._states_in_message = 0
        self._encoder = msgspec.msgpack.Encoder()
        self.lost = 0
        self.unable = ""

    @property
    def steps(self) -> int:
        return len(self._steps)

    @property
    def empty(self) -> bool:
        return not self._steps and not self._states

    def add(self, step: _Outgoing) -> None:
        self._steps.append(step)
        self._participants += _participants(step)
        while len(self._steps) > 1 and (len(self._steps) > _KEPT_STEPS or self._participants > _KEPT_PARTICIPANTS):
            self._drop_oldest()

    def add_state(self, state: LoadingState) -> None:
        self._states.append(state)

    def message(self) -> bytes:
        """The next message, which stays here until it is `taken` or `refused`."""
        self._in_message, participants = 0, 0
        for step in self._steps:
            participants += _participants(step)
            if self._in_message and participants > _MESSAGE_PARTICIPANTS:
                break
            self._in_message += 1
        self._states_in_message = len(self._states)
        steps = [self._steps[index] for index in range(self._in_message)]
        return self._encoder.encode(
            {
                "v": VERSION,
                "backend": self._backend,
                "source": self._source,
                "sequence": self._sequence,
                "lost": self.lost,
                "steps": steps,
                "states": list(self._states),
                "unable": self.unable,
            }
        )

    def taken(self) -> None:
        self._sequence += self._in_message
        for _ in range(self._in_message):
            self._take_oldest()
        for _ in range(self._states_in_message):
            self._states.popleft()

    def refused(self) -> None:
        """The message can never be sent: it is too large."""
        for _ in range(self._in_message):
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        self._take_oldest()
        self.lost += 1

    def _take_oldest(self) -> None:
        self._participants -= _participants(self._steps.popleft())


_SENT, _LATER, _NEVER = "sent", "later", "never"


class _Line:
    """The connection to the proxy: opened when needed, not oftener than twice a second, never waited for."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._socket: socket.socket | None = None
        self._retry_at = 0
        self._reconnect_at = 0

    def ready(self) -> bool:
        """Whether sending is worth the making of a message; opens the connection when it is time."""
        now = time.monotonic_ns()
        if self._socket is not None:
            return now >= self._retry_at
        if now < self._reconnect_at:
            return False
        self._reconnect_at = now + _RECONNECT_NANOSECONDS
        return self._connect()

    def send(self, message: bytes) -> str:
        """Hand one message to the kernel: it is sent, must be tried later, or can never be sent."""
        assert self._socket is not None
        try:
            self._socket.send(message, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._retry_at = time.monotonic_ns() + _FULL_NANOSECONDS
            return _LATER
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                return _NEVER
            self.close()
            return _LATER
        return _SENT

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> bool:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            line.connect(self._path)
        except OSError:
            line.close()
            return False
        self._socket = line
        return True


# --- the proxy's side ---


@dataclass(slots=True)
class _Progress:
    """What a source has sent and lost, as far as we know."""

    sequence: int
    lost: int


class StepReceiver:
    """Takes step reports at `path`, whose directory is made (or must be) private to this user.

    `on_steps(backend, steps)`, `on_loss(backend, steps lost since the last call)` and `on_state(backend, state)` are
    called in the event loop, and `on_unable(backend, why)` when an engine cannot tell its steps (it is logged by
    default). Only `backends` may report (the collection may change meanwhile). A malformed message is logged and ends
    its connection.
    """

    def __init__(
        self,
        path: Path,
        *,
        backends: Collection[str],
        on_steps: Callable[[str, Sequence[StepReport]], None],
        on_loss: Callable[[str, int], None],
        on_state: Callable[[str, LoadingState], None],
        on_unable: Callable[[str, str], None] | None = None,
    ) -> None:
        self.path = path
        self._backends = backends
        self._on_steps = on_steps
        self._on_loss = on_loss
        self._on_state = on_state
        self._on_unable = on_unable or _log_unable
        self._listener: socket.socket | None = None
        self._connections: set[socket.socket] = set()
        self._progress: OrderedDict[tuple[str, str], _Progress] = OrderedDict()
        self._decoder = msgspec.msgpack.Decoder(StepMessage)
        self._buffer = memoryview(bytearray(MAX_MESSAGE_BYTES))

    async def start(self) -> None:
        """Listen. Raises OSError when the socket cannot be made, or not in private."""
        _make_way(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listener.bind(str(self.path))
            os.chmod(self.path, 0o600)
            listener.listen(_MAX_CONNECTIONS)
        except OSError:
            listener.close()
            raise
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept, listener)

    async def close(self) -> None:
        """Take what has already been sent, hang up and remove the socket."""
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            self.path.unlink(missing_ok=True)
        for connection in list(self._connections):
            self._read(connection)
            self._drop(connection)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        uid = _peer_uid(connection)
        if uid != os.geteuid() or len(self._connections) >= _MAX_CONNECTIONS:
            why = f"user id {uid}" if uid != os.geteuid() else f"more than {_MAX_CONNECTIONS} connections"
            logger.warning("refused a step reporter at %s: %s", self.path, why)
            connection.close()
            return
        connection.setblocking(False)
        self._connections.add(connection)
        asyncio.get_running_loop().add_reader(connection.fileno(), self._read, connection)

    def _read(self, connection: socket.socket) -> None:
        for _ in range(_MESSAGES_PER_WAKE):
            try:
                size, _, flags, _ = connection.recvmsg_into([self._buffer])
                if not size:
                    return self._drop(connection)
                if flags & socket.MSG_TRUNC:
                    raise ValueError(f"larger than {MAX_MESSAGE_BYTES} bytes")
                self._take(self._checked(self._buffer[:size]))
            except BlockingIOError:
                return None
            except (ValueError, OSError) as error:  # msgspec's errors are ValueErrors
                logger.warning("dropped a step reporter at %s: malformed message: %s", self.path, error)
                return self._drop(connection)
        return None

    def _checked(self, data: memoryview) -> StepMessage:
        message = self._decoder.decode(data)
        if message.v != VERSION:
            raise ValueError(f"version {message.v}, this is {VERSION}: run the same joulegate in the engine")
        if message.backend not in self._backends:
            raise ValueError(f"no backend is called {message.backend[:100]!r}")
        horizon = time.monotonic_ns() + _FUTURE_NANOSECONDS
        if any(step.ended > horizon for step in message.steps):
            raise ValueError("a step ended in the future: the engine's monotonic clock is not this host's")
        return message

    def _take(self, message: StepMessage) -> None:
        lost = self._newly_lost(message)
        if lost:
            self._on_loss(message.backend, lost)
        if message.unable:
            self._on_unable(message.backend, message.unable)
        for state in message.states:
            self._on_state(message.backend, state)
        if message.steps:
            self._on_steps(message.backend, message.steps)

    def _newly_lost(self, message: StepMessage) -> int:
        """Steps lost since this source's last message, on the way or at the sender."""
        key = (message.backend, message.source)
        # A source that is new to us but has already sent talked to an earlier proxy: its past is not our loss.
        first = _Progress(message.sequence, message.lost if message.sequence else 0)
        known = self._progress.pop(key, first)
        lost = max(0, message.sequence - known.sequence) + max(0, message.lost - known.lost)
        self._progress[key] = _Progress(message.sequence + len(message.steps), message.lost)
        if len(self._progress) > _MAX_SOURCES:
            self._progress.popitem(last=False)
        return lost

    def _drop(self, connection: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(connection.fileno())
        self._connections.discard(connection)
        connection.close()


def _log_unable(backend: str, why: str) -> None:
    logger.warning("%s: its engine cannot tell its steps: %s", backend, why)


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return int(uid)


def private_directory(path: Path) -> None:
    """Make `path` a folder only this user can enter. Raises OSError if it is one that others can."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise OSError(f"{path}: must belong to user id {os.geteuid()} with mode 0700 (chmod 700 {path})")


def _make_way(path: Path) -> None:
    """See to it that only this user will reach the socket at `path`, and that nothing stale stands there."""
    if len(os.fsencode(path)) > _UNIX_PATH_BYTES:
        raise OSError(f"{path}: longer than the {_UNIX_PATH_BYTES} bytes a Unix socket's path may have")
    private_directory(path.parent)
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        path.unlink()
