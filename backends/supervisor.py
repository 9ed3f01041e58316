"""Starts the backends, watches their health, restarts those that die or hang, and ends them with the proxy."""

import asyncio
import contextlib
import logging
import random
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import aiohttp

from backends.kinds import kind_of
from backends.process import BackendProcess, environment_of
from backends.spec import BackendError, BackendKind, BackendSpec, Kind, Launch
from backends.steps import private_directory

logger = logging.getLogger(__name__)

#: Where NVIDIA's driver lists its GPUs.
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")

State = Literal["starting", "ready", "failed", "restarting", "stopped"]


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """How a backend is. `failed` and `restarting` ones are tried again; `error` is why, in one line.

    `url` is where it serves once it is ready (without a trailing `/v1`), `pid` leads its process group, `restarts`
    counts the starts after the first, `since` is the Unix time at which it came into this state. `reports_steps` is
    False once it is known that this engine will not tell its steps, whatever its kind promises.
    """

    name: str
    kind: Kind
    state: State
    url: str | None = None
    pid: int | None = None
    error: str | None = None
    restarts: int = 0
    since: float = 0.0
    reports_steps: bool = True


@dataclass(frozen=True, slots=True)
class Pace:
    """How patient the supervisor is, in seconds."""

    poll: float = 0.1  # while a backend starts, growing tenfold
    watch: float = 2.0  # while it runs
    health_timeout: float = 10.0
    hung_after: int = 3  # health checks in a row that fail
    grace: float = 5.0  # between SIGTERM and SIGKILL
    backoff: float = 0.5  # the first, doubled each time
    backoff_cap: float = 30.0
    stable: float = 60.0  # ready for so long, it starts again with the first backoff


class Supervisor:
    """Keeps every backend running on its own: none waits for, or falls with, another. They may come and go.

    `run_dir` is made private to this user; backends report their steps to `steps_socket` in it. `on_change` is called
    in the event loop with each new status.
    """

    def __init__(
        self,
        specs: Sequence[BackendSpec],
        *,
        run_dir: Path,
        on_change: Callable[[BackendStatus], None],
        kinds: Callable[[str], BackendKind] = kind_of,
        pace: Pace | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.steps_socket = run_dir / "steps.sock"
        self._on_change = on_change
        self._pace = pace or Pace()
        self._kinds = kinds
        self._client: aiohttp.ClientSession | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._backends = {spec.id: _Backend(spec, self, kinds) for spec in specs}

    @property
    def pace(self) -> Pace:
        return self._pace

    @property
    def python_path(self) -> Path:
        """A folder that holds `backends` and nothing else of ours, for interpreters of other environments."""
        return self.run_dir / "python"

    async def start(self) -> None:
        """Begin to start every backend, and return at once. Raises OSError when `run_dir` cannot be made private."""
        private_directory(self.run_dir)
        _link_package(self.python_path)
        self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._pace.health_timeout))
        for name in self._backends:
            self._keep(name)

    def add(self, spec: BackendSpec) -> None:
        """Begin to start one more backend. Its id is no other's."""
        self._backends[spec.id] = _Backend(spec, self, self._kinds)
        self._keep(spec.id)

    async def remove(self, name: str) -> None:
        """End a backend; it is gone when this returns."""
        await self._end({self._tasks[name]})
        del self._tasks[name], self._backends[name]

    async def close(self) -> None:
        """End every backend, all at once."""
        await self._end(set(self._tasks.values()))
        if self._client is not None:
            await self._client.close()

    def _keep(self, name: str) -> None:
        self._tasks[name] = asyncio.create_task(self._backends[name].keep(), name=f"backend {name}")

    async def _end(self, pending: "set[asyncio.Task[None]]") -> None:
        asked = {task for task in pending if task.cancelling()}  # ending already: its process has its grace
        while pending:
            for task in pending - asked:
                task.cancel()
            # Before Python 3.12 a library's wait_for may swallow a cancellation: ask again.
            _, pending = await asyncio.wait(pending, timeout=2 * self._pace.grace + 2)
            asked.clear()

    async def wait_ready(self) -> None:
        """Wait until every backend has been ready once; for ever, if one cannot be: put a timeout around it."""
        await asyncio.gather(*(backend.ready.wait() for backend in self._backends.values()))

    def statuses(self) -> Mapping[str, BackendStatus]:
        """Every backend's status, by its name."""
        return {name: backend.status for name, backend in self._backends.items()}

    def pids(self) -> Mapping[str, int]:
        """The process that leads each running backend's group, by the backend's name. From any thread."""
        backends = list(self._backends.items())  # they may come and go meanwhile
        return {name: pid for name, backend in backends if (pid := backend.status.pid) is not None}

    def suspect(self, name: str) -> None:
        """Have a backend's health checked now: somebody could not reach it."""
        backend = self._backends.get(name)
        if backend is not None:
            backend.doubted.set()

    def unwatched(self, name: str, why: str) -> None:
        """Note that a backend's engine has said it cannot tell its steps (until it is started again)."""
        backend = self._backends.get(name)
        if backend is not None:
            logger.warning(
                "%s: its engine cannot tell its steps (%s): its requests are accounted by their tokens", name, why
            )
            backend.mark_unwatched()

    def changed(self, status: BackendStatus) -> None:
        """Tell who listens; a listener that fails is its own trouble."""
        try:
            self._on_change(status)
        except Exception:
            logger.exception("%s: a listener to its status failed", status.name)

    async def health(self, url: str, *, any_answer: bool = False) -> "_Health":
        """Ask for a backend's health."""
        assert self._client is not None
        try:
            async with self._client.get(url, allow_redirects=False) as response:
                fine = response.status < 500 if any_answer else response.status == 200
                return _Health("" if fine else f"answers its health check with status {response.status}")
        except TimeoutError:
            return _Health(f"does not answer its health check within {self._pace.health_timeout:g} s")
        except aiohttp.ClientConnectorError as error:
            return _Health(f"does not answer at {url}: {error.strerror or error}", gone=True)
        except (aiohttp.ClientError, OSError) as error:
            return _Health(f"does not answer at {url}: {error or type(error).__name__}")


@dataclass(frozen=True, slots=True)
class _Health:
    """What is wrong with a backend, "" if nothing is; `gone` if nobody listens there at all."""

    error: str
    gone: bool = False


class _Backend:
    """One backend's life: started, watched, and started again."""

    def __init__(self, spec: BackendSpec, supervisor: Supervisor, kinds: Callable[[str], BackendKind]) -> None:
        self.status = BackendStatus(spec.id, spec.kind, "stopped", since=time.time())
        self.ready = asyncio.Event()
        self.doubted = asyncio.Event()
        self._spec = spec
        self._supervisor = supervisor
        self._pace = supervisor.pace
        self._kinds = kinds
        self._starts = 0
        self._told = ""

    async def keep(self) -> None:
        """Run it, again and again, until cancelled."""
        backoff = self._pace.backoff
        # A remote costs nothing to try again, and is wanted back as soon as it is there.
        cap = self._pace.watch if self._spec.kind == "remote" else self._pace.backoff_cap
        try:
            while True:
                began = time.monotonic()
                await self._live()
                if time.monotonic() - began > self._pace.stable:
                    backoff = self._pace.backoff
                # Not all in step, if several fell together.
                await asyncio.sleep(backoff * random.uniform(0.5, 1))  # noqa: S311
                backoff = min(2 * backoff, cap)
        finally:
            self.ready.clear()
            self._change(state="stopped", url=None, pid=None)

    async def _live(self) -> None:
        """One run of the backend, to its end."""
        self._starts += 1
        again = self.status.state == "restarting"
        self._change(state="restarting" if again else "starting", restarts=self._starts - 1)
        try:
            port = _free_port()
            launch = await asyncio.to_thread(self._launch, port)
            await (self._run_process(launch, port) if launch else self._run_remote())
        except BackendError as error:
            self._down(_one_line(error))
        except Exception as error:
            logger.exception("%s: cannot be started", self._spec.id)
            self._down(f"{type(error).__name__}: {_one_line(error)}")

    def _launch(self, port: int) -> Launch | None:
        _check_devices(self._spec)
        return self._kinds(self._spec.kind).launch(self._spec, port, self._supervisor.steps_socket)

    # --- a process of ours ---

    async def _run_process(self, launch: Launch, port: int) -> None:
        supervisor, name = self._supervisor, self._spec.id
        environment = environment_of(self._spec, launch, supervisor.steps_socket, supervisor.python_path)
        process = await BackendProcess.start(name, launch.command, environment)
        self._change(pid=process.pid, reports_steps=launch.reports_steps)
        url = f"http://127.0.0.1:{port}"
        try:
            error = await _first_of(process.ended(), self._serve(process, url, launch.health_path))
            fallen = self._fall(error)  # at once: nobody must be sent there while we find out why
            self._down(await process.cause() or error, fallen)
        except asyncio.CancelledError:
            self._change(state="stopped", url=None)
            raise
        finally:
            await process.stop(self._pace.grace)
            self._change(pid=None)

    async def _serve(self, process: BackendProcess, url: str, health_path: str) -> str:
        """See it through its start and its service, until it fails; then why."""
        if not await self._until_ready(process, url + health_path):
            said = f": {process.last_line}" if process.last_line else ""
            return f"not ready after {self._spec.startup_seconds:g} s{said}"
        self._up(url)
        return await self._until_sick(url + health_path)

    async def _until_ready(self, process: BackendProcess, health: str) -> bool:
        began = time.monotonic()
        delay, told = self._pace.poll, 5.0
        while (await self._supervisor.health(health)).error:
            waited = time.monotonic() - began
            if waited > self._spec.startup_seconds:
                return False
            if waited > told:
                logger.info("%s: still starting after %.0f s: %s", self._spec.id, waited, process.last_line)
                told *= 2
            await asyncio.sleep(delay)
            delay = min(delay * 1.1, 10 * self._pace.poll)
        return True

    async def _until_sick(self, health: str, *, any_answer: bool = False) -> str:
        failures, found = 0, _Health("")
        while failures < self._pace.hung_after and not found.gone:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.watch):
                    await self.doubted.wait()
            self.doubted.clear()
            found = await self._supervisor.health(health, any_answer=any_answer)
            failures = failures + 1 if found.error else 0
        return found.error

    # --- somebody else's server ---

    async def _run_remote(self) -> None:
        url = (self._spec.url or "").rstrip("/").removesuffix("/v1")
        # Not every OpenAI-compatible server has /health: any answer but a server's error shows that it is there.
        health = url + "/health"
        error = (await self._supervisor.health(health, any_answer=True)).error
        if not error:
            self._up(url)
            error = await self._until_sick(health, any_answer=True)
        self._down(error)

    # --- what others see ---

    def _up(self, url: str) -> None:
        self.ready.set()
        self._change(state="ready", url=url, error=None)
        self._told = ""
        logger.info("%s: ready", self._spec.id)

    def _fall(self, error: str) -> State:
        """It does not serve any more; the state it is in now."""
        state: State = "restarting" if self.ready.is_set() else "failed"
        self.ready.clear()
        known = self.status.error  # of an earlier start, and better than what is known of this one's end so far
        self._change(state=state, url=None, error=known or error)
        return state

    def _down(self, error: str, state: State | None = None) -> None:
        state = state or self._fall(error)
        level = logging.DEBUG if error == self._told else logging.ERROR  # said once, not at every try
        logger.log(level, "%s: %s; it will be tried again", self._spec.id, error)
        self._told = error
        self._change(state=state, url=None, error=error)

    def mark_unwatched(self) -> None:
        self._change(reports_steps=False)

    def _change(self, **fields: object) -> None:
        since = self.status.since if fields.get("state", self.status.state) == self.status.state else time.time()
        status = replace(self.status, since=since, **fields)  # type: ignore[arg-type]  # the fields of BackendStatus
        if status != self.status:
            self.status = status
            self._supervisor.changed(status)


async def _first_of(*parts: Coroutine[None, None, str]) -> str:
    """Run all, return what the first one that is done returns, and cancel the others."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_devices(spec: BackendSpec) -> None:
    """Refuse a GPU that is not there, as far as its driver tells: engines say it in a hundred other ways."""
    if not NVIDIA_GPUS.is_dir():
        return
    count = sum(1 for _ in NVIDIA_GPUS.iterdir())
    for device in spec.devices:
        if device >= count:
            raise BackendError(f"{spec.id}: there is no GPU {device}: this machine has {count}, numbered from 0")


def _free_port() -> int:
    """A port nobody uses now; should another take it before the backend does, the backend fails and is restarted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _link_package(folder: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    link = folder / "backends"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(__file__).resolve().parent, target_is_directory=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
