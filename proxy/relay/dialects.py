"""How each API's streams carry usage and end: the one thing about a stream that the relay must understand.

A dialect looks at a whole event's bytes and says whether it must be held back: a *carrier* gets the receipt as
`energy`, a *terminal* event ends the stream and is preceded by the energy comment, a *failure* is the backend's error,
which goes out in our envelope. Everything else passes untouched.
Neither can hide inside a JSON string: there, quotes are escaped.
"""

from dataclasses import dataclass
from enum import Flag, auto
from typing import Protocol

import msgspec

from proxy.energy.receipt import Tokens
from proxy.errors import ApiError
from proxy.relay import refusals, splice, sse


class Role(Flag):
    """What an event is to the relay."""

    PASS = 0
    CARRIER = auto()
    TERMINAL = auto()
    FAILURE = auto()


#: More tokens than any request has (and than the store's columns hold): a backend that says so does not know.
_MOST_TOKENS = 2**31 - 1


def _count(told: int | None) -> int | None:
    return told if told is not None and 0 <= told <= _MOST_TOKENS else None


_NULL = msgspec.Raw(b"null")


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Any API's usage: OpenAI's chat names, or those of Responses, images and Anthropic."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None
    input_tokens_details: PromptDetails | None = None

    def tokens(self) -> Tokens:
        details = self.prompt_tokens_details or self.input_tokens_details
        return Tokens(
            prompt=_count(self.input_tokens if self.prompt_tokens is None else self.prompt_tokens),
            completion=_count(self.output_tokens if self.completion_tokens is None else self.completion_tokens),
            cached=_count(details.cached_tokens) if details else None,
        )


class Timings(msgspec.Struct):
    """llama.cpp's own account of a request (milliseconds): where it is, it splits prefill from decode."""

    prompt_n: int = 0
    prompt_ms: float = 0.0
    predicted_n: int = 0
    predicted_ms: float = 0.0


class Answer(msgspec.Struct):
    """The part of an answer, or of a stream's last chunk, that says what work it was."""

    usage: Usage | None = None
    timings: Timings | None = None
    choices: list[msgspec.Raw] | None = None
    error: msgspec.Raw = _NULL  # `Raw | None` would take nothing but null
    id: msgspec.Raw = _NULL  # what a stored response is fetched by


_answer = msgspec.json.Decoder(Answer).decode


def read_answer(data: bytes) -> Answer:
    """Decode what an answer says of its own work; nothing known where it is not of that form."""
    try:
        return read_json_answer(data)
    except ValueError:
        return Answer()


def read_json_answer(data: bytes) -> Answer:
    """As `read_answer`; raises ValueError for what is no JSON at all."""
    try:
        return _answer(data)
    except (msgspec.ValidationError, RecursionError):
        return Answer()
    except msgspec.DecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error


class Dialect(Protocol):
    """`name` is the API's; `ends_once` says that nothing can follow a stream's terminal event."""

    @property
    def name(self) -> str: ...
    @property
    def ends_once(self) -> bool: ...
    def role(self, event: bytes) -> Role: ...
    def suspects(self, run: bytes) -> bool:
        """Whether a run of events may hold one that is not to be passed: a cheap test on bytes."""
        ...

    def answer(self, carrier: bytes) -> Answer: ...
    def failure(self, event: bytes) -> ApiError:
        """The error that a backend tells in its stream, as the client is to see it."""
        ...

    def with_energy(self, carrier: bytes, energy: bytes) -> bytes: ...
    def envelope(self, error: ApiError) -> bytes:
        """The body of an error's answer."""
        ...

    def error_event(self, error: ApiError) -> bytes: ...
    def terminal_event(self) -> bytes:
        """What ends a stream whose backend did not end it."""
        ...


@dataclass(frozen=True, slots=True)
class OpenAI:
    """Chat and text completions: a last chunk with `usage` and no choices, then `[DONE]`."""

    name: str = "openai"
    ends_once: bool = True

    def suspects(self, run: bytes) -> bool:
        return b"[DONE]" in run or b'"usage":{' in run or b'"usage": {' in run or b'"error":' in run

    def role(self, event: bytes) -> Role:
        data = sse.payload(event)
        if data.strip() == b"[DONE]":
            return Role.TERMINAL
        if b'"usage"' not in data and b'"error"' not in data:
            return Role.PASS
        answer = read_answer(data)
        if answer.choices:
            return Role.PASS
        if answer.error != _NULL:
            return Role.FAILURE
        return Role.CARRIER if answer.usage is not None else Role.PASS

    def answer(self, carrier: bytes) -> Answer:
        return read_answer(sse.payload(carrier))

    def failure(self, event: bytes) -> ApiError:
        return refusals.of_event(sse.payload(event))

    def with_energy(self, carrier: bytes, energy: bytes) -> bytes:
        return sse.with_payload(carrier, splice.append_member(sse.payload(carrier), b"energy", energy))

    def envelope(self, error: ApiError) -> bytes:
        return error.encode()

    def error_event(self, error: ApiError) -> bytes:
        return b"data: " + error.encode() + b"\n\n"

    def terminal_event(self) -> bytes:
        return b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Named:
    """Streams of events with a `type` each: images, Responses, Anthropic messages.

    `carriers` and `terminals` are the types of events; `inside` names the member that holds the answer (Responses).
    `closing` ends a stream that its backend did not end.
    """

    name: str
    carriers: tuple[bytes, ...]
    terminals: tuple[bytes, ...]
    inside: str | None = None
    closing: bytes = b""
    ends_once: bool = True

    def suspects(self, run: bytes) -> bool:
        return any(mark in run for mark in (*self.carriers, *self.terminals, b"event: error", b'"error"'))

    def role(self, event: bytes) -> Role:
        type_ = _event_type(event)
        if type_ == b"error":
            return Role.FAILURE
        carrier = Role.CARRIER if type_ in self.carriers else Role.PASS
        return carrier | (Role.TERMINAL if type_ in self.terminals else Role.PASS)

    def answer(self, carrier: bytes) -> Answer:
        data = sse.payload(carrier)
        return read_answer((splice.nested(data, self.inside) or data) if self.inside else data)

    def failure(self, event: bytes) -> ApiError:
        return refusals.of_event(sse.payload(event))

    def with_energy(self, carrier: bytes, energy: bytes) -> bytes:
        data = sse.payload(carrier)
        inner = splice.nested(data, self.inside) if self.inside else None
        if self.inside and inner:
            data = splice.replace_members(data, {self.inside: splice.append_member(inner, b"energy", energy)})
        else:
            data = splice.append_member(data, b"energy", energy)
        return sse.with_payload(carrier, data)

    def envelope(self, error: ApiError) -> bytes:
        return error.encode_anthropic() if self.name == "anthropic" else error.encode()

    def error_event(self, error: ApiError) -> bytes:
        data = splice.append_member(self.envelope(error), b"type", b'"error"')
        return b"event: error\ndata: " + data + b"\n\n"

    def terminal_event(self) -> bytes:
        return self.closing


def _event_type(event: bytes) -> bytes:
    for line in event.splitlines():
        if line.startswith(b"event:"):
            return line[6:].strip()
    found = splice.nested(sse.payload(event), "type") if b'"type"' in event else None
    return found.strip(b'"') if found else b""


OPENAI: Dialect = OpenAI()
#: Transcriptions and speech end as chat does, but their usage comes unasked, in the event that tells the end.
AUDIO: Dialect = OpenAI("audio")
_PAINTED = (b"image_generation.completed", b"image_edit.completed")
#: One such event for each image.
IMAGES: Dialect = Named("images", carriers=_PAINTED, terminals=_PAINTED, ends_once=False)
RESPONSES: Dialect = Named(
    "responses",
    carriers=(b"response.completed", b"response.incomplete", b"response.failed"),
    terminals=(b"response.completed", b"response.incomplete", b"response.failed"),
    inside="response",
)
ANTHROPIC: Dialect = Named(
    "anthropic",
    carriers=(b"message_delta",),
    terminals=(b"message_stop",),
    closing=b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
)
