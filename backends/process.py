"""A backend's process: started without the proxy's secrets, its logs passed on, its whole group ended together."""

import asyncio
import contextlib
import logging
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from backends import child
from backends.spec import BackendSpec, Launch
from backends.steps import BACKEND_VARIABLE, DEVICES_VARIABLE, SOCKET_VARIABLE, SUPERVISED_VARIABLE

_KEPT_LINES = 200
_LINE_CHARACTERS = 2000
_CHUNK_BYTES = 65_536
_ENDING_SECONDS = 1.0

_SECRET = re.compile(r"^JOULEGATE_|KEY|TOKEN|SECRET|PASSW|CREDENTIAL|COOKIE|_DSN$|DATABASE_URL", re.IGNORECASE)
#: Secret by their names, yet what an engine needs to fetch a gated model.
_NEEDED = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"})


def environment_of(
    spec: BackendSpec, launch: Launch, socket: Path, python_path: Path, base: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What a backend's process finds in its environment: the proxy's, without its secrets."""
    kept = {name: value for name, value in base.items() if name in _NEEDED or not _SECRET.search(name)}
    return {
        **kept,
        "PYTHONPATH": str(python_path),
        "PYTHONUNBUFFERED": "1",
        # CUDA's own order is by speed; ours is NVML's.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, spec.devices)),
        SOCKET_VARIABLE: str(socket),
        BACKEND_VARIABLE: spec.id,
        DEVICES_VARIABLE: ",".join(spec.device_names),
        SUPERVISED_VARIABLE: "1",
        **launch.environment,
    }


class BackendProcess:
    """One run of a backend's command, in a process group of its own, which does not outlive the proxy."""

    def __init__(self, process: asyncio.subprocess.Process, logs: "LogPump") -> None:
        self._process = process
        self._logs = logs
        self._pumping = asyncio.create_task(logs.run(), name=f"logs of {logs.name}")

    @classmethod
    async def start(cls, name: str, command: Sequence[str], environment: Mapping[str, str]) -> "BackendProcess":
        """Start the command; what prevents that is told by the process's end, in one line of its log."""
        wrapper = (sys.executable, "-I", "-S", child.__file__, str(os.getpid()))
        # A pipe of our own: asyncio would not see a process's end while a child it left behind holds its pipe.
        reading, writing = os.pipe()
        logs = await LogPump.connect(name, reading)
        try:
            process = await asyncio.create_subprocess_exec(
                *wrapper,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=asyncio.subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except BaseException:
            logs.close()
            raise
        finally:
            os.close(writing)
        return cls(process, logs)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_line(self) -> str:
        """The last thing it said."""
        return self._logs.lines[-1] if self._logs.lines else ""

    async def ended(self) -> str:
        """Wait until it has ended of itself; then how, in a few words."""
        return _ending(await self._process.wait())

    async def cause(self) -> str:
        """How it ended and why, as far as its log tells, if it has just ended of itself; "" while it runs on."""
        with contextlib.suppress(TimeoutError):
            # One that is killed hangs up a while before it is gone.
            async with asyncio.timeout(_ENDING_SECONDS):
                code = await self._process.wait()
            self._signal(signal.SIGKILL)  # what it may have left behind holds the device's memory, and the log open
            await self._logs_end()
            # Killed from outside, it did not say why: its last line is about something else.
            cause = cause_in(list(self._logs.lines), any_line=code >= 0)
            return f"{_ending(code)}: {cause}" if cause else _ending(code)
        return ""

    async def stop(self, grace_seconds: float) -> None:
        """End it and all it started: politely, then for certain."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                await self._process.wait()
        self._signal(signal.SIGKILL)
        await self._process.wait()
        await self._logs_end()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    async def _logs_end(self) -> None:
        # A grandchild that left the group may hold the pipe open for ever.
        await asyncio.wait([self._pumping], timeout=_ENDING_SECONDS)
        self._pumping.cancel()
        self._logs.close()


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"killed by {signal.Signals(-code).name}{hint}"


class LogPump:
    """Passes a process's output on to our log, line by line, and keeps the last of it."""

    def __init__(self, name: str, reader: asyncio.StreamReader, transport: asyncio.ReadTransport) -> None:
        self.name = name
        self.lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._logger = logging.getLogger(f"backends.{name}")
        self._reader = reader
        self._transport = transport
        self._rest = b""

    @classmethod
    async def connect(cls, name: str, pipe: int) -> "LogPump":
        """Over the reading end of a pipe, which is ours from now on."""
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(pipe, "rb", 0)
        )
        return cls(name, reader, transport)

    def close(self) -> None:
        self._transport.close()

    async def run(self) -> None:
        """Until all who could write have hung up."""
        while chunk := await self._reader.read(_CHUNK_BYTES):
            # A progress bar rewrites its line; each state of it is a line of a log.
            *lines, self._rest = re.split(rb"\r\n|\n|\r", self._rest + chunk)
            if len(self._rest) > _CHUNK_BYTES:
                lines, self._rest = [*lines, self._rest], b""
            for line in lines:
                self._pass_on(line)
        self._pass_on(self._rest)

    def _pass_on(self, line: bytes) -> None:
        text = _ANSI.sub("", line[: 4 * _LINE_CHARACTERS].decode(errors="replace")).rstrip()[:_LINE_CHARACTERS]
        if text:
            self.lines.append(text)
            self._logger.log(level_of(text), "%s: %s", self.name, text)


_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_LEVEL = re.compile(r"\b(DEBUG|INFO|WARN|WARNING|ERROR|CRITICAL|FATAL)\b|^[\d.:]+ ([DIWE]) ")
_LEVELS = {
    "D": logging.DEBUG,
    "DEBUG": logging.DEBUG,
    "W": logging.WARNING,
    "WARN": logging.WARNING,
    "WARNING": logging.WARNING,
    "E": logging.ERROR,
    "ERROR": logging.ERROR,
    "CRITICAL": logging.CRITICAL,
    "FATAL": logging.CRITICAL,
}
_LEVEL_WITHIN = 80  # a level stands near the line's beginning; later it is a word


def level_of(line: str) -> int:
    """The level a line of an engine's log was written with; INFO where it does not say."""
    found = _LEVEL.search(line[:_LEVEL_WITHIN])
    return _LEVELS.get(found[1] or found[2], logging.INFO) if found else logging.INFO


#: The line that ends a traceback, wherever an engine's log prefix leaves it.
_EXCEPTION = re.compile(r"(?:^|[\s\]])((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)(?:: .*)?)$")
#: Lines that only say that another line says it.
_HOLLOW = re.compile(r"root cause|initialization failed|see (?:the )?(?:logs?|stack ?trace)|core proc", re.IGNORECASE)


_DETAIL_LINES = 12
_VALIDATION = re.compile(r"\d+ validation errors? for")
_PROCESS = re.compile(r"^\(\S+(?: pid=\d+)?\)\s*")
_LABEL = re.compile(r"^(?:ERROR|CRITICAL|FATAL):?\s+")


def cause_in(lines: Sequence[str], *, any_line: bool = True) -> str:
    """Why a process failed, as far as the end of its log tells: one line, "" if it said nothing.

    Without an error among the lines it is the last one, if `any_line` will do.
    """
    exceptions = [
        _with_detail(found[1], lines[index + 1 : index + 1 + _DETAIL_LINES])
        for index, line in enumerate(lines)
        if (found := _EXCEPTION.search(line))
    ]
    errors = [line for line in lines if level_of(line) >= logging.ERROR]
    for candidates in (exceptions, errors):
        telling = [line for line in candidates if ":" in line and not _HOLLOW.search(line)]
        if telling:
            return _LABEL.sub("", telling[-1].strip())
    return lines[-1].strip() if lines and any_line else ""


def _with_detail(error: str, following: Sequence[str]) -> str:
    """pydantic says what is wrong below its error: perhaps the field's name, then the reason, to where its type is."""
    if not _VALIDATION.search(error):
        return error
    details = [_PROCESS.sub("", line).strip() for line in following]
    last = next((index for index, detail in enumerate(details) if "[type=" in detail), None)
    if last is None:
        return error
    reason = " ".join(details[: last + 1]).partition("[type=")[0]
    return f"{error}: {reason.strip()}"
