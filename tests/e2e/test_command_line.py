"""The command as a user runs it: real processes, exit codes, one clear line when something is wrong."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.harness import until

COMMAND = [sys.executable, "-m", "proxy"]
ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}


def joulegate(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.strip()


class Serving:
    """`joulegate serve` as a process; `output` grows as it writes."""

    def __init__(self, cwd: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "serve", "--port", "0", *arguments],
            cwd=cwd,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def address(self) -> str:
        def found() -> str | None:
            assert self.process.poll() is None, self.output
            listens = re.search(r"listens on (http://\S+)", self.output)
            return listens.group(1) if listens else None

        address: str = until(found, 60)
        return address

    def stop(self, how: signal.Signals) -> int:
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(30)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def starters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, httpx.Client]]:
    serving = Serving(tmp_path_factory.mktemp("starters"))
    try:
        with httpx.Client(base_url=serving.address(), timeout=120) as client:
            until(lambda: client.get("/ready").status_code == 200, 150)
            yield serving, client
    finally:
        serving.stop(signal.SIGKILL)


CHAT = {"model": "smollm2", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 12}


def test_the_starter_models_answer_all_three_kinds(starters: tuple[Serving, httpx.Client]) -> None:
    _, client = starters
    chat = client.post("/v1/chat/completions", json=CHAT)
    assert chat.json()["choices"][0]["message"]["content"].strip()
    verdict = client.post("/classify", json={"model": "sentiment", "input": "A warm, clever film that I loved."})
    assert verdict.json()["data"][0]["label"] == "POSITIVE"
    picture = client.post("/v1/images/generations", json={"model": "painter", "prompt": "a red apple", "size": "64x64"})
    png = base64.b64decode(picture.json()["data"][0]["b64_json"])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(png[16:20]), int.from_bytes(png[20:24])) == (64, 64)
    for answer in (chat, verdict, picture):
        assert answer.status_code == 200
        assert float(answer.headers["X-Energy-Joules"]) > 0
        receipt = client.get(f"/v1/energy/receipts/{answer.headers['X-Request-Id']}?wait=settled").json()
        assert receipt["outcome"] == "completed"
        assert receipt["energy_joules"] > 0


def test_where_nothing_measures_the_figures_are_called_estimated(starters: tuple[Serving, httpx.Client]) -> None:
    _, client = starters
    meters = {row["device"]: row for row in client.get("/v1/energy/devices").json()["data"]}
    answer = client.post("/v1/chat/completions", json=CHAT)
    if all(row["estimated"] for row in meters.values()):
        assert answer.headers["X-Energy-Method"] == "estimated"
        assert answer.headers["X-Energy-Meter"] == "codecarbon"
    else:
        assert answer.headers["X-Energy-Method"] == "measured-tokens"


def test_the_first_minute_shows_models_meter_and_commands_that_work(starters: tuple[Serving, httpx.Client]) -> None:
    serving, _ = starters
    until(lambda: "Ctrl-C" in serving.output)
    assert "meter: host" in serving.output
    commands = [line.strip() for line in serving.output.splitlines() if line.strip().startswith("curl -i ")]
    assert len(commands) == 3
    for command in commands:
        shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True).stdout
        assert shown.startswith("HTTP/1.1 200")
        assert "x-energy-joules: " in shown.lower()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_however_it_ends_no_backend_is_left(tmp_path: Path, how: signal.Signals) -> None:
    config = tmp_path / "one.yaml"
    config.write_text("models: [{name: smollm2, backend: {kind: llamacpp, model: 'starter:smollm2'}}]\n")
    serving = Serving(tmp_path, "--config", str(config))
    address = serving.address()
    until(lambda: httpx.get(f"{address}/ready").status_code == 200, 60)
    children = psutil.Process(serving.process.pid).children(recursive=True)
    assert children
    code = serving.stop(how)
    assert code == (-how if how is signal.SIGKILL else 0), serving.output
    assert "Traceback" not in serving.output
    until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


def test_a_port_in_use_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = joulegate("serve", "--port", str(taken.getsockname()[1]), cwd=tmp_path)
    assert done.returncode == 1
    assert "in use" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("server: {prot: 1}", "server.prot: there is no such field"),
        ("energy: {carbon: {source: codecarbon, country: ATLANTIS}}", "energy.carbon"),
        ("store: {url: 'mongodb://x'}", "store"),
        ("models: [", "not YAML"),
    ],
)
@pytest.mark.parametrize("command", [["check-config"], ["serve", "--config"]])
def test_a_bad_configuration_is_one_line_and_exit_2(tmp_path: Path, command: list[str], text: str, said: str) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    done = joulegate(*command, str(config), cwd=tmp_path)
    assert done.returncode == 2
    assert said in one_line(done.stderr)
    assert done.stdout == ""


def test_what_cannot_be_started_is_one_line_and_exit_1(tmp_path: Path) -> None:
    config = tmp_path / "replayed.yaml"
    config.write_text("energy: {meters: {replay: nowhere.jsonl}}\nmodels: []\n")
    done = joulegate("serve", "--port", "0", "--log-level", "error", "--config", str(config), cwd=tmp_path)
    assert done.returncode == 1
    assert "nowhere.jsonl: cannot be read" in one_line(done.stderr)


def test_a_host_that_is_no_name_is_one_line_and_exit_1(tmp_path: Path) -> None:
    done = joulegate("serve", "--port", "0", "--host", "a..b", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot listen on a..b" in one_line(done.stderr)


def test_why_a_model_is_not_available_is_shown_whole(tmp_path: Path) -> None:
    config = tmp_path / "one.yaml"
    config.write_text("models: [{name: big, backend: {kind: transformers, model: './a[b]'}}]\n")
    serving = Serving(tmp_path, "--config", str(config))
    try:
        until(lambda: "Ctrl-C" in serving.output)
        shown = next(line for line in serving.output.splitlines() if "not available" in line)
    finally:
        serving.stop(signal.SIGTERM)
    assert "there is no folder a[b]" in shown


def test_a_good_configuration_is_ok(tmp_path: Path) -> None:
    config = tmp_path / "good.yaml"
    config.write_text("energy: {carbon: {source: codecarbon, country: FRA}}\n")
    done = joulegate("check-config", str(config), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [["serve", "--port", "many"], ["serve", "--host", ""], ["dance"], ["replay"], ["serve", "--log-level", "loud"]],
)
def test_wrong_usage_is_one_line_and_exit_2(tmp_path: Path, arguments: list[str]) -> None:
    done = joulegate(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    one_line(done.stderr)


def test_doctor_says_what_there_is_and_why_not_the_rest(tmp_path: Path) -> None:
    done = joulegate("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("nvml", "rapl", "llamacpp", "transformers", "diffusers", "vllm"):
        assert word in done.stdout


def test_a_malformed_trace_is_named_by_line_and_exit_2(tmp_path: Path) -> None:
    trace = tmp_path / "run.jsonl"
    trace.write_text('{"type":"device","device":"gpu:0","name":"H100","meter":"nvml-counter"}\n{"type":"dance"}\n')
    done = joulegate("replay", str(trace), cwd=tmp_path)
    assert done.returncode == 2
    assert one_line(done.stderr).startswith(f"{trace}:2: ")


def test_what_was_recorded_replays_to_the_same_figures(tmp_path: Path) -> None:
    config = tmp_path / "one.yaml"
    config.write_text("models: [{name: smollm2, backend: {kind: llamacpp, model: 'starter:smollm2'}}]\n")
    serving = Serving(tmp_path, "--config", str(config), "--record", "run.jsonl")
    try:
        with httpx.Client(base_url=serving.address(), timeout=60) as client:
            until(lambda: client.get("/ready").status_code == 200, 60)
            answer = client.post("/v1/chat/completions", json=CHAT)
            path = f"/v1/energy/receipts/{answer.headers['X-Request-Id']}?wait=settled"
            receipt = until(lambda: (found := client.get(path).json())["status"] == "settled" and found)
            time.sleep(0.2)
    finally:
        serving.stop(signal.SIGTERM)
    done = joulegate("replay", "run.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    (again,) = [row for row in rows if row.get("request") == receipt["id"]]
    assert again["energy_joules"] == pytest.approx(receipt["energy_joules"], abs=1e-6)
    assert again["low_joules"] == pytest.approx(receipt["low_joules"], abs=1e-6)
    assert all(row["residual_joules"] == 0 for row in rows if "device" in row)
