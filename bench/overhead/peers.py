"""The proxies that are compared: how each is started, and how one knows that it is not here."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.overhead.ports import free_port
from bench.overhead.upstream import nginx_proxy_configuration

#: A virtual environment with the Python peers, so that none of them meets our own packages.
PEERS = Path(os.environ.get("JOULEGATE_PEERS", ".cache/peers"))
#: vLLM's production-stack is not on PyPI: its `src`, and beside it a virtual environment with what that needs.
PRODUCTION_STACK = Path(os.environ.get("JOULEGATE_PRODUCTION_STACK", ".cache/production-stack"))
PORTKEY = Path(os.environ.get("JOULEGATE_PORTKEY", ".cache/portkey"))
WATTS = 300


@dataclass(frozen=True)
class Peer:
    """`command(folder, port, upstream)` starts it; `missing()` says how to get it, or nothing if it is here.

    `headers(upstream)` are what every request to it must carry. `cannot_stream` says why, if it cannot.
    """

    name: str
    command: Callable[[Path, int, int], Sequence[str]]
    missing: Callable[[], str]
    environment: dict[str, str] = field(default_factory=dict)
    headers: Callable[[int], dict[str, str]] = lambda _: {}
    cannot_stream: str = ""


def joulegate(folder: Path, port: int, upstream: int) -> list[str]:
    """Our own, accounting on: a replayed GPU meter read at 20 Hz, ledger, receipts, store, metrics."""
    trace = folder / "meter.jsonl"
    device = {"type": "device", "device": "gpu:0", "name": "replayed", "meter": "nvml-counter"}
    samples = (
        {"type": "sample", "device": "gpu:0", "at": at / 10, "energy_joules": at * WATTS / 10} for at in range(36_000)
    )
    trace.write_text("\n".join(json.dumps(line) for line in (device, *samples)) + "\n")
    configuration = folder / "joulegate.yaml"
    backend = {"kind": "remote", "url": f"http://127.0.0.1:{upstream}", "devices": [0]}
    document = {
        "store": {"url": f"sqlite:///{folder}/receipts.db"},
        "energy": {"meters": {"nvml": False, "replay": str(trace)}},
        "models": [{"name": "chat", "backend": backend}],
    }
    configuration.write_text(json.dumps(document))
    return [sys.executable, "-m", "proxy", "serve", "--config", str(configuration), "--port", str(port)]


def _nginx(folder: Path, port: int, upstream: int) -> list[str]:
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    return [nginx, "-c", str(nginx_proxy_configuration(folder, port, upstream))]


def _vllm_router(_: Path, port: int, upstream: int) -> list[str]:
    worker = f"http://127.0.0.1:{upstream}"
    options = ["--worker-urls", worker, "--policy", "round_robin", "--log-level", "warning", *_metrics()]
    return [str(PEERS / "bin" / "vllm-router"), *options, "--host", "127.0.0.1", "--port", str(port)]


def _metrics() -> list[str]:
    """Both routers would want the same port for their metrics."""
    return ["--prometheus-port", str(free_port())]


def _sglang_router(_: Path, port: int, upstream: int) -> list[str]:
    worker = f"http://127.0.0.1:{upstream}"
    options = ["launch", "--worker-urls", worker, "--policy", "round_robin", "--log-level", "warn"]
    options += _metrics()
    return [str(PEERS / "bin" / "sglang-router"), *options, "--host", "127.0.0.1", "--port", str(port)]


def _litellm(folder: Path, port: int, upstream: int) -> list[str]:
    configuration = folder / "litellm.yaml"
    settings = {"model": "openai/chat", "api_base": f"http://127.0.0.1:{upstream}/v1", "api_key": "none"}
    configuration.write_text(json.dumps({"model_list": [{"model_name": "chat", "litellm_params": settings}]}))
    return [str(PEERS / "bin" / "litellm"), "--config", str(configuration), "--host", "127.0.0.1", "--port", str(port)]


def _production_stack(_: Path, port: int, upstream: int) -> list[str]:
    discovery = ["--service-discovery", "static", "--static-backends", f"http://127.0.0.1:{upstream}"]
    options = [*discovery, "--static-models", "chat", "--routing-logic", "roundrobin", "--log-level", "warning"]
    python = str(PRODUCTION_STACK / "venv" / "bin" / "python")
    start = ["env", f"PYTHONPATH={PRODUCTION_STACK / 'src'}", python, "-m", "vllm_router.app"]
    return [*start, *options, "--host", "127.0.0.1", "--port", str(port)]


def _production_stack_missing() -> str:
    here = (PRODUCTION_STACK / "venv" / "bin" / "python").exists()
    return "" if here else f"clone github.com/vllm-project/production-stack to {PRODUCTION_STACK}, its needs in venv/"


def _portkey(_: Path, port: int, upstream: int) -> list[str]:
    return [str(PORTKEY / "node_modules" / ".bin" / "gateway"), f"--port={port}", "--headless"]


def _portkey_headers(upstream: int) -> dict[str, str]:
    return {"x-portkey-provider": "openai", "x-portkey-custom-host": f"http://127.0.0.1:{upstream}/v1"}


def _portkey_missing() -> str:
    here = (PORTKEY / "node_modules" / ".bin" / "gateway").exists()
    return "" if here else f"npm install --prefix {PORTKEY} @portkey-ai/gateway@1.15.2"


def _needs(program: str, package: str) -> Callable[[], str]:
    def missing() -> str:
        here = (PEERS / "bin" / program).exists()
        return "" if here else f"python -m venv {PEERS} && {PEERS}/bin/pip install '{package}'"

    return missing


def _always() -> str:
    return "" if importlib.util.find_spec("proxy") else "run it from the project's folder"


def _nginx_missing() -> str:
    return "" if shutil.which("nginx") or Path("/usr/sbin/nginx").exists() else "apt-get install nginx-light"


JOULEGATE = Peer("joulegate", joulegate, _always)
ALL = [
    JOULEGATE,
    Peer("nginx proxy_pass", _nginx, _nginx_missing),
    Peer("vllm-router", _vllm_router, _needs("vllm-router", "vllm-router==0.1.17")),
    Peer("sglang-router", _sglang_router, _needs("sglang-router", "sglang-router==0.3.2")),
    Peer("production-stack", _production_stack, _production_stack_missing),
    Peer(
        "portkey",
        _portkey,
        _portkey_missing,
        {"NODE_ENV": "production"},
        _portkey_headers,
        "1.15.2 on Node 20 answers a stream with an error of its own (TypeError: immutable)",
    ),
    Peer(
        "litellm",
        _litellm,
        _needs("litellm", "litellm[proxy]==1.106.*"),
        {"LITELLM_LOG": "ERROR", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"},
    ),
]
