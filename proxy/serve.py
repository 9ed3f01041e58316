"""`joulegate serve`: the socket, the server, and what an operator sees in the first minute."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop
from rich.console import Console
from rich.markup import escape

from proxy.api.protocol import Protocol
from proxy.app import Node
from proxy.config import Config
from proxy.errors import JoulegateError
from proxy.recorder import Recorder
from proxy.routing.intake import Intake
from proxy.routing.registry import ServedModel

log = logging.getLogger("joulegate")

#: Of uvicorn's.
_TICKS_PER_SECOND = 10
#: After the drain, for answers that are no model's.
_GRACE_SECONDS = 2

#: One request to try for each kind of model: path, JSON body.
_TRY = {
    "chat": (
        "/v1/chat/completions",
        '{"model": "%s", "messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 60}',
    ),
    "classification": ("/classify", '{"model": "%s", "input": "A warm, clever film that I loved."}'),
    "image": ("/v1/images/generations", '{"model": "%s", "prompt": "a red apple", "size": "256x256"}'),
}


class CannotListen(JoulegateError):
    """The address is not to be had; the message says why."""


class CannotStart(JoulegateError):
    """A part of the node could not be started; the message says which and why."""


#: What lives as long as the proxy is left out of collections, and those of what requests leave behind are rarer: by
#: far the most of it is freed by counting references alone.
_COLLECTED_AFTER = 20_000

#: Seconds after which a thread must let another run, if that waits: the one that writes receipts holds the interpreter
#: for long stretches otherwise, and every request meanwhile waits for it.
_SWITCH_SECONDS = 0.0005


def run(config: Config, record: Path | None, reread: Callable[[], Config] | None = None) -> None:
    """Serve until told to stop; raises CannotListen or CannotStart. On SIGHUP `reread` gives a configuration anew."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    # uvicorn ends in good order on SIGTERM and then raises it again, for whoever would want to die of it.
    signal.signal(signal.SIGTERM, lambda *_: None)
    with (
        contextlib.suppress(KeyboardInterrupt),
        _listen(config.server.host, config.server.port) as listening,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_serve(Node(config, reread=reread, recorder=Recorder(record) if record else None), listening))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
        listening.close()
        what = getattr(error, "strerror", None) or error
        reason = f"cannot listen on {host} port {port}: {what}; --host and --port choose others"
        raise CannotListen(reason) from error
    return listening


class DrainingServer(uvicorn.Server):
    """Told to stop, it first lets the requests under way finish; told again, it does not wait for them.

    Meanwhile it still listens, so that `/ready` and new requests are told that it is draining.
    """

    def __init__(self, intake: Intake, seconds: Callable[[], float], config: uvicorn.Config) -> None:
        super().__init__(config)
        self._intake = intake
        self._seconds = seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_PER_SECOND == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.close_if_idle(now)
        return await super().on_tick(counter)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._intake.draining or not self.started or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._intake.draining = True
        self._loop.call_soon_threadsafe(self._begin_to_drain, sig)

    def _begin_to_drain(self, sig: int) -> None:
        self._drain = asyncio.ensure_future(self._drained(sig))

    async def _drained(self, sig: int) -> None:
        seconds = self._seconds()
        if self._intake.under_way:
            log.info("draining: %d requests under way, %g s at most", self._intake.under_way, seconds)
        left = await self._intake.drain(seconds)
        if left:
            log.warning("%d requests did not finish within %g s and are broken off", left, seconds)
        super().handle_exit(sig, None)


def http_server(node: Node) -> uvicorn.Server:
    """The server of a node, as yet without a socket."""
    return DrainingServer(
        node.intake,
        lambda: node.config.server.drain_seconds,
        uvicorn.Config(
            node.asgi,
            interface="asgi3",
            http=partial(Protocol, edge=node.edge),  # type: ignore[arg-type] # it is only ever called
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        ),
    )


async def _serve(node: Node, listening: socket.socket) -> None:
    server = http_server(node)
    _heed_hangups(node, server)
    host, port = listening.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    greeting = asyncio.create_task(_greet(node, address))
    # What failed on purpose is told in one line, by whoever catches it.
    logging.getLogger("uvicorn.error").addFilter(lambda _: node.failure is None)
    try:
        await server.serve(sockets=[listening])
    except SystemExit as stop:
        raise CannotStart(str(node.failure or "the proxy cannot start, its log says why")) from stop
    finally:
        greeting.cancel()


def _heed_hangups(node: Node, server: uvicorn.Server) -> None:
    """SIGHUP asks for a reload, unless it tells that the terminal we were started from is gone: that ends us.

    With nohup it does not.
    """
    ends = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN and _has_terminal()

    def hung_up() -> None:
        if ends and not _has_terminal():
            server.handle_exit(signal.SIGTERM, None)
        else:
            node.reload()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])  # held back since the command began


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


async def _greet(node: Node, address: str) -> None:
    """Say where it listens at once, and how to try it when the models are loaded."""
    console = Console(highlight=False, soft_wrap=True)
    await node.started.wait()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTED_AFTER, 20, 20)
    console.print(f"\n[bold]Joulegate[/] listens on [bold]{address}[/]   API documentation: {address}/docs")
    for line in _meter_lines(node):
        console.print(line)
    console.print(f"models: {', '.join(node.registry.models)} (loading)")
    await node.wait_until_settled()
    console.print("")
    for name, model in node.registry.models.items():
        why = node.registry.missing().get(name)
        state = f"[red]not available[/]: {escape(why)}" if why else "[green]ready[/]"
        console.print(f"  {name:<12} {', '.join(model.tasks):<16} {model.spec.kind:<13} {state}")
    console.print("\nTry it (-i shows the energy headers):\n")
    for line in _commands(node, address):
        console.print(line, markup=False)
    console.print("\nCtrl-C stops it.")


def _meter_lines(node: Node) -> list[str]:
    lines = [
        f"meter: {meter.device} by [bold]{meter.kind}[/] ({escape(meter.name)})"
        + (", [yellow]an estimate, not a measurement[/]" if meter.estimated else "")
        for meter in node.discovery.meters
    ]
    return lines or ["[yellow]no meter at all[/]: answers carry no energy figures; `joulegate doctor` says why"]


def _commands(node: Node, address: str) -> list[str]:
    return [
        f"  curl -i {address}{_TRY[task][0]} -H 'Content-Type: application/json' -d '{_TRY[task][1] % name}'\n"
        for name, model in _first_of_each(node).items()
        for task in model.tasks
        if task in _TRY
    ]


def _first_of_each(node: Node) -> dict[str, ServedModel]:
    """One model for each kind of task, those that can serve."""
    found: dict[str, ServedModel] = {}
    seen: set[str] = set()
    missing = node.registry.missing()
    for name, model in node.registry.models.items():
        if name not in missing and seen.isdisjoint(model.tasks):
            seen.update(model.tasks)
            found[name] = model
    return found
