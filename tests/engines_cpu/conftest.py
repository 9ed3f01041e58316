"""Engine servers as the supervisor starts them: real processes, real sockets, tiny random models."""

import asyncio
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from backends import diffusers, transformers
from backends.process import environment_of
from backends.spec import BackendKind, BackendSpec
from backends.steps import LoadingState, StepReceiver, StepReport

KINDS: dict[str, BackendKind] = {"transformers": transformers.KIND, "diffusers": diffusers.KIND}
PATIENCE = 120.0
ROOT = Path(__file__).parent.parent.parent


def new_id() -> str:
    """An attempt's id, as the proxy makes them."""
    return secrets.token_hex(16) + ".1"


class Recorder:
    """A step receiver on a thread of its own, and what it received."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.path = directory / "steps"
        self.steps: list[StepReport] = []
        self.states: list[LoadingState] = []
        self.lost = 0
        self._loop = asyncio.new_event_loop()
        self._receiver = StepReceiver(
            self.path,
            backends=names,
            on_steps=lambda _, steps: self.steps.extend(steps),
            on_loss=self._on_loss,
            on_state=lambda _, state: self.states.append(state),
        )
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._run(self._receiver.start())

    def _on_loss(self, _: str, lost: int) -> None:
        self.lost += lost

    def _run(self, what: Any) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(PATIENCE)

    def close(self) -> None:
        self._run(self._receiver.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def of(self, request: str) -> list[StepReport]:
        """The steps in which `request` worked."""
        return [step for step in list(self.steps) if request in step.requests]

    def wait_for(self, request: str, steps: int) -> list[StepReport]:
        """The steps of `request` once there are at least that many."""
        deadline = time.monotonic() + PATIENCE
        while len(found := self.of(request)) < steps:
            assert time.monotonic() < deadline, f"{len(found)} steps, not {steps}"
            time.sleep(0.01)
        return found


class Server:
    """An engine server process, with what it reports and logs."""

    def __init__(self, spec: BackendSpec, directory: Path) -> None:
        self.spec = spec
        self.recorder = Recorder(directory, [spec.name])
        self.log = directory / "log"
        port = _free_port()
        launch = KINDS[spec.kind].launch(spec, port, self.recorder.path)
        assert launch is not None
        environment = {**environment_of(spec, launch, self.recorder.path, ROOT), "OMP_NUM_THREADS": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(launch.command, env=environment, stdout=log, stderr=log)
        self.url = f"http://127.0.0.1:{port}"
        self.statuses: list[int] = []
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def wait_until_ready(self) -> list[int]:
        """The different statuses of `/health` on the way to 200."""
        deadline = time.monotonic() + PATIENCE
        seen: list[int] = []
        while 200 not in seen:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                status = self.http.get("/health").status_code
                seen += [status] if status not in seen else []
            except httpx.ConnectError:
                time.sleep(0.02)
        return seen

    def post(self, path: str, body: Any, request: str | None = None) -> httpx.Response:
        return self.http.post(path, json=body, headers={"X-Request-Id": request or new_id()})

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            self.recorder.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(spec: BackendSpec) -> Iterator[Server]:
    # Not pytest's directory, whose path may be longer than a Unix socket's may be.
    with tempfile.TemporaryDirectory() as directory:
        server = Server(spec, Path(directory))
        try:
            server.statuses = server.wait_until_ready()
            yield server
        finally:
            server.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of tiny models that `tiny_models.py` makes."""
    folder = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, str(Path(__file__).with_name("tiny_models.py")), str(folder)]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="session")
def classifier(tiny: Path) -> Iterator[Server]:
    with serving(BackendSpec("sentiment", "transformers", model=str(tiny / "classifier"))) as server:
        yield server


@pytest.fixture(scope="session")
def painter(tiny: Path) -> Iterator[Server]:
    args = {"max-queue": 2, "max-batch-images": 2, "steps": 8}
    with serving(BackendSpec("painter", "diffusers", model=str(tiny / "stable_diffusion"), args=args)) as server:
        yield server


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer in OpenAI's envelope, which has exactly four fields."""
    body = response.json()
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error
