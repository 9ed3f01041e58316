"""An exchange: one request's turn, its attempts upstream, and the answer with its receipt.

What is only passed on is neither parsed nor copied, and a stream's bytes go from the backend's connection to the
client's within the read that brought them; the task of the request only decides.
"""

import asyncio
import logging
import math
import random
import time
from dataclasses import dataclass

from proxy.accounting import Ticket, now
from proxy.api.receipts import encode_receipt, receipt_headers, stream_head_headers
from proxy.energy.events import Outcome
from proxy.energy.quantities import Nanoseconds
from proxy.energy.receipt import Receipt, Request, Tokens
from proxy.errors import ApiError, NotFound, TimedOut, Unavailable, UpstreamFailed
from proxy.relay import refusals, splice, sse
from proxy.relay.call import Call, upstream_body
from proxy.relay.dialects import RESPONSES, Timings, read_json_answer
from proxy.relay.dialects import Answer as Told
from proxy.relay.forwarding import Forwarding
from proxy.relay.observe import Observation
from proxy.relay.reply import BODILESS, Lines, Reply, passed_back, processing
from proxy.relay.services import Services
from proxy.relay.sift import Sifter
from proxy.relay.translations import JSON
from proxy.relay.upstream import Answer, BrokeOff, Unreachable
from proxy.routing.admission import Gate
from proxy.routing.registry import Lease, Route
from proxy.routing.retries import RETRYABLE, RetryPolicy

log = logging.getLogger("joulegate.relay")

CLIENT_CLOSED = 499
_RETRIES = RetryPolicy()
_LONG_BODY = 32 * 1024
_ENDING_SECONDS = 1.0
_EVENT_STREAM: Lines = b"content-type: text/event-stream; charset=utf-8\r\n"


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that another may follow: nothing of its answer has reached the client.

    `asked` is for how many seconds the backend wants to be left alone, `lost` if it closed the connection.
    """

    error: ApiError
    asked: float = 0.0
    lost: bool = False


class Exchange:
    """One request that a backend is to answer, from its wait for a turn to the receipt."""

    __slots__ = (
        "_affinity", "_answer", "_began", "_began_at", "_call", "_deadline", "_first_byte_due", "_forwarding",
         "_gate", "_key", "_model", "_observation", "_overdue", "_receipt", "_reply", "_route",
        "_services", "_sifter", "_ticket", "_tried",
    )  # fmt: skip

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
        self._ticket: Ticket = services.accountant.open(request)
        self._tried: list[str] = []
        self._observation: Observation | None = None
        self._receipt: Receipt | None = None
        self._route: Route | None = None
        self._sifter: Sifter | None = None
        self._forwarding: Forwarding | None = None
        self._began_at = time.monotonic()
        self._deadline = self._began_at + services.patience.total
        self._first_byte_due = math.inf
        self._overdue: TimedOut | None = None
        self._gate: Gate | None = None
        self._answer: Answer | None = None  # the stream that comes in

    async def run(self) -> int:
        """Carry it out; returns the status that the metrics count (499: the client went away).

        Raises ApiError if no backend was asked at all and nothing was said: then there is no receipt.
        """
        services = self._services
        services.observer.in_flight(self._model, 1)
        services.watch.under_way.add(self)
        try:
            await self._in_turn()
        except ApiError as error:
            self._tell(error)
        except asyncio.CancelledError:
            if self._reply.client_left:
                return CLIENT_CLOSED
            self._tell(self._excuse())
        except Exception:
            self._give_up("failed")
            raise
        finally:
            services.watch.under_way.discard(self)
            self._give_up("cancelled")
            services.observer.in_flight(self._model, -1)
        return self._reply.status

    def _tell(self, error: ApiError) -> None:
        """Tell the client what went wrong; raises the error where neither it nor a backend has heard of the other."""
        if self._forwarding is None and not self._ticket.attempts:
            raise error
        self._fail(error)

    def _give_up(self, outcome: Outcome) -> None:
        """Settle what was begun and not ended."""
        if self._receipt is None and self._ticket.attempts:
            self._finish(outcome, Told())

    # time

    def look(self, now: float) -> None:
        """What the watch asks: whether it takes too long, or a stream's client has seen nothing for too long."""
        patience = self._services.patience
        if now >= self._deadline:
            self._interrupt(TimedOut(f"The request took longer than {patience.total:g} s."))
        elif now >= self._first_byte_due:
            self._interrupt(TimedOut(f"The backend did not begin to answer within {patience.first_byte:g} s."))
        elif patience.silence and self._call.streams_events and self._receipt is None:
            self._show_life(now - patience.silence)
        self._end_what_is_over(now)

    def _end_what_is_over(self, now: float) -> None:
        """A backend that says that its stream is done, and then does not end it, has had its time."""
        answer, forwarding = self._answer, self._forwarding
        if answer is None or forwarding is None or answer.paused:
            return
        if forwarding.ended_by(now - _ENDING_SECONDS):
            answer.end()

    def _interrupt(self, overdue: TimedOut) -> None:
        self._deadline = self._first_byte_due = math.inf
        self._overdue = overdue
        self._reply.interrupt()

    def _excuse(self) -> TimedOut:
        """Why the task was interrupted; raises CancelledError if that was not our doing: the node is being stopped."""
        task = asyncio.current_task()
        if self._overdue is None or task is None:
            raise asyncio.CancelledError
        task.uncancel()
        return self._overdue

    def _show_life(self, silent_since: float) -> None:
        """Where nothing was sent since then: a comment for the stream's client, and before that the head."""
        if self._forwarding is None and self._began_at <= silent_since:
            self._open_stream(200, _EVENT_STREAM).keep_alive()
        elif self._forwarding is not None and self._forwarding.last <= silent_since:
            self._forwarding.keep_alive()

    # turns and attempts

    async def _in_turn(self) -> None:
        gate = self._services.registry.models[self._model].gate
        self._gate = gate
        entered = gate.enter_at_once()
        if entered is None:
            entered = await gate.enter()
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
                self._fail(failure.error)
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
        registry = self._services.registry
        model = registry.find(self._model)
        elsewhere = model is not None and any(registry.up(id) and id not in self._tried for id in model.backends)
        pause = _RETRIES.wait(
            len(self._tried),
            elapsed,
            random.random(),  # noqa: S311 - so that not all come back at once
            asked=0.0 if elsewhere else failure.asked,
            lost=failure.lost,
        )
        if pause is None or time.monotonic() + pause >= self._deadline:
            return None
        self._end_observation(Tokens(), None)
        self._ticket.fail_attempt()
        await asyncio.sleep(pause)
        try:
            return self._lease()
        except (NotFound, Unavailable):
            return None

    async def _attempt(self, lease: Lease) -> Failure | None:
        """Ask one replica; a Failure if it gave no answer that could be passed on, None if the client has been told."""
        self._route = route = lease.route
        self._tried.append(route.backend)
        try:
            answer = await self._ask(route, self._begin(route))
            try:
                return await self._judge(lease, answer)
            finally:
                answer.abort()
        except Unreachable as error:
            log.warning("backend %s does not answer: %s", route.backend, error)
            self._lost(lease)
            refused = Unavailable(f"The backend of model '{self._model}' is not answering.")
            return Failure(refused, lost=error.lost)
        except asyncio.CancelledError:
            if self._overdue is not None and self._forwarding is None:
                log.warning("backend %s took too long: %s", route.backend, self._overdue)
                self._lost(lease)
            raise
        finally:
            self._first_byte_due = math.inf
            lease.release()

    def _lost(self, lease: Lease) -> None:
        lease.failed()
        self._services.suspect(lease.route.backend)

    def _begin(self, route: Route) -> Lines:
        """Open the attempt's account; returns the head lines of the request to the backend."""
        attempt = self._ticket.attempt(route.backend)
        if not route.reports_steps:
            self._observe(route.backend, attempt)
        key = b"" if route.authorization is None else b"Authorization: %b\r\n" % route.authorization.encode("latin-1")
        return b"Content-Type: %b\r\nX-Request-Id: %b\r\n%b%b" % (
            self._call.content_type, attempt.encode("ascii"), key, self._call.headers.forwarded,
        )  # fmt: skip

    def _observe(self, backend: str, attempt: str) -> None:
        accountant = self._services.accountant

        def emit(started: Nanoseconds, ended: Nanoseconds, tokens: int, context: int) -> None:
            accountant.virtual_step(backend, attempt, started, ended, tokens, context)

        self._observation = Observation(emit, now(), len(self._call.body))
        self._services.observations.add(self._observation)

    async def _ask(self, route: Route, head: Lines) -> Answer:
        """Send the request and wait for the answer's head; raises Unreachable."""
        response_id = self._ticket.attempts[-1] if route.takes_response_id else None
        body = upstream_body(self._call, route.model, response_id)
        self._first_byte_due = time.monotonic() + self._services.patience.first_byte
        answer = await self._services.upstream.post(route.url + self._call.endpoint.upstream_path, body, head)
        self._first_byte_due = math.inf
        return answer

    async def _judge(self, lease: Lease, answer: Answer) -> Failure | None:
        """Pass an answer on, or say why another attempt may do better."""
        try:
            if answer.status in RETRYABLE:
                asked = answer.header("retry-after")
                error = refusals.translate(answer.status, await answer.whole(), asked)
                lease.failed()
                return Failure(error, asked=_seconds(asked))
            lease.succeeded()
            await self._deliver(answer)
        except (BrokeOff, ValueError) as error:
            log.warning("backend %s broke off its answer: %s", lease.route.backend, error)
            lease.failed()
            self._fail(UpstreamFailed("The backend broke off its answer."))
        return None

    # answers

    async def _deliver(self, answer: Answer) -> None:
        if answer.status >= 400:
            body = await answer.whole()
            self._fail(refusals.translate(answer.status, body, answer.header("retry-after")))
        elif answer.status >= 300:
            self._fail(UpstreamFailed(f"The backend answered with a redirect ({answer.status})."))
        elif answer.content_encoding not in {b"", b"identity"}:
            self._fail(UpstreamFailed("The backend compressed its answer, though asked not to."))
        elif answer.content_type.startswith(b"text/event-stream") and answer.status not in BODILESS:
            await self._stream(answer)
        else:
            await self._whole(answer)

    async def _whole(self, answer: Answer) -> None:
        body = await answer.whole()
        is_json = answer.content_type.startswith(b"application/json")
        told = read_json_answer(body) if is_json else Told()
        lines = self._passed(answer)
        translation = self._call.endpoint.translation
        if translation is not None:
            body, kind = translation.answer(self._call.head, body, self._model, self._reply.id)
            is_json = kind == JSON
            lines = self._passed(answer, b"content-type") + b"content-type: %b\r\n" % kind
        if self._forwarding is not None:  # the client has been promised a stream
            self._forwarding.take(sse.event(body))
            self._close_stream(None, told)
            return
        receipt = self._finish("completed", told)
        if is_json and splice.is_object(body) and self._call.headers.energy_body:
            body = splice.append_member(body, b"energy", encode_receipt(receipt))
        self._reply.whole(answer.status, lines + self._processing() + receipt_headers(receipt), body)

    def _passed(self, answer: Answer, *but: bytes) -> Lines:
        """A backend's headers for the client; its limits of requests give way to ours, where there are any."""
        limits = () if self._gate is None else self._gate.rates()
        return passed_back(answer.headers, but=(*but, *(name.encode() for name in limits)))

    def _processing(self) -> Lines:
        """How long it took the backend to answer, and how many more requests its model takes."""
        rates = {} if self._gate is None else self._gate.rates()
        limits = "".join(f"{name}: {text}\r\n" for name, text in rates.items())
        return processing(time.perf_counter() - self._began) + limits.encode()

    async def _stream(self, answer: Answer) -> None:
        forwarding = self._forwarding or self._open_stream(answer.status, self._passed(answer))
        self._reply.throttle(answer)
        self._answer = answer
        await answer.pump(forwarding.take)
        self._answer = None
        forwarding.finish()
        self._close_stream(None)

    def _open_stream(self, status: int, lines: Lines) -> Forwarding:
        """Send the head of a stream."""
        self._reply.stream(status, lines + self._processing() + self._stream_head())
        self._sifter = Sifter(self._call.endpoint.dialect, self._call.client_wants_usage)
        self._forwarding = Forwarding(self._reply, self._sifter, self._first_token)
        return self._forwarding

    def _first_token(self) -> Observation | None:
        self._services.observer.first_token(self._model, time.perf_counter() - self._began)
        return self._observation

    def _stream_head(self) -> Lines:
        """What can be said before the energy is known: where its figures will come from."""
        registry, terms, route = self._services.registry, self._ticket.terms, self._route
        model = registry.find(self._model) if route is None else None
        backend = route.backend if route is not None else model.backends[0] if model is not None else ""
        reports = route.reports_steps if route is not None else registry.reports_steps(backend)
        expected = self._services.accountant.expectation(backend, terms, reports_steps=reports)
        return stream_head_headers(
            self._reply.id,
            method=expected.method,
            meter=expected.meter,
            boundary=terms.boundary,
            intensity=terms.intensity,
        )

    def _close_stream(self, error: ApiError | None, told: Told | None = None) -> None:
        """`told` is what the backend told of its work elsewhere than in the stream."""
        sifter = self._sifter
        assert sifter is not None
        error = error or sifter.failure
        energy = None
        if self._ticket.attempts:
            receipt = self._finish("failed" if error else "completed", told or sifter.answer())
            energy = encode_receipt(receipt) if self._call.headers.energy_body else None
        self._reply.end(sifter.close(energy, error))

    def _fail(self, error: ApiError) -> None:
        if self._forwarding is not None:
            self._close_stream(error)
            return
        receipt = self._finish("failed", Told())
        body = self._call.endpoint.dialect.envelope(error)
        self._reply.error(error, self._processing() + receipt_headers(receipt), body)

    def _finish(self, outcome: Outcome, told: Told) -> Receipt:
        """End the request's work in the books, with what the backend told of it."""
        if self._call.endpoint.dialect is RESPONSES and self._route is not None:
            self._services.responses.remember(told.id, self._route, self._key)
        tokens = told.usage.tokens() if told.usage is not None else Tokens()
        self._end_observation(tokens, told.timings)
        self._receipt = self._ticket.finish(outcome, tokens)
        if told.usage is not None:
            self._services.observer.tokens(self._model, tokens)
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
