"""A stand-in for an inference engine: OpenAI's HTTP over a simulated continuous batch, with true step reports.

    python tests/backends/fake_engine.py --port 8001 [--model chat] [--token-ms 1] [--start-seconds 0] [--no-steps]

It needs only the standard library and `backends.steps`, and serves after some 0.15 s. Every sequence of every request
joins one batch; a step computes the whole prompt of a new sequence or one token of a running one, takes
`--token-ms` (plus `--prompt-ms` per prompt token), and is reported through `StepReporter` if the environment says so.
A word of the prompt is a token; usage is exact, and a sequence's tokens over its steps are prompt + completion - 1.

Served: `/health`, `/v1/models`, `/v1/chat/completions` and `/v1/completions` (streamed or not, `n`, `max_tokens`,
`stream_options.include_usage`), `/v1/embeddings`, `/classify`, `/v1/classify`, `/pooling` (several inputs), `/score`,
`/rerank`, `/v1/rerank`, `/tokenize`, `/detokenize`, `/v1/images/generations` (`n`, `size`, `num_inference_steps`;
streamed or not), `/v1/images/edits`, `/v1/audio/*`, `/v1/messages` and `count_tokens`, `/v1/responses` (kept, and
fetched by id). Tools are called with `{}`, until the last message is a tool's result; where a JSON schema is given, the
answer is an object of its names.
And for tests to look inside:

- `GET /fake/truth`: `{"steps": count, "requests": {id: {"steps", "tokens", "sequences"}}, "active", "cancelled",
  "received", "connections"}`: how many requests have come in all (health checks and looks inside aside), and how many
  connections are open
- `GET /fake/requests`: `[{"method", "path", "headers", "body"}]`, the last 100, header names in lower case

A test steers a request by commands anywhere in its text: `[[tokens=50 token_ms=20 die_after=3]]`.

| command | what happens |
|---|---|
| `tokens=N` | the answer has N tokens, whatever `max_tokens` says |
| `token_ms=X` | steps with this request in them take X ms |
| `big=N` | every token has N characters |
| `status=N` | answers with an error of this status at once (`Retry-After: 7` on 429 and 503) |
| `garbage` | answers 200 with a body that is not JSON |
| `head_ms=X` | waits before it answers anything |
| `die_after=N` | the engine's process ends (exit code 3) after N tokens of this request |
| `cut_after=N` | the connection is closed after N tokens, without an end |
| `hang_after=N` | nothing more comes after N tokens, the connection stays open |
| `error_after=N` | an error event and `[DONE]` after N tokens (streams) |
| `once` | a retried attempt heeds `tokens` and `token_ms` only |
| `freeze` | the whole engine stops answering, its health check too |
| `gather=N` | nothing is computed before N sequences are there |
| `between_ms=X` | X ms lie between the pictures of a stream |
| `endless` | the stream says `[DONE]`, and its body goes on for ever |
| `no_done` | the stream ends without `[DONE]` |
| `dribble` | a stream's bytes come singly; `crlf`: its lines end in CRLF |
| `energy_headers` | the answer carries `X-Energy-Joules`, `X-Carbon-Grams` and an `energy` field of its own |
"""

import argparse
import asyncio
import base64
import contextlib
import email
import email.policy
import json
import math
import os
import re
import secrets
import struct
import sys
import time
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from backends.steps import StepReporter, attempt_id

Json = dict[str, Any]
Commands = dict[str, float]
_COMMANDS = re.compile(r"\[\[(.*?)\]\]")


# --- the engine: one batch, step by step ---


@dataclass(eq=False)
class Sequence:
    """One sequence in the batch: what it still has to compute, and where its tokens go."""

    request: str
    prompt: int
    length: int
    commands: Commands
    work: int | None = None  # tokens a step computes after the first; 1 unless it is an image
    done: int = 0
    tokens: asyncio.Queue[int] = field(default_factory=asyncio.Queue)


class Engine:
    """Runs the batch, reports its steps, and remembers the truth about them."""

    def __init__(self, token_ms: float, prompt_ms: float, reporter: StepReporter) -> None:
        self._token_ms = token_ms
        self._prompt_ms = prompt_ms
        self._reporter = reporter
        self._batch: list[Sequence] = []
        self._arrival = asyncio.Event()
        self.steps = 0
        self.cancelled = 0
        self.truth: dict[str, Json] = {}

    @property
    def active(self) -> int:
        return len(self._batch)

    async def generate(self, sequence: Sequence) -> AsyncIterator[int]:
        """Compute a sequence, token by token; one that is no longer listened to leaves the batch."""
        self.truth.setdefault(sequence.request, {"steps": 0, "tokens": 0, "sequences": 0})["sequences"] += 1
        self._batch.append(sequence)
        self._arrival.set()
        try:
            for _ in range(sequence.length):
                yield await sequence.tokens.get()
        finally:
            if sequence in self._batch:
                self._batch.remove(sequence)
                self.cancelled += 1

    async def run(self) -> None:
        while True:
            while not self._batch or len(self._batch) < self._gathering():
                self._arrival.clear()
                await self._arrival.wait()
            await self._step(list(self._batch))

    def _gathering(self) -> float:
        """How many sequences those want beside them that have not begun."""
        return max((new.commands.get("gather", 0) for new in self._batch if new.done == 0), default=0)

    async def _step(self, batch: list[Sequence]) -> None:
        work = [sequence.prompt if sequence.done == 0 else sequence.work or 1 for sequence in batch]
        started = time.monotonic_ns()
        await asyncio.sleep(self._seconds(batch))
        ended = time.monotonic_ns()
        contexts = [0 if sequence.work else sequence.prompt + sequence.done for sequence in batch]
        self._reporter.report(started, ended, [sequence.request for sequence in batch], work, contexts)
        self.steps += 1
        for sequence, tokens in zip(batch, work, strict=True):
            self._advance(sequence, tokens)

    def _seconds(self, batch: list[Sequence]) -> float:
        prompts = sum(sequence.prompt for sequence in batch if sequence.done == 0)
        slowest = max(sequence.commands.get("token_ms", self._token_ms) for sequence in batch)
        return (slowest + prompts * self._prompt_ms) / 1000

    def _advance(self, sequence: Sequence, tokens: int) -> None:
        truth = self.truth[sequence.request]
        truth["steps"] += 1
        truth["tokens"] += tokens
        sequence.done += 1
        sequence.tokens.put_nowait(sequence.done)
        if sequence.done >= sequence.length and sequence in self._batch:
            self._batch.remove(sequence)


# --- HTTP, as little of it as serves ---


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        return json.loads(self.body)  # type: ignore[no-any-return]

    @property
    def form(self) -> dict[str, bytes]:
        """A multipart form's parts by their names."""
        head = f"Content-Type: {self.headers['content-type']}\r\n\r\n".encode()
        parts = email.message_from_bytes(head + self.body, policy=email.policy.HTTP).iter_parts()
        named = ((str(part.get_param("name", header="content-disposition")), part) for part in parts)
        return {name: bytes(part.get_payload(decode=True) or b"") for name, part in named}


class Answer:
    """Writes one answer: a whole body, or a stream of events."""

    def __init__(self, writer: asyncio.StreamWriter, commands: Commands) -> None:
        self._writer = writer
        self._commands = commands

    async def whole(self, status: int, body: Json | list[Any] | bytes, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers})
        self._writer.write(data)
        await self._writer.drain()

    async def begin(self) -> None:
        self._head(200, {"Content-Type": "text/event-stream; charset=utf-8", "Transfer-Encoding": "chunked"})
        await self._writer.drain()

    async def event(self, data: Json | str, name: str = "") -> None:
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
        end = "\r\n" if "crlf" in self._commands else "\n"
        raw = (f"event: {name}{end}" if name else "").encode() + f"data: {text}{end}{end}".encode()
        size = 1 if "dribble" in self._commands else len(raw)
        for at in range(0, len(raw), size):
            piece = raw[at : at + size]
            self._writer.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await self._writer.drain()
            if size == 1:
                await asyncio.sleep(0)

    async def end(self) -> None:
        if "endless" in self._commands:
            await asyncio.Event().wait()
        self._writer.write(b"0\r\n\r\n")
        await self._writer.drain()

    def _head(self, status: int, headers: dict[str, str]) -> None:
        if "energy_headers" in self._commands:
            headers |= {"X-Energy-Joules": "999", "X-Carbon-Grams": "999"}
        lines = [f"HTTP/1.1 {status} Fake", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        self._writer.write("\r\n".join(lines).encode())


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *lines = head.decode("latin-1").rstrip().split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    else:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Request(method, path, headers, body)


class Cut(Exception):
    """The connection is to be closed as it is."""


Handler = Callable[[Request, Answer, Commands], Coroutine[None, None, None]]


class Server:
    """The endpoints, over one engine."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model
        self._seen: deque[Json] = deque(maxlen=100)
        self._received = 0
        self._connections = 0
        self._stored: dict[str, Json] = {}
        self._handlers: dict[str, Handler] = {
            "/health": self._health,
            "/v1/models": self._models,
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completion,
            "/v1/embeddings": self._embeddings,
            "/classify": self._classify,
            "/v1/classify": self._classify,
            "/pooling": self._pooling,
            "/score": self._score,
            "/rerank": self._rerank,
            "/v1/rerank": self._rerank,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
            "/v1/images/generations": self._images,
            "/v1/images/edits": self._edits,
            "/v1/audio/transcriptions": self._transcription,
            "/v1/audio/translations": self._transcription,
            "/v1/audio/speech": self._speech,
            "/v1/messages": self._messages,
            "/v1/messages/count_tokens": self._count_tokens,
            "/v1/responses": self._responses,
            "/fake/truth": self._truth,
            "/fake/requests": self._requests,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            with contextlib.suppress(ConnectionError, Cut):
                while request := await read_request(reader):
                    await self._watched(reader, self._answer(request, writer))
        finally:
            self._connections -= 1
            writer.close()

    async def _watched(self, reader: asyncio.StreamReader, handling: Coroutine[None, None, None]) -> None:
        """Handle a request, but stop at once when its client hangs up."""
        answer = asyncio.ensure_future(handling)
        # A client that pipelines would lose a byte here; none does.
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise Cut
            answer.result()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(self, request: Request, writer: asyncio.StreamWriter) -> None:
        text = request.body.decode(errors="replace")
        commands = commands_in(text)
        if "once" in commands and "." in request.headers.get("x-request-id", ""):
            commands = {name: value for name, value in commands.items() if name in {"tokens", "token_ms"}}
        answer = Answer(writer, commands)
        if not request.path.startswith(("/fake", "/health")):
            self._received += 1
            self._seen.append({**vars(request), "body": text})
        path = request.path.partition("?")[0]
        handler = self._handlers.get(path)
        if handler is None and path.startswith("/v1/responses/"):
            handler = self._stored_response
        if handler is None:
            await answer.whole(404, error(404, "Not Found"))
            return
        await asyncio.sleep(commands.get("head_ms", 0) / 1000)
        if "freeze" in commands:
            time.sleep(3600)  # noqa: ASYNC251 - the point of it
        if status := int(commands.get("status", 0)):
            more = {"Retry-After": "7"} if status in {429, 503} else {}
            await answer.whole(status, error(status, f"a fake error of status {status}"), **more)
        elif "garbage" in commands:
            await answer.whole(200, b"<html>not json")
        else:
            await self._handled(handler, request, answer, commands)

    async def _handled(self, handler: Handler, request: Request, answer: Answer, commands: Commands) -> None:
        """As real engines do, refuse a body that is not what it should be."""
        try:
            await handler(request, answer, commands)
        except (ValueError, TypeError, KeyError) as problem:
            await answer.whole(400, error(400, f"the body cannot be read: {problem}"))

    # --- endpoints ---

    async def _health(self, request: Request, answer: Answer, commands: Commands) -> None:
        await answer.whole(200, {"status": "ok"})

    async def _models(self, request: Request, answer: Answer, commands: Commands) -> None:
        model = {"id": self._model, "object": "model", "created": 0, "owned_by": "fake"}
        await answer.whole(200, {"object": "list", "data": [model]})

    async def _truth(self, request: Request, answer: Answer, commands: Commands) -> None:
        engine = self._engine
        truth = {"steps": engine.steps, "requests": engine.truth}
        counts = {"active": engine.active, "cancelled": engine.cancelled}
        counts |= {"received": self._received, "connections": self._connections}
        await answer.whole(200, {**truth, **counts})

    async def _requests(self, request: Request, answer: Answer, commands: Commands) -> None:
        await answer.whole(200, list(self._seen))

    async def _tokenize(self, request: Request, answer: Answer, commands: Commands) -> None:
        count = words(request.json.get("prompt") or request.json.get("messages"))
        await answer.whole(200, {"count": count, "max_model_len": 4096, "tokens": list(range(count))})

    async def _detokenize(self, request: Request, answer: Answer, commands: Commands) -> None:
        await answer.whole(200, {"prompt": " ".join(f"wört{token}" for token in request.json["tokens"])})

    async def _chat(self, request: Request, answer: Answer, commands: Commands) -> None:
        messages = request.json.get("messages")
        if not isinstance(messages, list):
            await answer.whole(400, error(400, "messages: a list is required"))
            return
        content = [message.get("content") for message in messages]
        await Generation(self._engine, request, commands, words(content), chat=True).answer(answer)

    async def _completion(self, request: Request, answer: Answer, commands: Commands) -> None:
        await Generation(self._engine, request, commands, words(request.json.get("prompt")), chat=False).answer(answer)

    async def _forward(self, request: Request, commands: Commands, prefix: str) -> tuple[list[str], int]:
        """One forward pass over each input: the inputs, and their tokens in all."""
        given = request.json.get("input")
        inputs: list[str] = given if isinstance(given, list) else [str(given)]
        sequences = [Sequence(our_id(request, prefix), words(text), 1, commands) for text in inputs]
        await asyncio.gather(*(drained(self._engine.generate(sequence)) for sequence in sequences))
        return inputs, sum(sequence.prompt for sequence in sequences)

    async def _embeddings(self, request: Request, answer: Answer, commands: Commands) -> None:
        inputs, tokens = await self._forward(request, commands, "embd")
        vector: object = [0.6, 0.8]
        if request.json.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack("<2f", 0.6, 0.8)).decode()
        data = [{"object": "embedding", "index": at, "embedding": vector} for at in range(len(inputs))]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await answer.whole(200, {"object": "list", "model": request.json["model"], "data": data, "usage": usage})

    async def _pooling(self, request: Request, answer: Answer, commands: Commands) -> None:
        inputs, tokens = await self._forward(request, commands, "pooling")
        data = [{"index": at, "object": "pooling", "data": [0.6, 0.8]} for at in range(len(inputs))]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        await answer.whole(200, {"object": "list", "model": request.json["model"], "data": data, "usage": usage})

    async def _pairs(self, request: Request, commands: Commands, one: object, others: object) -> tuple[int, Json]:
        """One forward pass over each pair: how many there are, and the usage."""
        texts = others if isinstance(others, list) else [others]
        prompts = [words([one, text]) for text in texts]
        sequences = [Sequence(our_id(request, "score"), prompt, 1, commands) for prompt in prompts]
        await asyncio.gather(*(drained(self._engine.generate(sequence)) for sequence in sequences))
        return len(texts), {"prompt_tokens": sum(prompts), "total_tokens": sum(prompts)}

    async def _score(self, request: Request, answer: Answer, commands: Commands) -> None:
        body = request.json
        count, usage = await self._pairs(request, commands, body["text_1"], body["text_2"])
        data = [{"index": at, "object": "score", "score": 0.5} for at in range(count)]
        await answer.whole(200, {"object": "list", "model": body["model"], "data": data, "usage": usage})

    async def _rerank(self, request: Request, answer: Answer, commands: Commands) -> None:
        body = request.json
        count, usage = await self._pairs(request, commands, body["query"], body["documents"])
        results = [{"index": at, "relevance_score": 0.5} for at in range(count)]
        await answer.whole(200, {"id": "rerank-1", "model": body["model"], "results": results, "usage": usage})

    async def _classify(self, request: Request, answer: Answer, commands: Commands) -> None:
        inputs, tokens = await self._forward(request, commands, "classify")
        row = {"label": "POSITIVE", "probs": [0.1, 0.9], "num_classes": 2}
        data = [{"index": at, **row} for at in range(len(inputs))]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
        body = {"id": f"classify-{secrets.token_hex(16)}", "object": "list", "created": int(time.time())}
        await answer.whole(200, {**body, "model": request.json.get("model"), "data": data, "usage": usage})

    async def _images(self, request: Request, answer: Answer, commands: Commands) -> None:
        body = request.json
        size = str(body.get("size") or "auto").replace("auto", "64x64")
        width, height = map(int, size.split("x"))
        steps = int(body.get("num_inference_steps") or 10)
        pixels = width * height // 64
        count = int(body.get("n") or 1)
        sequences = [Sequence(our_id(request, "img"), pixels, steps, commands, work=pixels) for _ in range(count)]
        await asyncio.gather(*(drained(self._engine.generate(sequence)) for sequence in sequences))
        picture = base64.b64encode(png(width, height)).decode()
        common = {"created": int(time.time()), "size": size, "output_format": "png"}
        if not body.get("stream"):
            await answer.whole(200, {**common, "data": [{"b64_json": picture} for _ in range(count)]})
            return
        await answer.begin()
        name = "image_generation.completed"
        for number in range(count):
            await asyncio.sleep(commands.get("between_ms", 0) / 1000 if number else 0)
            await answer.event({"type": name, **common, "b64_json": picture}, name)
        await answer.end()

    async def _edits(self, request: Request, answer: Answer, commands: Commands) -> None:
        form = request.form if "boundary" in request.headers["content-type"] else {}
        if "image" not in form:
            await answer.whole(400, error(400, "image: a file is required"))
            return
        await drained(self._engine.generate(Sequence(our_id(request, "img"), 64, 4, commands, work=64)))
        picture = base64.b64encode(form["image"]).decode()
        await answer.whole(200, {"created": 0, "data": [{"b64_json": picture}]})

    async def _transcription(self, request: Request, answer: Answer, commands: Commands) -> None:
        form = request.form
        if "file" not in form:
            await answer.whole(400, error(400, "file: a file is required"))
            return
        await drained(self._engine.generate(Sequence(our_id(request, "transcribe"), 1, 4, commands)))
        text = f"{len(form['file'])} bytes heard by {form.get('model', b'?').decode()}"
        await answer.whole(200, {"text": text, "usage": {"type": "duration", "seconds": 1}})

    async def _speech(self, request: Request, answer: Answer, commands: Commands) -> None:
        await drained(self._engine.generate(Sequence(our_id(request, "speech"), 1, 4, commands)))
        await answer.whole(200, b"ID3" + request.json["input"].encode(), **{"Content-Type": "audio/mpeg"})

    async def _count_tokens(self, request: Request, answer: Answer, commands: Commands) -> None:
        await answer.whole(200, {"input_tokens": words(request.json.get("messages"))})

    async def _messages(self, request: Request, answer: Answer, commands: Commands) -> None:
        await AnthropicMessage(self._engine, request, commands).answer(answer)

    async def _responses(self, request: Request, answer: Answer, commands: Commands) -> None:
        made = OpenAIResponse(self._engine, request, commands)
        self._stored[made.id] = made.told("in_progress")
        await made.answer(answer)
        self._stored[made.id] = made.told("completed")

    async def _stored_response(self, request: Request, answer: Answer, commands: Commands) -> None:
        id_, _, rest = request.path.partition("?")[0].removeprefix("/v1/responses/").partition("/")
        found = self._stored.get(id_)
        if found is None:
            await answer.whole(404, error(404, f"Response with id '{id_}' not found."))
        elif rest == "input_items":
            await answer.whole(200, {"object": "list", "data": [], "has_more": False})
        elif request.method == "DELETE":
            del self._stored[id_]
            await answer.whole(200, {"id": id_, "object": "response", "deleted": True})
        else:
            await answer.whole(200, found | ({"status": "cancelled"} if rest == "cancel" else {}))


class AnthropicMessage:
    """The answer to `/v1/messages`; a tool, if there is one, is called with an empty input."""

    def __init__(self, engine: Engine, request: Request, commands: Commands) -> None:
        body = request.json
        self._body = body
        self._engine = engine
        self._commands = commands
        length = int(commands.get("tokens", body.get("max_tokens") or 16))
        content = [message.get("content") for message in body["messages"]]
        self._sequence = Sequence(our_id(request, "chatcmpl"), words(content), length, commands)
        self._id = f"msg_{request.headers.get('x-request-id', secrets.token_hex(16))}"
        self._tools = [] if "tool_result" in json.dumps(content[-1]) else body.get("tools") or []

    async def answer(self, answer: Answer) -> None:
        await (self._stream(answer) if self._body.get("stream") else self._whole(answer))

    def _message(self, content: list[Json], output: int) -> Json:
        usage = {"input_tokens": self._sequence.prompt, "output_tokens": output}
        more = {"stop_reason": self._reason(), "stop_sequence": None}
        common = {"id": self._id, "type": "message", "role": "assistant", "model": self._body["model"]}
        return {**common, "content": content, **more, "usage": usage}

    def _reason(self) -> str:
        return "tool_use" if self._tools else "end_turn"

    def _calls(self) -> list[Json]:
        return [{"type": "tool_use", "id": "toolu_1", "name": tool["name"], "input": {}} for tool in self._tools]

    async def _whole(self, answer: Answer) -> None:
        text = " ".join([f"wört{number}" async for number in self._engine.generate(self._sequence)])
        content: list[Json] = [{"type": "text", "text": text}, *self._calls()]
        await answer.whole(200, self._message(content, self._sequence.length))

    async def _stream(self, answer: Answer) -> None:
        async def tell(name: str, **data: Any) -> None:
            await answer.event({"type": name, **data}, name)

        await answer.begin()
        await tell("message_start", message={**self._message([], 0), "stop_reason": None})
        await tell("content_block_start", index=0, content_block={"type": "text", "text": ""})
        async for number in self._engine.generate(self._sequence):
            await tell("content_block_delta", index=0, delta={"type": "text_delta", "text": f"wört{number} "})
        await tell("content_block_stop", index=0)
        for index, call in enumerate(self._calls(), 1):
            await tell("content_block_start", index=index, content_block=call)
            delta = {"type": "input_json_delta", "partial_json": "{}"}
            await tell("content_block_delta", index=index, delta=delta)
            await tell("content_block_stop", index=index)
        usage = {"output_tokens": self._sequence.length}
        await tell("message_delta", delta={"stop_reason": self._reason(), "stop_sequence": None}, usage=usage)
        await tell("message_stop")
        await answer.end()


class OpenAIResponse:
    """The answer to `/v1/responses`."""

    def __init__(self, engine: Engine, request: Request, commands: Commands) -> None:
        body = request.json
        self._body = body
        self._engine = engine
        length = int(commands.get("tokens", body.get("max_output_tokens") or 16))
        self._sequence = Sequence(our_id(request, "resp"), words(body.get("input")), length, commands)
        self.id = str(body.get("request_id") or f"resp_{secrets.token_hex(16)}")
        self._text = ""

    def _item(self) -> Json:
        part = {"type": "output_text", "text": self._wanted(), "annotations": []}
        return {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}

    def _wanted(self) -> str:
        """The text, or an object of the schema's names where one was asked for."""
        schema = ((self._body.get("text") or {}).get("format") or {}).get("schema")
        return json.dumps(dict.fromkeys(schema["properties"], self._text)) if schema else self._text

    def _output(self) -> list[Json]:
        tools = [] if "function_call_output" in json.dumps(self._body["input"]) else self._body.get("tools") or []
        call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "arguments": "{}", "status": "completed"}
        return [{**call, "name": tool["name"]} for tool in tools] or [self._item()]

    def told(self, status: str) -> Json:
        prompt, length = self._sequence.prompt, self._sequence.length
        details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
        usage = {"input_tokens": prompt, "output_tokens": length, "total_tokens": prompt + length, **details}
        done = status == "completed"
        common = {"id": self.id, "object": "response", "created_at": 0, "model": self._body.get("model")}
        settings = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "error": None}
        output = self._output() if done else []
        return {**common, **settings, "status": status, "output": output, "usage": usage if done else None}

    async def answer(self, answer: Answer) -> None:
        await (self._stream(answer) if self._body.get("stream") else self._whole(answer))

    async def _whole(self, answer: Answer) -> None:
        self._text = " ".join([f"wört{number}" async for number in self._engine.generate(self._sequence)])
        await answer.whole(200, self.told("completed"))

    async def _stream(self, answer: Answer) -> None:
        told = 0

        async def tell(name: str, **data: Any) -> None:
            nonlocal told
            await answer.event({"type": name, "sequence_number": told, **data}, name)
            told += 1

        await answer.begin()
        await tell("response.created", response=self.told("in_progress"))
        await tell("response.output_item.added", output_index=0, item={**self._item(), "content": []})
        part = {"type": "output_text", "text": "", "annotations": []}
        where = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        await tell("response.content_part.added", **where, part=part)
        async for number in self._engine.generate(self._sequence):
            self._text += f"wört{number} "
            await tell("response.output_text.delta", **where, delta=f"wört{number} ", logprobs=[])
        await tell("response.output_text.done", **where, text=self._text, logprobs=[])
        await tell("response.output_item.done", output_index=0, item=self._item())
        await tell("response.completed", response=self.told("completed"))
        await answer.end()


class Generation:
    """The answer to one chat or text completion."""

    def __init__(self, engine: Engine, request: Request, commands: Commands, prompt: int, *, chat: bool) -> None:
        body = request.json
        self._engine = engine
        self._body = body
        self._commands = commands
        self._chat = chat
        most = body.get("max_completion_tokens") or body.get("max_tokens")
        length = int(commands.get("tokens", most or 16))
        self._ended = "length" if most and length >= most else "stop"
        self._id = ("chatcmpl-" if chat else "cmpl-") + (request.headers.get("x-request-id") or secrets.token_hex(16))
        ours = our_id(request, self._id)
        self._sequences = [Sequence(ours, prompt, length, commands) for _ in range(int(body.get("n") or 1))]
        answered = chat and body["messages"] and body["messages"][-1].get("role") == "tool"
        self._tools: list[Json] = [] if answered else body.get("tools") or []
        self._usage = {
            "prompt_tokens": prompt,
            "completion_tokens": length * len(self._sequences),
            "total_tokens": prompt + length * len(self._sequences),
        }

    async def answer(self, answer: Answer) -> None:
        await (self._stream(answer) if self._body.get("stream") else self._whole(answer))

    async def _whole(self, answer: Answer) -> None:
        texts = await asyncio.gather(*(self._text(sequence) for sequence in self._sequences))
        choices = [self._choice(at, self._wanted(text), self._ended, delta=False) for at, text in enumerate(texts)]
        if self._tools:
            message = {"role": "assistant", "content": None, "tool_calls": self._calls("{}")}
            choices[0] |= {"finish_reason": "tool_calls", "message": message}
        body = {**self._common(delta=False), "choices": choices, "usage": self._usage}
        await answer.whole(200, body | ({"energy": "fake"} if "energy_headers" in self._commands else {}))

    def _calls(self, arguments: str, *, begin: bool = True) -> list[Json]:
        """A call of each tool, or the next piece of its arguments."""
        found = []
        for at, tool in enumerate(self._tools):
            named = {"id": f"call_{at}", "type": "function"} if begin else {}
            name = {"name": tool["function"]["name"]} if begin else {}
            found.append({"index": at, **named, "function": {**name, "arguments": arguments}})
        return found

    def _wants_json(self) -> bool:
        return "json" in (self._body.get("response_format") or {}).get("type", "")

    def _wanted(self, text: str) -> str:
        """A JSON object where one was asked for: the schema's names, each with the text."""
        if not self._wants_json():
            return text
        schema = (self._body["response_format"].get("json_schema") or {}).get("schema") or {}
        return json.dumps(dict.fromkeys(schema.get("properties", {}), text))

    async def _text(self, sequence: Sequence) -> str:
        text = ""
        async for number in self._engine.generate(sequence):
            text += self._word(number)
            await self._mishap(number, None)
        return text

    async def _stream(self, answer: Answer) -> None:
        await answer.begin()
        turn = asyncio.Lock()
        await asyncio.gather(*(self._tell(at, answer, turn) for at in range(len(self._sequences))))
        if (self._body.get("stream_options") or {}).get("include_usage"):
            await answer.event({**self._common(delta=True), "choices": [], "usage": self._usage})
        if "no_done" not in self._commands:
            await answer.event("[DONE]")
        await answer.end()

    async def _tell(self, index: int, answer: Answer, turn: asyncio.Lock) -> None:
        sequence = self._sequences[index]
        async for number in self._engine.generate(sequence):
            async with turn:
                choice = self._piece(index, number, last=number == sequence.length)
                await answer.event({**self._common(delta=True), "choices": [choice]})
            await self._mishap(number, answer)

    def _piece(self, index: int, number: int, *, last: bool) -> Json:
        """What a token adds to a stream: a word, or a bit of a tool's arguments or of an object (blanks, then all)."""
        ended = self._ended if last else None
        if self._tools:
            choice = self._choice(index, "", ended and "tool_calls", delta=True)
            calls = self._calls("{}" if last else " ", begin=number == 1)
            return choice | {"delta": {"role": "assistant", "content": None, "tool_calls": calls}}
        if self._wants_json():
            return self._choice(index, self._wanted("wört") if last else " ", ended, delta=True)
        return self._choice(index, self._word(number), ended, delta=True)

    async def _mishap(self, number: int, answer: Answer | None) -> None:
        """What the request's commands want to go wrong after this token."""
        if self._commands.get("die_after") == number:
            os._exit(3)
        if self._commands.get("cut_after") == number:
            raise Cut
        if self._commands.get("hang_after") == number:
            await asyncio.sleep(3600)
        if self._commands.get("error_after") == number and answer:
            await answer.event(error(500, "a fake error in the stream"))
            await answer.event("[DONE]")
            await answer.end()
            raise Cut

    def _word(self, number: int) -> str:
        return f"wört{number} ".rjust(int(self._commands.get("big", 0)), "x")

    def _common(self, *, delta: bool) -> Json:
        name = ("chat.completion.chunk" if delta else "chat.completion") if self._chat else "text_completion"
        return {"id": self._id, "object": name, "created": 1_700_000_000, "model": self._body.get("model")}

    def _choice(self, index: int, text: str, reason: str | None, *, delta: bool) -> Json:
        content = {"role": "assistant", "content": text}
        told = {"delta" if delta else "message": content} if self._chat else {"text": text}
        return {"index": index, **told, "logprobs": None, "finish_reason": reason}


# --- small things ---


async def drained(tokens: AsyncIterator[int]) -> None:
    async for _ in tokens:
        pass


def our_id(request: Request, prefix: str) -> str:
    """The proxy's id as a reporter finds it: inside the engine's own."""
    return attempt_id(f"{prefix}-{request.headers.get('x-request-id', '')}-{secrets.token_hex(4)}")


def commands_in(text: str) -> Commands:
    pairs = (word.partition("=") for group in _COMMANDS.findall(text) for word in group.split())
    return {name: float(value or 1) for name, _, value in pairs}


def words(content: object) -> int:
    """How many words a prompt has, commands aside; at least one."""
    if isinstance(content, list):
        return max(1, sum(words(part) for part in content))
    if isinstance(content, dict):
        return words(content.get("text") or content.get("content"))
    return max(1, len(_COMMANDS.sub("", str(content)).split()))


def error(status: int, message: str) -> Json:
    """An error as vLLM writes it: its code is a number."""
    return {"error": {"message": message, "type": "FakeError", "param": None, "code": status}}


def png(width: int, height: int) -> bytes:
    """A grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(b"".join(b"\0" + b"\x80" * width for _ in range(height)))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


async def serve(options: argparse.Namespace) -> None:
    if options.fail:
        raise RuntimeError(options.fail)
    if options.unable:
        StepReporter.from_environment().unable(options.unable)
    reporter = StepReporter.from_environment(environment={} if options.no_steps or options.unable else os.environ)
    reporter.state(loading=True)
    await asyncio.sleep(options.start_seconds)
    reporter.state(loading=False)
    engine = Engine(options.token_ms, options.prompt_ms, reporter)
    running = asyncio.ensure_future(engine.run())
    server = await asyncio.start_server(Server(engine, options.model).serve, "127.0.0.1", options.port, backlog=1024)
    sys.stderr.write(f"INFO fake engine serves {options.model} on port {options.port}\n")
    if not math.isinf(options.die_after_seconds):
        asyncio.get_running_loop().call_later(options.die_after_seconds, os._exit, 3)
    async with server:
        await running


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in inference engine for tests.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="chat")
    parser.add_argument("--token-ms", type=float, default=1.0)
    parser.add_argument("--prompt-ms", type=float, default=0.01)
    parser.add_argument("--start-seconds", type=float, default=0.0)
    parser.add_argument("--die-after-seconds", type=float, default=math.inf)
    parser.add_argument("--fail", default="", help="raise a RuntimeError with this text at the start")
    parser.add_argument("--unable", default="", help="report no steps, and tell the proxy why")
    parser.add_argument("--no-steps", action="store_true", help="report no steps")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
