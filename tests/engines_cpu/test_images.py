"""The Diffusers engine server on a stock Stable Diffusion pipeline: answers, step reports, streams, cancellation."""

import base64
import io
import itertools
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from tests.engines_cpu.conftest import PATIENCE, Server, error_of, new_id

PATH = "/v1/images/generations"
SIDE = 32  # pixels: 8 latent pixels times the autoencoder's factor of 4
LATENTS = 8 * 8
STEPS = 8
LONG = {"prompt": "a red cat", "num_inference_steps": 200, "size": "256x256", "n": 2}


def image_of(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


@pytest.fixture(scope="module")
def client(painter: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{painter.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@contextmanager
def hanging(server: Server, body: dict[str, Any], request: str) -> Iterator[None]:
    """A client that waits for the answer until the context ends, and then hangs up."""
    content = json.dumps(body).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nX-Request-Id: {request}\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as line:
        line.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield


def wait_for_queue(server: Server, length: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while server.http.get("/health").json()["queue"] != length:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- answers ---


def test_the_openai_client_gets_an_image(client: openai.OpenAI) -> None:
    answer = client.images.generate(model="painter", prompt="a red cat")
    assert answer.data is not None
    (picture,) = answer.data
    assert picture.b64_json is not None
    image = image_of(picture.b64_json)
    assert (image.format, image.size) == ("PNG", (SIDE, SIDE))
    assert (answer.size, answer.quality, answer.output_format) == (f"{SIDE}x{SIDE}", "medium", "png")
    assert answer.background == "opaque"
    assert answer.usage is not None
    assert answer.usage.output_tokens == LATENTS
    assert answer.usage.input_tokens == answer.usage.input_tokens_details.text_tokens == 5  # three words, begin and end
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_the_size_asked_for_is_drawn(painter: Server) -> None:
    answer = painter.post(PATH, {"prompt": "cat", "size": "64x48"}).json()
    assert image_of(answer["data"][0]["b64_json"]).size == (64, 48)
    assert answer["size"] == "64x48"
    assert answer["usage"]["output_tokens"] == 16 * 12


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_each_output_format_is_what_it_says(painter: Server, kind: str) -> None:
    answer = painter.post(PATH, {"prompt": "cat", "output_format": kind}).json()
    assert image_of(answer["data"][0]["b64_json"]).format == kind.upper()
    assert answer["output_format"] == kind


def test_compression_makes_images_smaller(painter: Server) -> None:
    body = {"prompt": "cat", "output_format": "jpeg", "seed": 1, "size": "64x64"}
    small, large = (painter.post(PATH, {**body, "output_compression": level}).json() for level in (10, 100))
    assert len(small["data"][0]["b64_json"]) < len(large["data"][0]["b64_json"])


def test_a_seed_draws_the_same_images_alone_and_in_company(painter: Server) -> None:
    three = painter.post(PATH, {"prompt": "cat", "n": 3, "seed": 5}).json()
    assert len(three["data"]) == 3
    assert three["usage"]["output_tokens"] == 3 * LATENTS
    for index, picture in enumerate(three["data"]):
        alone = painter.post(PATH, {"prompt": "cat", "seed": 5 + index}).json()
        pairs = zip(
            image_of(picture["b64_json"]).tobytes(), image_of(alone["data"][0]["b64_json"]).tobytes(), strict=True
        )
        assert max(abs(one - other) for one, other in pairs) <= 2  # sums in another order round differently


def test_without_a_seed_images_differ_and_tell_theirs(painter: Server) -> None:
    first, second = (painter.post(PATH, {"prompt": "cat"}).json() for _ in range(2))
    assert first["data"] != second["data"]
    again = painter.post(PATH, {"prompt": "cat", "seed": first["seed"]}).json()
    assert again["data"] == first["data"]


def test_extras_of_other_servers_have_their_effect(painter: Server) -> None:
    body = {"prompt": "cat", "seed": 1}
    plain = painter.post(PATH, body).json()["data"]
    for extra in ({"negative_prompt": "dog"}, {"guidance_scale": 1.0}, {"num_inference_steps": 3}, {"quality": "low"}):
        assert painter.post(PATH, {**body, **extra}).json()["data"] != plain, extra
    for idle in ({"user": "u"}, {"style": "vivid"}, {"background": "auto"}, {"response_format": "b64_json"}):
        assert painter.post(PATH, {**body, **idle}).json()["data"] == plain, idle


# --- step reports ---


@pytest.mark.parametrize(("guidance", "passes"), [(7.5, 2), (1.0, 1)])
def test_every_step_is_reported_with_its_work(painter: Server, guidance: float, passes: int) -> None:
    request = new_id()
    before = time.monotonic_ns()
    body = {"prompt": "cat", "n": 2, "guidance_scale": guidance, "num_inference_steps": 5}
    painter.post(PATH, body, request)
    after = time.monotonic_ns()
    encode, *denoise, decode = painter.recorder.wait_for(request, 7)
    assert len(denoise) == 5
    for step in denoise:
        assert (step.requests, step.tokens, step.contexts) == ([request] * 2, [LATENTS * passes] * 2, [0, 0])
    assert encode.tokens == [16, 16]  # the text encoder's positions
    assert decode.tokens == [LATENTS] * 2
    steps = [encode, *denoise, decode]
    assert before < encode.started
    assert decode.ended < after
    assert all(earlier.ended == later.started for earlier, later in itertools.pairwise(steps))


def test_images_that_do_not_fit_together_are_drawn_in_turn(painter: Server) -> None:
    request = new_id()
    painter.post(PATH, {"prompt": "cat", "n": 3, "num_inference_steps": 2}, request)
    steps = painter.recorder.wait_for(request, 8)
    assert [len(step.requests) for step in steps] == [2, 2, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("quality", "steps", "named"), [("low", 4, "low"), ("auto", 8, "medium"), ("hd", 12, "high")])
def test_quality_costs_steps(painter: Server, quality: str, steps: int, named: str) -> None:
    request = new_id()
    answer = painter.post(PATH, {"prompt": "cat", "quality": quality}, request).json()
    assert len(painter.recorder.wait_for(request, steps + 2)) == steps + 2
    assert answer["quality"] == named


def test_loading_and_warm_up_are_told_before_the_first_request(painter: Server) -> None:
    begun, ended = painter.recorder.states
    assert (begun.loading, ended.loading) == (True, False)
    warm_up = painter.recorder.of("")[0]
    assert begun.at < warm_up.started < warm_up.ended < ended.at


# --- streams ---


@pytest.mark.parametrize("previews", [0, 1, 3])
def test_a_stream_shows_previews_and_then_the_image(client: openai.OpenAI, painter: Server, previews: int) -> None:
    request = new_id()
    events = list(
        client.images.generate(
            model="painter", prompt="cat", stream=True, partial_images=previews, output_format="webp",
            extra_body={"seed": 3}, extra_headers={"X-Request-Id": request},
        )
    )  # fmt: skip
    *partial, completed = events
    assert [event.partial_image_index for event in partial if event.type == "image_generation.partial_image"] == list(
        range(previews)
    )
    for event in events:
        assert image_of(event.b64_json).size == (SIDE, SIDE)
        assert (event.size, event.quality, event.output_format) == (f"{SIDE}x{SIDE}", "medium", "webp")
        assert event.background == "opaque"
        assert event.created_at > 1_700_000_000
    assert completed.type == "image_generation.completed"
    assert completed.usage.output_tokens == LATENTS
    steps = painter.recorder.wait_for(request, STEPS + 2 + previews)
    assert all(earlier.ended == later.started for earlier, later in itertools.pairwise(steps))


def test_a_streamed_image_is_the_one_not_streamed(painter: Server, client: openai.OpenAI) -> None:
    whole = painter.post(PATH, {"prompt": "cat", "seed": 3}).json()["data"][0]["b64_json"]
    events = client.images.generate(prompt="cat", stream=True, partial_images=2, extra_body={"seed": 3})
    assert list(events)[-1].b64_json == whole


def test_previews_come_nearer_to_the_image(client: openai.OpenAI) -> None:
    *previews, final = (
        image_of(event.b64_json).tobytes()
        for event in client.images.generate(prompt="cat", stream=True, partial_images=3, extra_body={"seed": 3})
    )
    distances = [sum(abs(a - b) for a, b in zip(preview, final, strict=True)) for preview in previews]
    assert distances == sorted(distances, reverse=True)


def test_several_streamed_images_each_complete_and_usage_adds_up(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt="cat", n=2, stream=True))
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    used = [event.usage.output_tokens for event in events if event.type == "image_generation.completed"]
    assert used == [LATENTS, 2 * LATENTS]


# --- cancellation and load ---


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_the_drawing(painter: Server, stream: bool) -> None:
    gone, after = new_id(), new_id()
    with hanging(painter, {**LONG, "stream": stream}, gone):
        painter.recorder.wait_for(gone, 3)
    assert painter.post(PATH, {"prompt": "cat"}, after).status_code == 200
    first_after = painter.recorder.wait_for(after, STEPS + 2)[0]
    worked = painter.recorder.of(gone)
    assert 3 <= len(worked) < 200
    assert max(step.ended for step in worked) <= first_after.started


def test_waiting_work_of_a_client_that_hangs_up_is_never_begun(painter: Server) -> None:
    running, gone, after = new_id(), new_id(), new_id()
    with hanging(painter, LONG, running):
        painter.recorder.wait_for(running, 1)
        with hanging(painter, LONG, gone):
            wait_for_queue(painter, 1)
        wait_for_queue(painter, 0)
    assert painter.post(PATH, {"prompt": "cat"}, after).status_code == 200
    painter.recorder.wait_for(after, STEPS + 2)
    assert painter.recorder.of(gone) == []


def test_more_than_may_wait_is_refused_with_a_time_to_come_back(painter: Server) -> None:
    running = new_id()
    with hanging(painter, LONG, running):
        painter.recorder.wait_for(running, 1)
        with hanging(painter, LONG, new_id()), hanging(painter, LONG, new_id()):
            wait_for_queue(painter, 2)
            response = painter.post(PATH, {"prompt": "cat"})
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) >= 1
    assert error_of(response)["code"] == "queue_full"


# --- bad input ---


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "   "}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["cat"]}, "prompt"),
        ({"prompt": "x" * 32_001}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": 11}, "n"),
        ({"n": 1.5}, "n"),
        ({"size": "big"}, "size"),
        ({"size": "0x0"}, "size"),
        ({"size": "-32x32"}, "size"),
        ({"size": "33x32"}, "size"),
        ({"size": "٣٢x٣٢"}, "size"),
        ({"size": "32x32x3"}, "size"),
        ({"size": "99996x99996"}, "size"),
        ({"size": "9" * 5000 + "x32"}, "size"),
        ({"size": 32}, "size"),
        ({"quality": "best"}, "quality"),
        ({"background": "transparent"}, "background"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression"),
        ({"output_compression": 50}, "output_compression"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "partial_images": 4}, "partial_images"),
        ({"partial_images": 1}, "partial_images"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"negative_prompt": 3}, "negative_prompt"),
    ],
)
def test_a_wrong_field_is_refused_by_name(painter: Server, body: dict[str, Any], param: str) -> None:
    response = painter.post(PATH, {"prompt": "cat", **body} if body else body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_the_largest_seed_draws(painter: Server) -> None:
    assert painter.post(PATH, {"prompt": "cat", "n": 2, "seed": 2**63 - 1}).status_code == 200


def test_no_prompt_reaches_the_log(painter: Server) -> None:
    answer = painter.post(PATH, {"prompt": "xyzzy " * 200, "negative_prompt": "plugh " * 200})
    assert answer.status_code == 200
    painter.post(PATH, {"prompt": "xyzzy", "size": "plugh"})
    log = painter.log.read_text()
    assert "xyzzy" not in log
    assert "plugh" not in log


def test_the_server_survived_all_of_this(painter: Server) -> None:
    assert painter.process.poll() is None
    with pytest.raises(httpx.ConnectError):
        httpx.get(painter.url.replace("127.0.0.1", "127.0.0.2"))  # it listens on one address only
    assert painter.recorder.lost == 0
