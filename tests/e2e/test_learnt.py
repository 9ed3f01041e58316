"""What was learnt of the backends' costs outlives the proxy, and a known model on a known GPU begins with a prior."""

import json
import struct
from pathlib import Path
from typing import Any

from backends.spec import BackendSpec
from proxy.energy.events import Device
from proxy.learnt import Learnt
from tests.e2e.harness import MODELS, running, until

H100 = Device("gpu:0", "NVIDIA H100 80GB HBM3", "nvml-counter")


def recorded_models(trace: Path) -> list[dict[str, Any]]:
    return [row for line in trace.read_text().splitlines() if (row := json.loads(line))["type"] == "model"]


def test_coefficients_are_kept_across_restarts(tmp_path: Path) -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "hi [[tokens=80 token_ms=5]]"}]}
    with running(tmp_path, models=MODELS[:1], record=tmp_path / "first.jsonl") as proxy:
        for _ in range(3):
            proxy.post("/v1/chat/completions", body)
        until(proxy.settled)
    assert recorded_models(tmp_path / "first.jsonl") == []
    kept = json.loads((tmp_path / "receipts.db.learnt.json").read_text())
    (gpu,) = [row["coefficients"] for row in kept if row["of"][0] == "chat" and row["of"][2] == "gpu:0"]
    with running(tmp_path, models=MODELS[:1], record=tmp_path / "second.jsonl"):
        pass
    recalled = {row["device"]: row["coefficients"] for row in recorded_models(tmp_path / "second.jsonl")}
    assert recalled["gpu:0"] == gpu


def test_what_takes_over_from_a_backend_goes_on_with_what_that_had_learnt(tmp_path: Path) -> None:
    backend = {"kind": "vllm", "model": "fake", "devices": [0], "args": {"prompt-ms": 0.02}}
    other = {"name": "chat", "backend": backend}
    body = {"model": "chat", "messages": [{"role": "user", "content": "hi [[tokens=80 token_ms=5]]"}]}
    with running(tmp_path, models=MODELS[:1], record=tmp_path / "run.jsonl", after_reload=[other]) as proxy:
        for _ in range(3):
            proxy.post("/v1/chat/completions", body)
        proxy.on_loop(proxy.node.reload)
        until(lambda: proxy.node.registry.models["chat"].backends == ("chat@2",))
        receipt = proxy.receipt(proxy.post("/v1/chat/completions", body).headers["X-Request-Id"])
        assert (receipt["method"], receipt["meter"]) == ("measured-steps", "nvml-counter+rapl")
        until(lambda: "chat" not in proxy.node.registry.specs)
    (recalled,) = [row for row in recorded_models(tmp_path / "run.jsonl") if row["device"] == "gpu:0"]
    assert recalled["backend"] == "chat@2"
    assert recalled["coefficients"]["windows"] > 0
    kept = json.loads((tmp_path / "receipts.db.learnt.json").read_text())
    (gpu,) = [row["coefficients"] for row in kept if row["of"][0] == "chat" and row["of"][2] == "gpu:0"]
    assert gpu["windows"] > 0
    assert gpu != recalled["coefficients"]


def test_a_file_that_is_none_of_ours_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.learnt.json"
    path.write_text('{"of": 1}')
    assert Learnt(path, {"chat": BackendSpec("chat", "remote", url="http://x", devices=(0,))}).recall(H100) == []


def test_a_models_own_config_gives_a_prior_on_a_known_gpu(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = json.dumps({"w": {"dtype": "BF16", "shape": [1000, 64], "data_offsets": [0, 128_000]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    spec = BackendSpec("chat", "vllm", model=str(tmp_path), devices=(0,))
    (prior,) = Learnt(None, {"chat": spec}).recall(H100)
    assert (prior.backend, prior.device) == ("chat", "gpu:0")
    assert all(value >= 0 for value in prior.coefficients.values())
    assert Learnt(None, {"chat": spec}).recall(Device("gpu:0", "Strange Chip", "nvml-counter")) == []
    assert Learnt(None, {"chat": spec}).recall(Device("gpu:1", H100.name, "nvml-counter")) == []
