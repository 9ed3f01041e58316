"""SIGHUP: the configuration is read again, and nobody who is being served notices. The real command, real processes."""

import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.e2e.harness import energy_comment, events, until
from tests.e2e.stand_in import backend, interpreter
from tests.e2e.test_command_line import COMMAND, ENVIRONMENT, Serving, joulegate

IN_FORCE = "read again and is in force"


def chat(prompt: str = "hi", model: str = "chat", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **more}


class Node:
    """A proxy whose configuration can be written anew."""

    def __init__(self, folder: Path, **first: Any) -> None:
        self.folder = folder
        self.file = folder / "joulegate.yaml"
        self.python = interpreter(folder)
        self.write(**first or {"models": [self.model("chat")]})
        self.serving = Serving(folder, "--config", str(self.file), "--record", "run.jsonl")
        self.clients = ThreadPoolExecutor(8)
        self.client = httpx.Client(base_url=self.serving.address(), timeout=30)
        until(lambda: self.client.get("/ready").status_code == 200)

    def model(self, name: str, *, replicas: int = 0, more: dict[str, Any] | None = None, **args: Any) -> dict[str, Any]:
        one = backend(self.python, **args)
        return {"name": name, **({"replicas": [one] * replicas} if replicas else {"backend": one}), **(more or {})}

    def write(self, **document: Any) -> None:
        self.file.write_text(yaml.safe_dump(document))

    def hang_up(self) -> None:
        self.serving.process.send_signal(signal.SIGHUP)

    def reload(self, **document: Any) -> None:
        """Have this taken on, and wait until it is."""
        self.write(**document)
        done = self.serving.output.count(IN_FORCE)
        self.hang_up()
        until(lambda: self.serving.output.count(IN_FORCE) > done)

    def until_said(self, text: str) -> str:
        return str(until(lambda: next((line for line in self.serving.output.splitlines() if text in line), None)))

    def ask(self, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json=body, headers=headers)

    def begin(self, body: dict[str, Any]) -> "Future[httpx.Response]":
        """Ask for something long, and wait until a backend is at work on it."""
        before = self.in_flight(body["model"])
        asked = self.clients.submit(self.ask, body)
        until(lambda: asked.done() or self.in_flight(body["model"]) > before)
        return asked

    def in_flight(self, model: str) -> float:
        return self.metrics().get(f'joulegate_requests_in_flight{{model="{model}"}}', 0.0)

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def pids(self) -> dict[int, str]:
        """The backends' processes, with the model each of them serves."""
        found = {}
        for child in psutil.Process(self.serving.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                model = re.search(r"fake_engine\.py --model=(\S+)", " ".join(child.cmdline()))
                if model and child.status() != psutil.STATUS_ZOMBIE:
                    found[child.pid] = model[1]
        return found

    def pid(self, model: str) -> int:
        (pid,) = [pid for pid, served in self.pids().items() if served == model]
        return pid

    def end(self) -> None:
        """Stop it, and see that the books are right and nothing is left. Once."""
        if self.client.is_closed:
            return
        balanced = {value for name, value in self.metrics().items() if "conservation_residual" in name}
        left = [psutil.Process(pid) for pid in self.pids()]
        self.client.close()
        self.clients.shutdown()
        assert self.serving.stop(signal.SIGTERM) == 0, self.serving.output
        assert balanced == {0.0}
        assert "Traceback" not in self.serving.output.replace(_EXPECTED_TRACEBACK, "")
        until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in left))

    def replayed(self) -> list[dict[str, Any]]:
        done = joulegate("replay", "run.jsonl", cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


#: Of a stand-in engine that was told to fail.
_EXPECTED_TRACEBACK = "@2: Traceback"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    running = Node(tmp_path)
    try:
        yield running
        running.end()
    finally:
        running.serving.stop(signal.SIGKILL)


def test_models_come_go_and_change_and_those_that_do_not_are_not_touched(node: Node) -> None:
    node.reload(models=[node.model("chat"), node.model("other"), node.model("stays")])
    before = {model: pid for pid, model in node.pids().items()}
    slow = {m: node.begin(chat("hi [[tokens=150 token_ms=20]]", m, stream=True)) for m in ("chat", "other")}
    node.reload(models=[node.model("stays"), node.model("chat", token_ms=2), node.model("new")])

    assert [row["id"] for row in node.client.get("/v1/models").json()["data"]] == ["stays", "chat", "new"]
    assert all(row["ready"] for row in node.client.get("/v1/models").json()["data"])
    assert node.client.get("/ready").status_code == 200
    gone = node.ask(chat(model="other"))
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")
    assert [node.ask(chat(model=model)).status_code for model in ("stays", "chat", "new")] == [200] * 3
    assert all(psutil.pid_exists(before[model]) or answer.done() for model, answer in slow.items())

    for answer in slow.values():
        assert events(answer.result(30).text)[-1] == "[DONE]"
        assert energy_comment(answer.result().text)["outcome"] == "completed"
    until(lambda: sorted(node.pids().values()) == ["chat", "new", "stays"])
    assert node.pid("stays") == before["stays"]
    assert node.pid("chat") != before["chat"]


def test_under_load_three_reloads_fail_no_request(node: Node) -> None:
    ended = threading.Event()
    answers: list[httpx.Response] = []

    def load(stream: bool) -> None:
        with httpx.Client(base_url=node.client.base_url, timeout=30) as client:
            while not ended.is_set():
                body = chat("hi [[tokens=12 token_ms=5]]", stream=stream)
                answers.append(client.post("/v1/chat/completions", json=body))

    loads = [node.clients.submit(load, stream) for stream in (True, False, True, False)]
    try:
        for replicas, token_ms in ((2, 1), (2, 2), (1, 3)):
            so_far = len(answers)
            node.reload(models=[node.model("chat", replicas=replicas, token_ms=token_ms)])
            until(partial(has_grown, answers, so_far + 10))
    finally:
        ended.set()
    for each in loads:
        each.result(30)

    assert len(answers) > 40
    assert {answer.status_code for answer in answers} == {200}
    streams = [answer for answer in answers if answer.headers["content-type"].startswith("text/event-stream")]
    assert {events(answer.text)[-1] for answer in streams} == {"[DONE]"}
    ids = {answer.headers["X-Request-Id"] for answer in answers}
    assert len(ids) == len(answers)
    until(lambda: len(node.pids()) == 1)
    until(lambda: all(settled(node, id) for id in ids))
    node.end()

    rows = node.replayed()
    assert {row["request"] for row in rows if "request" in row} >= ids
    assert {row["residual_joules"] for row in rows if "device" in row} == {0}


def has_grown(answers: list[httpx.Response], beyond: int) -> bool:
    return len(answers) > beyond


def settled(node: Node, id: str) -> bool:
    receipt = node.client.get(f"/v1/energy/receipts/{id}").json()
    return bool(receipt["status"] == "settled" and receipt["outcome"] == "completed")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server: {prot: 1}", "server.prot: there is no such field"),
        ("models: [{name: chat, backend: {kind: vllm}}]", "models[0].backend: kind: vllm needs model"),
        ("models: [", "not YAML"),
        ("energy: {carbon: {source: codecarbon, country: ATLANTIS}}", "energy.carbon"),
    ],
)
def test_a_file_that_cannot_be_used_changes_nothing(node: Node, text: str, said: str) -> None:
    pid = node.pid("chat")
    node.file.write_text(text)
    node.hang_up()
    line = node.until_said("is not taken on")
    assert said in line
    assert node.ask(chat()).status_code == 200
    node.reload(models=[node.model("chat")])
    assert node.pid("chat") == pid


def test_what_cannot_take_over_leaves_the_old_one_serving_and_says_why(node: Node) -> None:
    pid = node.pid("chat")
    node.reload(models=[node.model("chat", fail="no memory for both")])
    assert "no memory for both; it goes on with the old ones" in node.until_said("does not work with its new settings")
    assert node.pid("chat") == pid
    assert node.ask(chat()).status_code == 200
    assert node.client.get("/ready").status_code == 200
    node.reload(models=[node.model("chat", token_ms=2)])
    until(lambda: len(node.pids()) == 1)
    assert node.pid("chat") != pid


def test_while_the_new_one_loads_the_old_one_serves(node: Node) -> None:
    node.write(models=[node.model("chat", start_seconds=3), node.model("new", start_seconds=3)])
    node.hang_up()
    until(lambda: len(node.pids()) == 3)
    assert node.ask(chat()).status_code == 200
    starting = node.ask(chat(model="new"))
    assert (starting.status_code, starting.json()["error"]["code"]) == (503, "backend_starting")
    ready = node.client.get("/ready")
    assert (ready.status_code, list(ready.json()["coming"])) == (200, ["new"])
    assert {row["id"]: row["ready"] for row in node.client.get("/v1/models").json()["data"]} == {
        "chat": True,
        "new": False,
    }
    node.until_said(IN_FORCE)
    assert node.ask(chat(model="new")).status_code == 200
    assert node.client.get("/ready").json()["coming"] == {}


def test_a_second_hangup_waits_and_the_newest_file_wins(node: Node) -> None:
    node.write(models=[node.model("chat"), node.model("slow", start_seconds=2)])
    node.hang_up()
    until(lambda: "slow" in node.pids().values())
    node.write(models=[node.model("chat"), node.model("never")])
    node.hang_up()
    node.write(models=[node.model("chat"), node.model("last")])
    node.hang_up()
    until(lambda: node.serving.output.count(IN_FORCE) == 2)
    until(lambda: sorted(node.pids().values()) == ["chat", "last"])
    assert "never" not in node.serving.output


def test_those_who_wait_for_their_turn_are_served_though_their_model_goes(node: Node) -> None:
    node.reload(models=[node.model("chat", more={"max_in_flight": 1, "max_queue": 9})])
    asked = [node.begin(chat("hi [[tokens=20 token_ms=20]]")) for _ in range(3)]
    node.reload(models=[node.model("other")])
    assert node.ask(chat()).status_code == 404
    assert [answer.result(30).status_code for answer in asked] == [200] * 3
    until(lambda: [*node.pids().values()] == ["other"])


def test_a_drain_ends_in_time_and_what_is_broken_off_is_told_and_booked(node: Node) -> None:
    node.reload(models=[node.model("chat"), node.model("other")], server={"drain_seconds": 0.3})
    slow = node.begin(chat("hi [[tokens=2000 token_ms=10]]", stream=True))
    node.reload(models=[node.model("other")], server={"drain_seconds": 0.3})
    told = events(slow.result(30).text)
    assert told[-2]["error"]["type"] == "upstream_error"
    assert energy_comment(slow.result().text)["outcome"] == "failed"
    node.until_said("1 requests did not finish within 0.3 s and are broken off")
    until(lambda: [*node.pids().values()] == ["other"])


def test_limits_aliases_and_time_outs_change_without_a_restart(node: Node) -> None:
    pid = node.pid("chat")
    limits = {"max_in_flight": 1, "max_queue": 0, "aliases": ["gpt"]}
    server = {"timeouts": {"first_byte": 0.2}, "max_body_bytes": 2048}
    node.reload(models=[node.model("chat", more=limits)], server=server)
    assert node.pid("chat") == pid
    assert node.ask(chat(model="gpt")).status_code == 200
    assert node.ask(chat("x" * 4096)).status_code == 413
    assert node.ask(chat("hi [[head_ms=5000]]")).status_code == 504
    slow = node.begin(chat("hi [[tokens=150 token_ms=20]]", stream=True))
    assert node.ask(chat()).status_code == 429
    assert slow.result(30).status_code == 200
    node.reload(models=[node.model("chat")])
    assert node.ask(chat(model="gpt")).status_code == 404
    assert node.ask(chat("hi [[head_ms=400]]" + "x" * 4096)).status_code == 200
    assert node.pid("chat") == pid


def test_keys_hosts_and_origins_change_without_a_restart(node: Node) -> None:
    models = [node.model("chat")]
    keys = [{"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in ("ann", "ben")]
    page = {"Origin": "https://page.example"}
    assert node.ask(chat()).status_code == 200
    assert node.ask(chat(), **page).status_code == 403
    server = {"allowed_hosts": ["node.example"], "cors_origins": ["https://page.example"]}
    slow = node.begin(chat("hi [[tokens=60 token_ms=20]]", stream=True))
    node.reload(models=models, auth={"required": True, "keys": keys[:1]}, server=server)
    assert node.ask(chat()).status_code == 401
    assert node.ask(chat(), Authorization="Bearer ben").status_code == 401
    answer = node.ask(chat(), Authorization="Bearer ann", **page, Host="node.example")
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == "https://page.example"
    assert events(slow.result(30).text)[-1] == "[DONE]"
    node.reload(models=models, auth={"required": True, "keys": keys[1:]})
    assert node.ask(chat(), Authorization="Bearer ann").status_code == 401
    assert node.ask(chat(), Authorization="Bearer ben", Host="node.example").status_code == 403
    assert node.ask(chat(), Authorization="Bearer ben").status_code == 200


def test_carbon_boundary_and_pue_hold_for_requests_that_begin_after(node: Node) -> None:
    def energy(grams: float, boundary: str) -> dict[str, Any]:
        return {"boundary": boundary, "pue": 2.0, "carbon": {"source": "static", "grams_per_kwh": grams}}

    models = [node.model("chat")]
    node.reload(models=models, energy=energy(100, "node"))
    slow = node.begin(chat("hi [[tokens=40 token_ms=20]]"))
    node.reload(models=models, energy=energy(200, "facility"))
    new = node.ask(chat()).json()["energy"]
    assert (new["boundary"], new["carbon"]["intensity_grams_per_kwh"]) == ("facility", 200)
    assert new["parts"]["overhead"] == pytest.approx(new["energy_joules"] / 2, rel=0.01)
    old = slow.result(30).json()["energy"]
    assert (old["boundary"], old["carbon"]["intensity_grams_per_kwh"]) == ("node", 100)
    assert old["parts"]["overhead"] == 0
    receipt = node.client.get(f"/v1/energy/receipts/{old['id']}?wait=settled").json()
    assert (receipt["boundary"], receipt["status"]) == ("node", "settled")


def test_what_needs_a_restart_is_named(node: Node) -> None:
    node.reload(models=[node.model("chat")], store={"url": "sqlite:///other.db"}, energy={"sample_hz": 3})
    for field in ("store.url", "energy.sample_hz"):
        assert "needs a restart" in node.until_said(field)
    assert node.ask(chat()).status_code == 200
    assert not (node.folder / "other.db").exists()


def test_metrics_have_labels_for_new_models_and_no_series_of_backends_that_left(node: Node) -> None:
    for token_ms in (2, 3):
        node.reload(models=[node.model("chat", token_ms=token_ms), node.model("new")])
        assert node.ask(chat(model="new")).status_code == 200
        assert node.ask(chat()).status_code == 200
    until(lambda: len(node.pids()) == 2)
    until(lambda: {match for name in node.metrics() for match in re.findall(r'backend="([^"]*)"', name)}
          <= {"chat@3", "new", "proxy"})  # fmt: skip
    metrics = node.metrics()
    assert metrics['joulegate_requests_total{code="200",endpoint="/v1/chat/completions",model="new"}'] == 2
    assert metrics['joulegate_backend_up{backend="chat@3",model="chat"}'] == 1
    assert metrics['joulegate_step_reports_total{backend="chat@3"}'] > 0
    assert metrics['joulegate_step_reports_lost_total{backend="chat@3"}'] == 0


def test_without_a_file_there_is_nothing_to_reload(tmp_path: Path) -> None:
    serving = Serving(tmp_path)
    try:
        until(lambda: heeds_hangups(serving.process.pid))
        serving.process.send_signal(signal.SIGHUP)  # long before it serves
        address = serving.address()
        until(lambda: serving.output.count("nothing to reload") == 1)
        serving.process.send_signal(signal.SIGHUP)
        until(lambda: serving.output.count("nothing to reload") == 2)
        assert httpx.get(f"{address}/health").status_code == 200
    finally:
        assert serving.stop(signal.SIGTERM) == 0


def heeds_hangups(pid: int) -> bool:
    """Whether a process has said what SIGHUP is to do: to wait, or something of its own."""
    masks = re.findall(r"^Sig(?:Blk|Cgt):\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGHUP - 1) & 1 for mask in masks)


def test_a_terminal_that_closes_ends_what_was_started_from_it(tmp_path: Path) -> None:
    config = tmp_path / "none.yaml"
    config.write_text("models: []\nenergy: {meters: {nvml: false, rapl: false, estimate: false}}\n")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have them ignore it
        os.chdir(tmp_path)
        os.execve(sys.executable, [*COMMAND, "serve", "--port", "0", "--config", str(config)], ENVIRONMENT)
    try:
        read_until(terminal, b"listens on")
        os.kill(pid, signal.SIGHUP)  # the terminal is there: a reload
        read_until(terminal, b"in force")
        os.close(terminal)
        found, status = until(lambda: (ended := os.waitpid(pid, os.WNOHANG))[0] and ended)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    assert (found, os.waitstatus_to_exitcode(status)) == (pid, 0)


def read_until(terminal: int, text: bytes) -> None:
    shown = b""
    while text not in shown:
        shown += os.read(terminal, 4096)  # raises OSError when the process has ended


def test_no_process_of_ours_is_left_by_a_stop_in_the_middle_of_a_reload(node: Node) -> None:
    node.write(models=[node.model("chat", token_ms=2, start_seconds=30), node.model("new", start_seconds=30)])
    node.hang_up()
    until(lambda: len(node.pids()) == 3)


def test_a_name_that_becomes_another_models_alias_is_that_model_at_once(node: Node) -> None:
    node.reload(models=[node.model("other", more={"aliases": ["chat"]})])
    assert node.ask(chat()).json()["energy"]["model"] == "other"
    node.reload(models=[node.model("chat", more={"aliases": ["other"]})])
    assert node.ask(chat(model="other")).json()["energy"]["model"] == "chat"
    until(lambda: [*node.pids().values()] == ["chat"])


def test_reports_of_a_server_that_somebody_else_runs_are_told_apart_from_reload_to_reload(tmp_path: Path) -> None:
    """It knows itself by its place in the file, whatever its id has become."""
    socket = tmp_path / "steps" / "steps.sock"
    environment = {**ENVIRONMENT, "JOULEGATE_STEPS_SOCKET": str(socket), "JOULEGATE_BACKEND": "chat"}
    script = str(Path(__file__).parents[1] / "backends" / "fake_engine.py")
    port = free_port()
    engine = subprocess.Popen([sys.executable, script, f"--port={port}"], env=environment)

    def models(**more: Any) -> list[dict[str, Any]]:
        remote = {"kind": "remote", "url": f"http://127.0.0.1:{port}", "devices": [0], "steps": str(socket)}
        return [{"name": "chat", "backend": {**remote, **more}}]

    try:
        running = Node(tmp_path, models=models())
        try:
            running.ask(chat())
            until(lambda: running.metrics().get('joulegate_step_reports_total{backend="chat"}'))
            running.reload(models=models(startup_seconds=5))
            running.ask(chat())
            until(lambda: running.metrics().get('joulegate_step_reports_total{backend="chat@2"}'))
            assert "malformed" not in running.serving.output
            running.end()
        finally:
            running.serving.stop(signal.SIGKILL)
    finally:
        engine.kill()
        engine.wait()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
