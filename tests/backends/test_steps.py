"""Step reports between a real sender and a real receiver, over a real socket."""

import asyncio
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from backends.steps import LoadingState, StepReceiver, StepReport, StepReporter, attempt_id

ID = "0123456789abcdef0123456789abcdef"


@dataclass
class Heard:
    """A receiver's callbacks, written down."""

    steps: list[tuple[str, StepReport]] = field(default_factory=list)
    lost: list[tuple[str, int]] = field(default_factory=list)
    states: list[tuple[str, LoadingState]] = field(default_factory=list)

    def on_steps(self, backend: str, steps: Sequence[StepReport]) -> None:
        self.steps += [(backend, step) for step in steps]

    def on_loss(self, backend: str, lost: int) -> None:
        self.lost.append((backend, lost))

    def on_state(self, backend: str, state: LoadingState) -> None:
        self.states.append((backend, state))

    def receiver(self, path: Path, *backends: str) -> StepReceiver:
        return StepReceiver(
            path,
            backends=backends or ("chat",),
            on_steps=self.on_steps,
            on_loss=self.on_loss,
            on_state=self.on_state,
        )


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jg-") as directory:
        yield Path(directory) / "run" / "steps.sock"


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def receiver(path: Path, heard: Heard) -> AsyncIterator[StepReceiver]:
    receiver = heard.receiver(path)
    await receiver.start()
    yield receiver
    await receiver.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - what is waited for is not always an event of ours
            await asyncio.sleep(0.005)


def send(reporter: StepReporter, number: int, participants: int = 1) -> None:
    reporter.report(number, number + 1, [ID] * participants, [1] * participants, [number] * participants)


def raw(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(str(path))
    connection.setblocking(False)
    return connection


def mode(path: Path) -> int | None:
    return path.stat().st_mode & 0o777 if path.exists() else None


async def hung_up(connection: socket.socket) -> bool:
    async with asyncio.timeout(10):
        return await asyncio.get_running_loop().sock_recv(connection, 1) == b""


async def test_a_step_arrives_as_it_was_reported(path: Path, receiver: StepReceiver, heard: Heard) -> None:
    reporter = StepReporter(path, "chat", ("gpu:0", "gpu:1"))
    reporter.report(10, 20, [ID, f"{ID}.1", ""], [512, 1, 3], [512, 900, 3])
    await until(lambda: bool(heard.steps))
    assert heard.steps == [
        ("chat", StepReport(10, 20, ("gpu:0", "gpu:1"), [ID, f"{ID}.1", ""], [512, 1, 3], [512, 900, 3]))
    ]
    assert not heard.lost


async def test_the_beginning_and_end_of_loading_arrive(path: Path, receiver: StepReceiver, heard: Heard) -> None:
    reporter = StepReporter(path, "chat", ("host",))
    before = time.monotonic_ns()
    reporter.state(loading=True)
    reporter.state(loading=False)
    await until(lambda: len(heard.states) == 2)
    assert [state.loading for _, state in heard.states] == [True, False]
    assert before <= heard.states[0][1].at <= heard.states[1][1].at <= time.monotonic_ns()


async def test_grouped_steps_arrive_in_order_and_an_idle_engine_sits_on_none(
    path: Path, receiver: StepReceiver, heard: Heard
) -> None:
    reporter = StepReporter(path, "chat", ("host",), group=8)
    for number in range(20):
        send(reporter, number)
    await until(lambda: len(heard.steps) == 20)
    assert [step.started for _, step in heard.steps] == list(range(20))
    assert not heard.lost


async def test_steps_made_before_the_proxy_listens_arrive_later(path: Path, heard: Heard) -> None:
    reporter = StepReporter(path, "chat", ("host",))
    for number in range(5):
        send(reporter, number)
    receiver = heard.receiver(path)
    await receiver.start()
    await until(lambda: len(heard.steps) == 5)
    await receiver.close()
    assert not heard.lost


async def test_what_the_sender_must_drop_is_told_exactly(path: Path, heard: Heard) -> None:
    reporter = StepReporter(path, "chat", ("host",))
    total = 10_000
    for number in range(total):
        send(reporter, number)
    receiver = heard.receiver(path)
    await receiver.start()
    await until(lambda: bool(heard.steps) and heard.steps[-1][1].started == total - 1)
    await receiver.close()
    assert reporter.lost > 0
    assert sum(lost for _, lost in heard.lost) == reporter.lost == total - len(heard.steps)


async def test_a_receiver_that_does_not_read_loses_steps_but_never_blocks_the_engine(path: Path, heard: Heard) -> None:
    receiver = heard.receiver(path)
    await receiver.start()
    reporter = StepReporter(path, "chat", ("host",))
    send(reporter, 0)
    await until(lambda: len(heard.steps) == 1)
    total = 2000
    for number in range(1, total):  # the event loop does not run meanwhile
        send(reporter, number, participants=256)
    await until(lambda: heard.steps[-1][1].started == total - 1)
    assert sum(lost for _, lost in heard.lost) + len(heard.steps) == total
    assert heard.lost
    await receiver.close()


async def test_a_reporter_finds_a_restarted_proxy(path: Path, heard: Heard) -> None:
    first = heard.receiver(path)
    await first.start()
    reporter = StepReporter(path, "chat", ("host",))
    send(reporter, 0)
    await until(lambda: len(heard.steps) == 1)
    await first.close()
    send(reporter, 1)
    second = heard.receiver(path)
    await second.start()
    await until(lambda: len(heard.steps) == 2)
    assert not heard.lost  # the new proxy does not count its predecessor's steps as lost
    await second.close()


async def test_steps_lost_on_the_way_are_told(path: Path, receiver: StepReceiver, heard: Heard) -> None:
    connection = raw(path)
    step = [1, 2, ["host"], [ID], [1], [1]]
    head = {"v": 1, "backend": "chat", "source": "a", "lost": 0}
    connection.send(msgspec.msgpack.encode({**head, "sequence": 0, "steps": [step]}))
    connection.send(msgspec.msgpack.encode({**head, "sequence": 4, "steps": [step]}))
    connection.send(msgspec.msgpack.encode({**head, "sequence": 5, "lost": 2, "steps": [step]}))
    await until(lambda: len(heard.steps) == 3)
    assert heard.lost == [("chat", 3), ("chat", 2)]
    connection.close()


@pytest.mark.parametrize(
    "message",
    [
        b"\x80\x04K\x01.",
        msgspec.msgpack.encode([1, 2]),
        msgspec.msgpack.encode({"v": 2, "backend": "chat", "source": "a", "sequence": 0, "lost": 0}),
        msgspec.msgpack.encode({"v": 1, "backend": "other", "source": "a", "sequence": 0, "lost": 0}),
        msgspec.msgpack.encode({"v": 1, "backend": "chat", "source": "a", "sequence": -1, "lost": 0}),
        *(
            msgspec.msgpack.encode(
                {"v": 1, "backend": "chat", "source": "a", "sequence": 0, "lost": 0, "steps": [step]}
            )
            for step in (
                [2, 1, ["host"], [ID], [1], [1]],
                [1, 2, ["host"], [ID], [1, 1], [1]],
                [1, 2, ["host"], [ID], [-1], [1]],
                [1, 2**61, ["host"], [ID], [1], [1]],
            )
        ),
    ],
)
async def test_a_malformed_message_ends_its_connection_and_nothing_else(
    path: Path, receiver: StepReceiver, heard: Heard, message: bytes
) -> None:
    connection = raw(path)
    connection.send(message)
    assert await hung_up(connection)
    connection.close()
    send(StepReporter(path, "chat", ("host",)), 1)
    await until(lambda: bool(heard.steps))
    assert [step.started for _, step in heard.steps] == [1]


async def test_the_socket_is_private_and_removed_at_the_end(path: Path, heard: Heard) -> None:
    receiver = heard.receiver(path)
    await receiver.start()
    assert mode(path.parent) == 0o700
    assert mode(path) == 0o600
    await receiver.close()
    assert mode(path) is None


async def test_a_directory_open_to_others_is_refused(path: Path, heard: Heard) -> None:
    path.parent.mkdir(mode=0o755)
    path.parent.chmod(0o755)
    with pytest.raises(OSError, match="mode 0700"):
        await heard.receiver(path).start()


async def test_a_stale_socket_is_replaced(path: Path, heard: Heard) -> None:
    path.parent.mkdir(mode=0o700)
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(path))
    stale.close()
    receiver = heard.receiver(path)
    await receiver.start()
    send(StepReporter(path, "chat", ("host",)), 1)
    await until(lambda: bool(heard.steps))
    await receiver.close()


def test_without_a_supervisor_reports_go_nowhere() -> None:
    reporter = StepReporter.from_environment(environment={})
    reporter.report(1, 2, [ID], [1], [1])
    reporter.state(loading=True)
    reporter.close()
    assert not reporter.active
    assert reporter.lost == 0


async def test_the_environment_names_socket_backend_and_devices(
    path: Path, receiver: StepReceiver, heard: Heard
) -> None:
    reporter = StepReporter.from_environment(
        environment={
            "JOULEGATE_STEPS_SOCKET": str(path),
            "JOULEGATE_BACKEND": "chat",
            "JOULEGATE_DEVICES": "gpu:0,gpu:1",
        }
    )
    send(reporter, 1)
    await until(lambda: bool(heard.steps))
    assert heard.steps[0][1].devices == ("gpu:0", "gpu:1")


@pytest.mark.parametrize(
    ("engine_id", "ours"),
    [
        (ID, ID),
        (f"chatcmpl-{ID}-1f2e3d4c", ID),
        (f"1_chatcmpl-{ID}-1f2e3d4c", ID),
        (f"cmpl-{ID}.2-0-1f2e3d4c", f"{ID}.2"),
        (f"classify-{ID}-31-1f2e3d4c", ID),
        ("chatcmpl-abc-1f2e3d4c", ""),
        (f"chatcmpl-{ID}ff", ""),
        ("", ""),
    ],
)
def test_our_id_is_found_inside_the_engines(engine_id: str, ours: str) -> None:
    assert attempt_id(engine_id) == ours
