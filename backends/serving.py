"""What the engine servers of ours share: OpenAI's error envelope, bounded bodies, health, and the way of a job between
the event loop, which talks HTTP, and the one thread that runs the engine.

A server answers from its first moment: 503 while the engine loads. The engine is imported, loaded and warmed up by its
own thread, in the loading state, so that this energy is nobody's request.
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import logging
import os
import re
import secrets
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from backends.spec import BackendError
from backends.steps import StepReporter, attempt_id

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
#: How long requests in flight may go on after the order to stop.
GRACE_SECONDS = 5

_MOST_CPU_THREADS = 8
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")

Work = TypeVar("Work")
Result = TypeVar("Result")
Schema = TypeVar("Schema")


# --- errors ---


class ApiError(Exception):
    """An error for the client, as OpenAI's envelope tells it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def response(self) -> Response:
        return json_response(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is at fault."""
    return ApiError(400, message, param=param, code=code)


def failed(message: str, code: str | None = None) -> ApiError:
    """The engine is at fault."""
    return ApiError(500, message, type="server_error", code=code)


class ClientGone(Exception):
    """The client has hung up: nobody reads the answer."""


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def log_failure(what: str, error: BaseException) -> None:
    """Log where an error arose but not its message, which may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s: %s\n%s", what, type(error).__name__, frames)


def translated(error: BaseException) -> ApiError:
    """What a client is told of an engine's error; the log gets the rest."""
    if isinstance(error, ApiError):
        return error
    log_failure("the engine failed", error)
    if type(error).__name__ == "OutOfMemoryError":
        return ApiError(
            503,
            "The device has not enough memory for this request: ask for less at once.",
            type="server_error",
            code="out_of_memory",
            retry_after=5,
        )
    return failed("The engine failed at this request; its log says where.", "engine_error")


# --- requests ---


async def read_json(request: Request, decoder: msgspec.json.Decoder[Schema], limit: int) -> Schema:
    """The body, decoded. Raises ApiError: 400 for what is not JSON or not of the schema, 413 beyond `limit` bytes."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if kind != "application/json":
        raise invalid(f"The body must be application/json, not {kind[:100]!r}.")
    body = await _bounded_body(request, limit)
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise invalid("The body is not valid JSON.", code="invalid_json") from None


async def _bounded_body(request: Request, limit: int) -> bytes:
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


_AT_FIELD = re.compile(r"(?P<what>.*?)(?: - at `\$\.?(?P<path>[^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]+)`")


def _explained(message: str) -> ApiError:
    """msgspec's complaint, with the field it is about as `param`."""
    if missing := _MISSING.match(message):
        return invalid(f"'{missing['name']}' is required.", missing["name"], "missing_required_parameter")
    found = _AT_FIELD.fullmatch(message)
    path = (found["path"] if found else None) or None
    if found is None or path is None:
        return invalid(f"{message}.")
    return invalid(
        f"'{path}': {found['what'][:1].lower()}{found['what'][1:]}.", re.split(r"[\[.]", path)[0], "invalid_type"
    )


def request_id(request: Request) -> tuple[str, str]:
    """The id to answer with, and the one the proxy gave ("" without one) for the step reports."""
    given = attempt_id(request.headers.get(REQUEST_ID_HEADER, ""))
    return given or secrets.token_hex(16), given


def check_model(asked: str | None, served: str) -> None:
    """Raises ApiError (404) for another model than the one served."""
    if asked is not None and asked != served:
        raise ApiError(
            404, f"The model '{asked[:200]}' is not served here; '{served}' is.", param="model", code="model_not_found"
        )


async def disconnected(request: Request) -> None:
    """Return once the client has hung up; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- jobs ---


@dataclass(eq=False)
class Job(Generic[Work, Result]):
    """Work for the engine's thread. `request` is its id in step reports, `size` what it counts in a batch."""

    request: str
    work: Work
    size: int = 1
    future: concurrent.futures.Future[Result] = field(default_factory=concurrent.futures.Future)
    abandoned: threading.Event = field(default_factory=threading.Event)

    def abandon(self) -> None:
        """Nobody waits for it any more: a waiting job is dropped, a running one may stop."""
        self.abandoned.set()
        self.future.cancel()


AnyJob = TypeVar("AnyJob", bound=Job[Any, Any])
JobT_contra = TypeVar("JobT_contra", bound=Job[Any, Any], contravariant=True)


class JobQueue(Generic[AnyJob]):
    """Jobs that wait for the engine, at most `capacity`; what waits longest is in front."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._jobs: deque[AnyJob] = deque()
        self._changed = threading.Condition()
        self._seconds_per_job = 0.0

    def __len__(self) -> int:
        with self._changed:
            return sum(not job.abandoned.is_set() for job in self._jobs)

    def put(self, jobs: Sequence[AnyJob]) -> int:
        """Add all of `jobs`, and return how many wait before them. Raises ApiError (429) if they do not all fit."""
        with self._changed:
            self._drop_abandoned()
            ahead = len(self._jobs)
            if ahead + len(jobs) > self.capacity:
                raise self._full(ahead)
            self._jobs.extend(jobs)
            self._changed.notify()
        return ahead

    def take(self, pick: Callable[[Sequence[int]], Sequence[int]]) -> list[AnyJob]:
        """Wait for jobs, and take those whose indices `pick` returns for their sizes; nobody has abandoned them."""
        taken: list[AnyJob] = []
        with self._changed:
            while not taken:
                self._drop_abandoned()
                if not self._jobs:
                    self._changed.wait()
                    continue
                chosen = set(pick([job.size for job in self._jobs]))
                waiting = list(self._jobs)
                self._jobs = deque(job for index, job in enumerate(waiting) if index not in chosen)
                candidates = (waiting[index] for index in sorted(chosen))
                taken = [job for job in candidates if job.future.set_running_or_notify_cancel()]
        return taken

    def worked(self, jobs: int, seconds: float) -> None:
        """Learn how long a job takes, to tell clients when to come back."""
        self._seconds_per_job += 0.2 * (seconds / jobs - self._seconds_per_job)

    def _drop_abandoned(self) -> None:
        if any(job.abandoned.is_set() for job in self._jobs):
            self._jobs = deque(job for job in self._jobs if not job.abandoned.is_set())

    def _full(self, waiting: int) -> ApiError:
        wait = min(60, max(1, round(waiting * self._seconds_per_job)))
        message = f"{waiting} jobs wait for the model, and at most {self.capacity} may: come back later."
        return ApiError(429, message, type="rate_limit_error", code="queue_full", retry_after=wait)


async def finished(request: Request, jobs: Sequence[Job[Work, Result]]) -> list[Result]:
    """The jobs' results. Raises what a job raised, or ClientGone; unless all are done, they are abandoned."""
    gone: asyncio.Future[Any] = asyncio.ensure_future(disconnected(request))
    results = asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
    try:
        await asyncio.wait([gone, results], return_when=asyncio.FIRST_COMPLETED)
        if not results.done():
            raise ClientGone
        return results.result()
    finally:
        gone.cancel()
        results.cancel()
        for job in jobs:
            job.abandon()


# --- the engine's thread ---


class Engine(Protocol[JobT_contra]):
    """A loaded model. All but `pick` is called on the engine's thread only."""

    def warm_up(self) -> None:
        """One tiny pass, so that the first request does not pay for what is made lazily."""
        ...

    def pick(self, sizes: Sequence[int]) -> Sequence[int]:
        """Which of the waiting jobs to work on together: indices into their sizes, in order of arrival; never none."""
        ...

    def run(self, jobs: Sequence[JobT_contra]) -> None:
        """Work on the jobs and report the steps. Settles each job's future, or raises for those it left unsettled."""
        ...


EngineT = TypeVar("EngineT", bound=Engine[Any])


class Host(Generic[EngineT]):
    """Loads an engine and runs it on a thread of its own, job after job."""

    def __init__(self, load: Callable[[], EngineT], queue: JobQueue[Any], reporter: StepReporter) -> None:
        self.queue = queue
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._load = load
        self._reporter = reporter
        self._engine: EngineT | None = None

    @property
    def engine(self) -> EngineT:
        """The loaded engine. Raises ApiError (503) before it is there."""
        if self._engine is None:
            raise ApiError(503, "The model is being loaded.", type="server_error", code="model_loading", retry_after=5)
        return self._engine

    def start(self) -> None:
        threading.Thread(target=self._main, name="engine", daemon=True).start()

    def _main(self) -> None:
        try:
            engine = self._loaded()
            while True:
                self._work(engine)
        except BaseException as error:  # whatever it is, the process has nothing to serve any more
            self.failure = error
            self.on_failure()

    def _loaded(self) -> EngineT:
        self._reporter.state(loading=True)
        logger.info("loading the model and its engine")
        started = time.monotonic()
        engine = self._load()
        engine.warm_up()
        logger.info("loaded and warm after %.1f s", time.monotonic() - started)
        self._reporter.state(loading=False)
        self._engine = engine
        return engine

    def _work(self, engine: EngineT) -> None:
        jobs = self.queue.take(engine.pick)
        started = time.monotonic()
        try:
            engine.run(jobs)
        except Exception as error:
            settle(jobs, translated(error))
            if _device_is_lost(error):
                raise
        self.queue.worked(len(jobs), time.monotonic() - started)


def _device_is_lost(error: BaseException) -> bool:
    """After an error of CUDA itself the whole process's context is unusable; only a new process helps."""
    return type(error).__name__ == "AcceleratorError"


def settle(jobs: Iterable[Job[Any, Any]], error: Exception) -> None:
    """End with `error` every job that has not ended."""
    for job in jobs:
        if not job.future.done():
            job.future.set_exception(error)


# --- the server ---

Handler = Callable[[Request], Awaitable[Response]]


def guarded(handler: Handler) -> Handler:
    """`handler`, with every error told in OpenAI's envelope and none with a traceback."""

    async def respond(request: Request) -> Response:
        try:
            return await handler(request)
        except ClientGone:
            return Response(status_code=499)  # nginx's number for it; nobody reads this
        except Exception as error:
            return translated(error).response()

    return respond


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such path, no such method."""
    assert isinstance(error, HTTPException)
    return ApiError(
        error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}.", code="not_found"
    ).response()


def app(name: str, host: Host[Any], posts: Mapping[str, Handler]) -> Starlette:
    """Health, the model's card, and a POST handler per path."""

    async def health(_: Request) -> Response:
        assert host.engine is not None
        return json_response({"status": "ok", "model": name, "queue": len(host.queue)})

    async def models(_: Request) -> Response:
        return json_response({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "joulegate"}]})

    gets = [Route(path, guarded(handler)) for path, handler in {"/health": health, "/v1/models": models}.items()]
    routes = [*gets, *(Route(path, guarded(handler), methods=["POST"]) for path, handler in posts.items())]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


def serve(application: Starlette, host: Host[Any], port: int, kind: str, model: str) -> int:
    """Serve on 127.0.0.1 until told to stop; return the exit code: 1, with one line on stderr, if the engine fails."""
    config = uvicorn.Config(
        application, host="127.0.0.1", port=port, log_config=None, access_log=False, lifespan="off",
        server_header=False, timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    server = uvicorn.Server(config)
    host.on_failure = lambda: setattr(server, "should_exit", True)
    host.start()
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if host.failure is not None:
        sys.stderr.write(f"ERROR {kind}: {model}: {_one_line(host.failure)}\n")
    return 0 if server.started and host.failure is None else 1


def _one_line(error: BaseException) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return first if isinstance(error, BackendError) else f"{type(error).__name__}: {first}"


def main(run: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> None:
    """Set the process up, run the server, and end the process whatever its threads are doing."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # the supervisor tells of starts and stops
    limit_threads(arguments.threads)
    code = run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    # The engine's thread may be amid a kernel or an import, and unwinding the interpreter under it can crash.
    os._exit(code)


def limit_threads(asked: int | None) -> None:
    """Bound the CPU threads of what is imported from now on; an operator's own OMP_NUM_THREADS stands."""
    if asked is not None:
        os.environ["OMP_NUM_THREADS"] = str(asked)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(_MOST_CPU_THREADS, usable_cores() - 1))))


def usable_cores(quota: Path = _CPU_QUOTA) -> int:
    """The cores this process may use: by its affinity, and by the container's quota."""
    cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores
