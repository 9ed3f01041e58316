"""`python -m backends.diffusers.server`: serve one text-to-image pipeline on 127.0.0.1."""

import argparse
import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from backends.diffusers import OPTIONS
from backends.diffusers.drawing import Drawing, DrawingJob, Drawn, Order, Preview, Progress
from backends.diffusers.schema import REQUEST, Look, understood, usage
from backends.launching import parser
from backends.serving import (
    Handler,
    Host,
    JobQueue,
    app,
    check_model,
    disconnected,
    finished,
    json_response,
    main,
    read_json,
    request_id,
    serve,
    translated,
)
from backends.steps import StepReporter

if TYPE_CHECKING:
    from PIL.Image import Image

    from backends.diffusers.pipeline import ImageEngine

_SECONDS_BETWEEN_COMMENTS = 0.5
_SECONDS_OF_SILENCE = 10  # proxies on the way take a longer one for a dead line


def load(arguments: argparse.Namespace, reporter: StepReporter) -> "ImageEngine":
    from backends.diffusers import pipeline  # noqa: PLC0415  # only the engine's thread loads torch

    return pipeline.load(arguments, reporter)


def generations(host: "Host[ImageEngine]", arguments: argparse.Namespace) -> Handler:
    """The handler of `/v1/images/generations`."""

    async def generate(request: Request) -> Response:
        engine = host.engine
        asked = await read_json(request, REQUEST, arguments.max_body_bytes)
        check_model(asked.model, arguments.name)
        drawing, look = understood(asked, engine.abilities)
        events = Events()
        job = DrawingJob(request_id(request)[1], Order(drawing, events.tell))
        ahead = host.queue.put([job])
        if asked.stream:
            headers = {"Cache-Control": "no-cache", "X-Queue-Position": str(ahead)}
            return StreamingResponse(
                _stream(request, job, look, events), headers=headers, media_type="text/event-stream"
            )
        (drawn,) = await finished(request, [job])
        return json_response(await _answer(drawn, drawing, look), headers={"X-Queue-Position": str(ahead)})

    return generate


class Events:
    """What the engine's thread tells, for the event loop to take; None when there is nothing more to wait for."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Progress | Preview | None] = asyncio.Queue()

    def tell(self, event: Progress | Preview | None) -> None:
        """Safe to call from any thread."""
        self._loop.call_soon_threadsafe(self.queue.put_nowait, event)


async def _answer(drawn: Drawn, drawing: Drawing, look: Look) -> dict[str, Any]:
    encoded = [await asyncio.to_thread(encoded_image, image, look) for image in drawn.images]
    return {
        "created": int(time.time()),
        **look.fields(),
        "seed": drawing.seed,
        "data": [{"b64_json": image} for image in encoded],
        "usage": usage(drawn.text_tokens, drawn.latent_pixels * len(drawn.images)),
    }


async def _stream(request: Request, job: DrawingJob, look: Look, events: Events) -> AsyncIterator[bytes]:
    """OpenAI's events, with progress as comments between them; a failure is an `error` event."""
    gone = asyncio.ensure_future(disconnected(request))
    gone.add_done_callback(lambda _: events.tell(None))
    job.future.add_done_callback(lambda _: events.tell(None))
    try:
        async for part in _meanwhile(events, look):
            yield part
        if job.future.done():
            for part in await _completed(job.future.result(), look):
                yield part
    except Exception as error:
        yield _event("error", translated(error).body)
    finally:
        gone.cancel()
        job.abandon()


async def _meanwhile(events: Events, look: Look) -> AsyncIterator[bytes]:
    """Previews, and progress or at least signs of life as comments, until there is nothing more to wait for."""
    commented = time.monotonic()
    while True:
        try:
            event = await asyncio.wait_for(events.queue.get(), _SECONDS_OF_SILENCE)
        except TimeoutError:
            yield b": waiting\n\n"
            continue
        if event is None:
            return
        if isinstance(event, Preview):
            yield await _partial(event.image, event.index, look)
        elif time.monotonic() - commented > _SECONDS_BETWEEN_COMMENTS:
            commented = time.monotonic()
            yield b": progress " + msgspec.json.encode(event) + b"\n\n"


async def _partial(image: "Image", index: int, look: Look) -> bytes:
    encoded = await asyncio.to_thread(encoded_image, image, look)
    fields = {"b64_json": encoded, "partial_image_index": index, "created_at": int(time.time()), **look.fields()}
    return _event("image_generation.partial_image", fields)


async def _completed(drawn: Drawn, look: Look) -> list[bytes]:
    """One event for each image; `usage` adds up, so that the last event's is the request's."""
    parts = []
    for number, image in enumerate(drawn.images, 1):
        encoded = await asyncio.to_thread(encoded_image, image, look)
        counted = usage(drawn.text_tokens, drawn.latent_pixels * number)
        fields = {"b64_json": encoded, "created_at": int(time.time()), **look.fields(), "usage": counted}
        parts.append(_event("image_generation.completed", fields))
    return parts


def _event(name: str, fields: dict[str, Any]) -> bytes:
    body = fields if name == "error" else {"type": name, **fields}
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(body) + b"\n\n"


def encoded_image(image: "Image", look: Look) -> str:
    """The image as base64 of the asked format."""
    buffer = io.BytesIO()
    if look.output_format == "png":
        image.save(buffer, "png", compress_level=3)  # a third of the time of the default for a few per cent of size
    else:
        image.convert("RGB").save(buffer, look.output_format, quality=look.compression)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def run(arguments: argparse.Namespace) -> int:
    reporter = StepReporter.from_environment()
    host: Host[ImageEngine] = Host(lambda: load(arguments, reporter), JobQueue(arguments.max_queue), reporter)
    application = app(arguments.name, host, {"/v1/images/generations": generations(host, arguments)})
    return serve(application, host, arguments.port, "diffusers", arguments.model)


if __name__ == "__main__":
    main(run, parser("backends.diffusers.server", OPTIONS).parse_args())
