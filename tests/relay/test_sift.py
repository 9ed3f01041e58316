"""What a client sees of a stream's end, whatever API it speaks and however the backend's bytes were cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.energy.receipt import Tokens
from proxy.errors import UpstreamFailed
from proxy.relay.dialects import ANTHROPIC, IMAGES, OPENAI, RESPONSES, Dialect, read_answer
from proxy.relay.sift import Sifter
from proxy.relay.sse import EventCutter, count_data

ENERGY = b'{"energy_joules":1.5}'
TOKEN = b'data: {"choices":[{"delta":{"content":"hi \\"usage\\":{"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def through(
    chunks: list[bytes], dialect: Dialect = OPENAI, *, show: bool = True, energy: bytes | None = ENERGY
) -> bytes:
    cutter, sifter = EventCutter(), Sifter(dialect, show)
    out = [sifter.sift(cutter.feed(chunk)) for chunk in chunks]
    out.append(sifter.sift(cutter.rest()))
    return b"".join(out) + sifter.close(energy)


def test_the_usage_chunk_carries_the_receipt_beside_usage() -> None:
    out = through([TOKEN, USAGE + DONE])
    carrier = json.loads(out.split(b"\n\n")[1].removeprefix(b"data: "))
    assert carrier["energy"] == {"energy_joules": 1.5}
    assert carrier["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}


@pytest.mark.parametrize("code", ["400", "null", '"bad_thing"'])
def test_a_backends_error_event_is_told_in_our_envelope_and_is_a_failure(code: str) -> None:
    sifter = Sifter(OPENAI, True)
    event = b'data: {"error":{"message":"it broke","type":"Odd","param":null,"code":%s}}\n\n' % code.encode()
    assert sifter.sift(TOKEN + event) == TOKEN
    assert sifter.sift(DONE) == b""
    assert sifter.failure is not None
    failure, comment, done, rest = sifter.close(ENERGY, sifter.failure).split(b"\n\n")
    told = json.loads(failure.removeprefix(b"data: "))["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["message"] == "it broke"
    assert not isinstance(told["code"], int)
    assert (comment, done, rest) == (b": energy " + ENERGY, b"data: [DONE]", b"")


@pytest.mark.parametrize("text", [b'{"error": 1}', b'"error":'])
def test_talk_of_errors_is_none(text: bytes) -> None:
    event = b"data: " + json.dumps({"choices": [{"delta": {"content": text.decode()}}], "error": None}).encode()
    sifter = Sifter(OPENAI, True)
    assert sifter.sift(event + b"\n\n") == event + b"\n\n"
    assert sifter.failure is None


def test_an_anthropic_error_event_is_a_failure_too() -> None:
    sifter = Sifter(ANTHROPIC, True)
    data = b'{"type":"error","error":{"type":"api_error","message":"it broke"}}'
    assert sifter.sift(b"event: error\ndata: " + data + b"\n\n") == b""
    out = sifter.close(ENERGY, sifter.failure)
    assert json.loads(out.split(b"\n")[1].removeprefix(b"data: ")) == json.loads(data)


def test_the_energy_comment_of_a_proxy_behind_this_one_is_not_passed_on() -> None:
    out = through([TOKEN, b': energy {"energy_joules":9}\n\n', DONE])
    assert out.count(b": energy ") == 1
    assert ENERGY in out


def test_a_usage_chunk_of_several_lines_stays_one_event() -> None:
    pretty = b'data: {"choices": [],\ndata:  "usage": {"prompt_tokens": 3}}\n\n'
    carrier = through([TOKEN, pretty, DONE]).split(b"\n\n")[1]
    lines = [line.removeprefix(b"data: ") for line in carrier.split(b"\n")]
    assert json.loads(b"\n".join(lines))["energy"] == {"energy_joules": 1.5}


@pytest.mark.parametrize("count", [-1, 2**31, 10**30])
def test_impossible_token_counts_are_not_known(count: int) -> None:
    usage = read_answer(b'{"usage":{"prompt_tokens":%d,"completion_tokens":2}}' % count).usage
    assert usage is None or usage.tokens() == Tokens(None, 2, None)


@pytest.mark.parametrize(
    ("run", "count"),
    [
        (TOKEN + TOKEN, 2),
        (b": ping\n\n", 0),
        (b": ping\n\n" + TOKEN, 1),
        (TOKEN.replace(b"\n", b"\r\n") * 3, 3),
        (b'data: {"content":"data: data:"}\n\n', 1),
        (b"event: x\ndata: 1\n\n", 1),
    ],
)
def test_only_events_with_data_are_counted(run: bytes, count: int) -> None:
    assert count_data(run) == count


def test_the_energy_comment_stands_right_before_the_terminal_event() -> None:
    assert through([TOKEN, USAGE, DONE]).endswith(b"\n\n: energy " + ENERGY + b"\n\n" + DONE)


def test_a_usage_chunk_that_only_the_proxy_asked_for_is_not_shown() -> None:
    out = through([TOKEN, USAGE, DONE], show=False)
    assert out == TOKEN + b": energy " + ENERGY + b"\n\n" + DONE


def test_without_energy_the_client_gets_the_backends_bytes() -> None:
    assert through([TOKEN, USAGE, DONE], energy=None) == TOKEN + USAGE + DONE


def test_a_stream_that_nobody_ended_is_ended() -> None:
    assert through([TOKEN]).endswith(DONE)


def test_a_chunk_with_choices_and_usage_passes_in_its_place() -> None:
    both = b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":1}}\n\n'
    assert through([both, TOKEN, DONE], show=False).startswith(both + TOKEN)


def test_every_image_but_the_last_passes_and_the_last_carries_the_receipt() -> None:
    event = b'event: image_generation.completed\ndata: {"type":"image_generation.completed","b64_json":"%d"}\n\n'
    out = through([event % 1, event % 2], IMAGES)
    first, comment, last, rest = out.split(b"\n\n")
    assert first + b"\n\n" == event % 1
    assert comment == b": energy " + ENERGY
    assert json.loads(last.split(b"data: ")[1])["energy"] == {"energy_joules": 1.5}
    assert rest == b""


def test_responses_carry_the_receipt_inside_the_response() -> None:
    created = b'event: response.created\ndata: {"type":"response.created","response":{}}\n\n'
    end = b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"input_tokens":4}}}\n\n'
    out = through([created, end], RESPONSES)
    assert b": energy " in out
    last = json.loads(out.split(b"data: ")[-1])
    assert last["response"] == {"usage": {"input_tokens": 4}, "energy": {"energy_joules": 1.5}}


def test_anthropics_message_delta_carries_the_receipt_and_message_stop_ends() -> None:
    delta = b'event: message_delta\ndata: {"type":"message_delta","usage":{"output_tokens":2}}\n\n'
    stop = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    carrier, comment, last, _ = through([delta, stop], ANTHROPIC).split(b"\n\n")
    assert json.loads(carrier.split(b"data: ")[1])["energy"] == {"energy_joules": 1.5}
    assert comment.startswith(b": energy ")
    assert last + b"\n\n" == stop


@given(st.data())
def test_how_the_bytes_are_cut_changes_nothing(data: st.DataObject) -> None:
    stream = TOKEN * 3 + USAGE + DONE
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=12)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert through(chunks) == through([stream])


@pytest.mark.parametrize("dialect", [OPENAI, IMAGES, RESPONSES, ANTHROPIC])
def test_a_failed_stream_tells_the_error_then_the_energy(dialect: Dialect) -> None:
    out = Sifter(dialect, True).close(ENERGY, UpstreamFailed("gone"))
    assert out.index(b"gone") < out.index(b": energy ")


@given(st.lists(st.binary(max_size=6).map(lambda raw: bytes(b"x\n\r"[byte % 3] for byte in raw)), max_size=40))
def test_wherever_a_stream_is_cut_all_of_it_comes_out_in_whole_events(pieces: list[bytes]) -> None:
    cutter, data = EventCutter(), b"".join(pieces)
    runs = [run for piece in pieces if (run := cutter.feed(piece))]
    assert all(run.endswith((b"\n\n", b"\r\n\r\n")) for run in runs)
    rest = cutter.rest().rstrip(b"\r\n")
    assert b"\n\n" not in rest
    assert b"\r\n\r\n" not in rest
    assert (b"".join(runs) + rest).rstrip(b"\r\n") == data.rstrip(b"\r\n")


def test_an_event_without_end_is_given_up() -> None:
    cutter = EventCutter(limit=1000)
    for _ in range(10):
        assert cutter.feed(b"x" * 99) == b""
    with pytest.raises(ValueError, match="longer than 1000 bytes"):
        cutter.feed(b"x" * 99)
