"""The data path: an exchange is a client's request, an attempt upstream, and the answer with its receipt.

Raw ASGI, because this is where a request's time goes: what is only passed on is neither parsed nor copied, a stream's
chunks leave as they come, and one small task per request watches for a client that goes away.
"""

import asyncio
import logging
import math
import random
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from proxy.accounting import Accountant, Ticket, now
from proxy.api.receipts import encode_receipt, receipt_headers, stream_head_headers
from proxy.energy.events import Outcome
from proxy.energy.quantities import Nanoseconds
from proxy.energy.receipt import Receipt, Request, Tokens
from proxy.errors import ApiError, TimedOut, Unavailable, UpstreamFailed
from proxy.relay import refusals, splice, sse
from proxy.relay.affinity import affinity_of
from proxy.relay.call import Call, ClientGone, Receive, Scope, Send, read_call, read_headers, upstream_body
from proxy.relay.dialects import RESPONSES, Timings, read_json_answer
from proxy.relay.dialects import Answer as Told
from proxy.relay.endpoints import MODERATIONS, Endpoint
from proxy.relay.observe import Observation
from proxy.relay.reply import RawHeaders, Reply, passed_back
from proxy.relay.responses import StoredResponses
from proxy.relay.sift import Sifter
from proxy.relay.translations import JSON
from proxy.relay.upstream import Answer, BrokeOff, Unreachable, Upstream
from proxy.routing.intake import Intake
from proxy.routing.registry import Lease, Registry, Route
from proxy.routing.retries import RETRYABLE, RetryPolicy

log = logging.getLogger("joulegate.relay")

_CLIENT_CLOSED = 499
_RETRIES = RetryPolicy()
_LONG_BODY = 32 * 1024
T = TypeVar("T")
_OPENAI_MODERATORS = ("omni-moderation", "text-moderation")
_SILENT = Nanoseconds(5_000_000_000)


class Observer(Protocol):
    """What the metrics want to hear from the data path."""

    def request_finished(self, model: str, endpoint: str, code: int, seconds: float) -> None: ...
    def first_token(self, model: str, seconds: float) -> None: ...
    def tokens(self, model: str, kind: str, count: int) -> None: ...
    def in_flight(self, model: str, change: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds: until a backend's answer begins, and for a request in all."""

    first_byte: float
    total: float


@dataclass(frozen=True, slots=True)
class Services:
    """What the data path works with; put together in `proxy.app`.

    `observations` are the virtual steps under way, `suspect` has a backend's health checked now, `moderator` is the
    model that moderates where a request names none, `responses` says where stored responses are.
    """

    accountant: Accountant
    registry: Registry
    upstream: Upstream
    observer: Observer
    observations: set[Observation]
    max_body_bytes: int
    suspect: Callable[[str], None]
    intake: Intake
    patience: Patience
    moderator: str | None
    responses: StoredResponses


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that another may follow: nothing of its answer has reached the client.

    `asked` is for how many seconds the backend wants to be left alone, `lost` if it closed the connection.
    """

    error: ApiError
    asked: float = 0.0
    lost: bool = False


def tick(observations: set[Observation], at: Nanoseconds) -> None:
    """Keep long silent requests from holding up the settlement of the others."""
    for observation in observations:
        observation.waiting(at, _SILENT)


class Relay:
    """The ASGI application of one model endpoint."""

    def __init__(self, endpoint: Endpoint, services: Services) -> None:
        self._endpoint = endpoint
        self._services = services

    def envelope(self, error: ApiError) -> bytes:
        """The body of an error's answer in the endpoint's API."""
        return self._endpoint.dialect.envelope(error)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        reply = Reply(send, secrets.token_hex(16))
        model, code = "unknown", _CLIENT_CLOSED
        services, entered = self._services, False
        try:
            services.intake.enter()
            entered = True
            call, model = await self._admit(scope, receive, reply)
            affinity = affinity_of(services.registry.models[model].plan.affinity, scope["headers"], call)
            exchange = Exchange(services, call, self._request(call, model, reply, scope), affinity, reply, began)
            code = await exchange.run(receive)
        except ClientGone:
            pass
        except ApiError as error:
            code = error.status
            await reply.error(error, [], self.envelope(error))
        except Exception:
            code = 500
            raise
        finally:
            if entered:
                services.intake.leave()
            services.observer.request_finished(model, self._endpoint.path, code, time.perf_counter() - began)

    async def _admit(self, scope: Scope, receive: Receive, reply: Reply) -> tuple[Call, str]:
        headers = read_headers(scope)
        reply.client_request_id = headers.client_request_id
        call = await read_call(headers, self._endpoint, receive, self._services.max_body_bytes)
        model = self._services.registry.resolve(self._asked_model(call, scope), self._endpoint)
        if self._endpoint.translation is not None:
            call.head.model = model
        return call, model

    def _asked_model(self, call: Call, scope: Scope) -> str | None:
        """The model a request names: in its path, in its body, or (moderations) as OpenAI calls its own."""
        named: str | None = scope.get("joulegate.model", call.head.model)
        if self._endpoint.path == MODERATIONS and (named or "").startswith(_OPENAI_MODERATORS):
            named = None
        return self._services.moderator if named is None and self._endpoint.path == MODERATIONS else named

    def _request(self, call: Call, model: str, reply: Reply, scope: Scope) -> Request:
        return Request(
            id=reply.id,
            model=model,
            task=self._endpoint.task,
            endpoint=self._endpoint.path,
            created=time.time(),
            client_request_id=call.headers.client_request_id,
            key=scope.get("joulegate.key"),
        )


class Exchange:
    """One request that a backend is to answer, from its wait for a turn to the receipt."""

    def __init__(
        self, services: Services, call: Call, request: Request, affinity: bytes | None, reply: Reply, began: float
    ) -> None:
        self._services = services
        self._call = call
        self._model = request.model
        self._affinity = affinity
        self._key = request.key
        self._reply = reply
        self._began = began
        self._deadline = asyncio.get_running_loop().time() + services.patience.total
        self._ticket: Ticket = services.accountant.open(request)
        self._tried: list[str] = []
        self._observation: Observation | None = None
        self._receipt: Receipt | None = None
        self._route: Route

    async def run(self, receive: Receive) -> int:
        """Carry it out; returns the status that the metrics count (499: the client went away).

        Raises ApiError if no backend was asked at all: then there is no receipt.
        """
        me = asyncio.current_task()
        assert me is not None

        def client_left(_: object) -> None:
            me.cancel()

        self._services.observer.in_flight(self._model, 1)
        watch = asyncio.ensure_future(receive())
        watch.add_done_callback(client_left)
        try:
            await self._in_turn()
        except asyncio.CancelledError:
            if not watch.done():
                raise
            me.uncancel()
        except Exception:
            self._give_up("failed")
            raise
        finally:
            watch.remove_done_callback(client_left)
            watch.cancel()
            completed = self._receipt is not None
            if not completed:
                self._give_up("cancelled")
            self._services.observer.in_flight(self._model, -1)
        return self._reply.status if completed else _CLIENT_CLOSED

    def _give_up(self, outcome: Outcome) -> None:
        if self._ticket.attempts:
            self._finish(outcome, Told())

    async def _in_turn(self) -> None:
        gate = self._services.registry.models[self._model].gate
        try:
            async with asyncio.timeout_at(self._deadline):
                entered = await gate.enter()
        except TimeoutError as error:
            raise self._too_long() from error
        try:
            await self._until_answered()
        finally:
            gate.leave(entered)

    async def _until_answered(self) -> None:
        """Try, and try again elsewhere, as long as nothing of an answer has reached the client."""
        began = time.monotonic()
        lease = self._lease()
        while (failure := await self._attempt(lease)) is not None:
            again = await self._another(failure, time.monotonic() - began)
            if again is None:
                await self._fail(failure.error)
                return
            lease = again

    def _lease(self) -> Lease:
        return self._services.registry.lease(
            self._model,
            asked=self._call.head.model,
            work=_work(self._call),
            affinity=self._affinity,
            avoid=self._tried,
        )

    async def _another(self, failure: Failure, elapsed: float) -> Lease | None:
        """A replica for another attempt, after a pause; None if there is to be none."""
        model = self._services.registry.models[self._model]
        elsewhere = any(self._services.registry.up(id) and id not in self._tried for id in model.backends)
        pause = _RETRIES.wait(
            len(self._tried),
            elapsed,
            random.random(),  # noqa: S311 - so that not all come back at once
            asked=0.0 if elsewhere else failure.asked,
            lost=failure.lost,
        )
        if pause is None or asyncio.get_running_loop().time() + pause >= self._deadline:
            return None
        self._end_observation(Tokens(), None)
        self._ticket.fail_attempt()
        await asyncio.sleep(pause)
        try:
            return self._lease()
        except Unavailable:
            return None

    async def _attempt(self, lease: Lease) -> Failure | None:
        """Ask one replica; a Failure if it gave no answer that could be passed on, None if the client has been told."""
        self._route = lease.route
        self._tried.append(lease.route.backend)
        headers = self._begin()
        try:
            answer = await self._ask(headers)
            try:
                return await self._judge(lease, answer)
            finally:
                answer.abort()
        except Unreachable as error:
            log.warning("backend %s does not answer: %s", self._route.backend, error)
            lease.failed()
            self._services.suspect(self._route.backend)
            refused = Unavailable(f"The backend of model '{self._model}' is not answering.")
            return Failure(refused, lost=error.lost)
        except TimedOut as error:
            log.warning("backend %s took too long: %s", self._route.backend, error)
            lease.failed()
            self._services.suspect(self._route.backend)
            await self._fail(error)
            return None
        finally:
            lease.release()

    async def _ask(self, headers: dict[str, str]) -> Answer:
        """Send the request and wait for the answer's head; raises Unreachable or TimedOut."""
        response_id = headers["X-Request-Id"] if self._route.takes_response_id else None
        body = upstream_body(self._call, self._route.model, response_id)
        url = self._route.url + self._call.endpoint.upstream_path
        first_byte = self._services.patience.first_byte
        at_last = min(asyncio.get_running_loop().time() + first_byte, self._deadline)
        try:
            async with asyncio.timeout_at(at_last):
                return await self._services.upstream.post(url, body, headers)
        except TimeoutError as error:
            if at_last == self._deadline:
                raise self._too_long() from error
            raise TimedOut(f"The backend did not begin to answer within {first_byte:g} s.") from error

    def _too_long(self) -> TimedOut:
        return TimedOut(f"The request took longer than {self._services.patience.total:g} s.")

    async def _judge(self, lease: Lease, answer: Answer) -> Failure | None:
        """Pass an answer on, or say why another attempt may do better."""
        try:
            if answer.status in RETRYABLE:
                asked = answer.header("Retry-After")
                error = refusals.translate(answer.status, await self._in_time(answer.whole()), asked)
                lease.failed()
                return Failure(error, asked=_seconds(asked))
            lease.succeeded()
            await self._deliver(answer)
        except (BrokeOff, ValueError) as error:
            log.warning("backend %s broke off its answer: %s", self._route.backend, error)
            lease.failed()
            await self._fail(UpstreamFailed("The backend broke off its answer."))
        return None

    async def _in_time(self, doing: Awaitable[T]) -> T:
        """Within the time of the whole request; raises TimedOut."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await doing
        except TimeoutError as error:
            raise self._too_long() from error

    def _begin(self) -> dict[str, str]:
        backend = self._route.backend
        attempt = self._ticket.attempt(backend)
        if not self._route.reports_steps:
            accountant = self._services.accountant

            def emit(started: Nanoseconds, ended: Nanoseconds, tokens: int, context: int) -> None:
                accountant.virtual_step(backend, attempt, started, ended, tokens, context)

            self._observation = Observation(emit, now(), len(self._call.body))
            self._services.observations.add(self._observation)
        headers = {"Content-Type": self._call.content_type, "X-Request-Id": attempt, **self._call.headers.forwarded}
        if self._route.authorization is not None:
            headers["Authorization"] = self._route.authorization
        return headers

    async def _deliver(self, answer: Answer) -> None:
        if answer.status >= 400:
            error = refusals.translate(answer.status, await self._in_time(answer.whole()), answer.header("Retry-After"))
            await self._fail(error)
        elif answer.status >= 300:
            await self._fail(UpstreamFailed(f"The backend answered with a redirect ({answer.status})."))
        elif answer.header("Content-Encoding") not in {None, "identity"}:
            await self._fail(UpstreamFailed("The backend compressed its answer, though asked not to."))
        elif answer.content_type.startswith("text/event-stream"):
            await self._stream(answer)
        else:
            await self._whole(answer)

    async def _whole(self, answer: Answer) -> None:
        body = await self._in_time(answer.whole())
        is_json = answer.content_type.startswith("application/json")
        told = read_json_answer(body) if is_json else Told()
        headers = self._headers(answer)
        translation = self._call.endpoint.translation
        if translation is not None:
            body, kind = translation.answer(self._call.head, body, self._model, self._reply.id)
            is_json = kind == JSON
            headers = [*(header for header in headers if header[0] != b"content-type"), (b"content-type", kind)]
        receipt = self._finish("completed", told)
        if is_json and splice.is_object(body) and self._call.headers.energy_body:
            body = splice.append_member(body, b"energy", encode_receipt(receipt))
        await self._reply.whole(answer.status, headers + receipt_headers(receipt), body)

    def _headers(self, answer: Answer) -> RawHeaders:
        """The backend's headers, and how long it took it to answer."""
        return [*passed_back(answer.headers), self._processing()]

    def _processing(self) -> tuple[bytes, bytes]:
        milliseconds = (time.perf_counter() - self._began) * 1000
        return b"openai-processing-ms", str(max(1, round(milliseconds))).encode()

    async def _stream(self, answer: Answer) -> None:
        sifter = Sifter(self._call.endpoint.dialect, self._call.client_wants_usage)
        await self._reply.head(answer.status, self._headers(answer) + self._stream_head())
        failure: ApiError | None = None
        try:
            await self._in_time(self._forward(answer, sifter))
        except (BrokeOff, ValueError) as error:
            log.warning("backend %s broke off its stream: %s", self._route.backend, error)
            failure = UpstreamFailed("The backend broke off its answer.")
        except TimedOut as error:
            failure = error
        await self._close_stream(sifter, failure)

    def _stream_head(self) -> list[tuple[bytes, bytes]]:
        """What can be said before the energy is known: where its figures will come from."""
        accountant = self._services.accountant
        expected = accountant.expectation(self._route.backend, reports_steps=self._route.reports_steps)
        return stream_head_headers(
            self._reply.id,
            method=expected.method,
            meter=expected.meter,
            boundary=accountant.terms.boundary,
            intensity=accountant.terms.intensity,
        )

    async def _forward(self, answer: Answer, sifter: Sifter) -> None:
        cutter = sse.EventCutter()
        begun = False
        async for data in answer.chunks():
            run = cutter.feed(data)
            if not run:
                continue
            if not begun and sse.count_data(run):
                begun = True
                self._services.observer.first_token(self._model, time.perf_counter() - self._began)
            if self._observation is not None and begun:
                self._observation.events(sse.count_data(run), now())
            out = sifter.sift(run)
            if out:
                await self._reply.chunk(out)
        rest = sifter.sift(cutter.rest())
        if rest:
            await self._reply.chunk(rest)

    async def _close_stream(self, sifter: Sifter, error: ApiError | None) -> None:
        error = error or sifter.failure
        receipt = self._finish("failed" if error else "completed", sifter.answer())
        energy = encode_receipt(receipt) if self._call.headers.energy_body else None
        await self._reply.end(sifter.close(energy, error))

    async def _fail(self, error: ApiError) -> None:
        receipt = self._finish("failed", Told())
        body = self._call.endpoint.dialect.envelope(error)
        await self._reply.error(error, [self._processing(), *receipt_headers(receipt)], body)

    def _finish(self, outcome: Outcome, told: Told) -> Receipt:
        """End the request's work in the books, with what the backend told of it."""
        if self._call.endpoint.dialect is RESPONSES:
            self._services.responses.remember(told.id, self._route, self._key)
        tokens = told.usage.tokens() if told.usage is not None else Tokens()
        self._end_observation(tokens, told.timings)
        self._receipt = self._ticket.finish(outcome, tokens)
        for kind, count in (("prompt", tokens.prompt), ("completion", tokens.completion), ("cached", tokens.cached)):
            if count:
                self._services.observer.tokens(self._model, kind, count)
        return self._receipt

    def _end_observation(self, tokens: Tokens, timings: Timings | None) -> None:
        if self._observation is not None:
            self._services.observations.discard(self._observation)
            self._observation.end(now(), tokens, timings)
            self._observation = None


def _work(call: Call) -> float:
    """How much a request asks of a replica beside others: one, and more for a long body."""
    return 1.0 + min(len(call.body) / _LONG_BODY, 4.0)


def _seconds(retry_after: str | None) -> float:
    """A Retry-After in seconds; a date is as good as never, for a proxy that retries within seconds."""
    if retry_after is None:
        return 0.0
    return float(retry_after) if retry_after.isdecimal() and len(retry_after) < 10 else math.inf
