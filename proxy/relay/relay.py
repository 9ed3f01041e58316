"""The data path's way in: a request that has arrived is read, its model found, and an exchange carried out for it."""

import logging
import time

from proxy.energy.receipt import Request
from proxy.errors import ApiError
from proxy.relay.affinity import affinity_of
from proxy.relay.call import Call, Headers, Inbound, check_headers, read_call
from proxy.relay.dialects import ANTHROPIC
from proxy.relay.endpoints import MODERATIONS, Endpoint
from proxy.relay.exchange import CLIENT_CLOSED, Exchange
from proxy.relay.ids import new_id
from proxy.relay.reply import Reply, Wire, processing
from proxy.relay.services import Services

log = logging.getLogger("joulegate.relay")

_OPENAI_MODERATORS = ("omni-moderation", "text-moderation")
#: The label of a request whose model nobody knows.
_UNKNOWN = "unknown"


class Relay:
    """Serves one model endpoint."""

    def __init__(self, endpoint: Endpoint, services: Services) -> None:
        self._endpoint = endpoint
        self._services = services

    @property
    def max_body_bytes(self) -> int:
        return self._services.max_body_bytes

    def reply(self, wire: Wire) -> Reply:
        """An answer to begin, with the id of its request."""
        reply = Reply(wire, new_id())
        if self._endpoint.dialect is ANTHROPIC:
            reply.extra = b"request-id: %b\r\n" % reply.id.encode()  # what its clients look for
        return reply

    def envelope(self, error: ApiError) -> bytes:
        """The body of an error's answer in the endpoint's API."""
        return self._endpoint.dialect.envelope(error)

    def check(self, headers: Headers) -> None:
        """Refuse what can be refused before the body has come; raises ApiError."""
        check_headers(headers, self._endpoint, self._services.max_body_bytes)

    def refuse(self, reply: Reply, error: ApiError, *, model: str = _UNKNOWN, seconds: float = 0.0) -> None:
        """Answer with an error that no backend has had a part in."""
        reply.error(error, processing(seconds), self.envelope(error))
        self._services.observer.request_finished(model, self._endpoint.path, error.status, seconds)

    def gone(self, seconds: float = 0.0) -> None:
        """The client left before its request had arrived whole."""
        self._services.observer.request_finished(_UNKNOWN, self._endpoint.path, CLIENT_CLOSED, seconds)

    async def serve(self, asked: Inbound, reply: Reply) -> None:
        """Answer a request. Whatever goes wrong is told to the client; nothing is raised but cancellation."""
        began = time.perf_counter()
        intake, model, entered = self._services.intake, _UNKNOWN, False
        try:
            intake.enter()
            entered = True
            call = read_call(asked, self._endpoint)
            model = self._model(call, asked.model)
            code = await self._exchange(call, model, asked, reply, began).run()
        except ApiError as error:
            self.refuse(reply, error, model=model, seconds=time.perf_counter() - began)
            return
        except Exception:
            log.exception("an error of our own on %s", self._endpoint.path)
            self._failed(reply, model, time.perf_counter() - began)
            return
        finally:
            if entered:
                intake.leave()
        self._services.observer.request_finished(model, self._endpoint.path, code, time.perf_counter() - began)

    def _exchange(self, call: Call, model: str, asked: Inbound, reply: Reply, began: float) -> Exchange:
        affinity = affinity_of(self._services.registry.models[model].plan.affinity, asked.headers.raw, call)
        return Exchange(self._services, call, self._request(call, model, reply, asked.key), affinity, reply, began)

    def _model(self, call: Call, in_path: str | None) -> str:
        model = self._services.registry.resolve(self._asked_model(call, in_path), self._endpoint)
        if self._endpoint.translation is not None:
            call.head.model = model
        return model

    def _asked_model(self, call: Call, in_path: str | None) -> str | None:
        """The model a request names: in its path, in its body, or (moderations) as OpenAI calls its own."""
        named = call.head.model if in_path is None else in_path
        if self._endpoint.path != MODERATIONS:
            return named
        if named is not None and named.startswith(_OPENAI_MODERATORS):
            named = None
        return self._services.moderator if named is None else named

    def _request(self, call: Call, model: str, reply: Reply, key: str | None) -> Request:
        client_id = call.headers.client_request_id
        return Request(
            id=reply.id,
            model=model,
            task=self._endpoint.task,
            endpoint=self._endpoint.path,
            created=time.time(),
            client_request_id=None if client_id is None else client_id.decode("ascii"),
            key=key,
        )

    def _failed(self, reply: Reply, model: str, seconds: float) -> None:
        """An error of ours: told as one if nothing has been said yet, else by a broken connection."""
        error = ApiError("The proxy failed. Its log says more.", code="internal_error")
        if reply.status == 0:
            self.refuse(reply, error, model=model, seconds=seconds)
            return
        reply.break_off()
        self._services.observer.request_finished(model, self._endpoint.path, error.status, seconds)
