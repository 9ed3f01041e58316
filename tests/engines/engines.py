"""Real vLLM engines behind the real proxy: how they are configured, started, and looked into."""

import contextlib
import json
import logging
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import backends
from backends.kinds import kind_of
from backends.spec import BackendKind
from proxy.meter.base import Meter
from proxy.meter.discover import MeterSettings, discover
from tests.e2e.harness import Proxy, SteadyMeter, running, until
from tests.engines.environment import vllm_python
from tests.nvml.stub import NvmlStub

STARTUP_SECONDS = 900.0
#: For the keys and values of 65,536 tokens of the tiny models; unless it is told, vLLM asks for most of the memory.
_CACHE_BYTES = 64 * 2**20
_GPUS = MeterSettings(rapl=False, estimate=False)


@dataclass(frozen=True)
class Engines:
    """The proxy, an OpenAI client of it, the GPUs it meters, and the trace it records."""

    proxy: Proxy
    client: openai.OpenAI
    gpus: NvmlStub
    trace: Path
    folder: Path
    lines: list[str]

    @property
    def log(self) -> str:
        """What the backends' side of the proxy has logged so far."""
        return "\n".join(self.lines)

    def steps(self, backend: str) -> list[dict[str, Any]]:
        """The recorded steps of a backend's engine, in the order they were told."""
        return [step for step in self._recorded(f'"{backend}"') if step["backend"] == backend]

    def steps_of(self, id: str) -> list[dict[str, Any]]:
        """A request's entries in the engines' steps, in order; the proxy's own time on the host is none."""
        steps = [step for step in self._recorded(id) if step["backend"] != "proxy"]
        return [work for step in steps for work in step["work"] if work["request"] == id]

    def _recorded(self, words: str) -> list[dict[str, Any]]:
        """The trace's steps whose lines have these words, without those that the relay inferred."""
        lines = [line for line in self.trace.read_text().splitlines() if words in line]
        found = [json.loads(line) for line in lines if line.startswith('{"type":"step"')]
        return [step for step in found if step.get("source") != "relay"]

    def computed(self, id: str, at_least: int) -> int:
        """The tokens the engine says it computed for a request, once they are all there."""

        def tokens() -> int:
            return sum(int(work["tokens"]) for work in self.steps_of(id))

        until(lambda: tokens() >= at_least)
        return tokens()

    def settled(self, answer: httpx.Response) -> dict[str, Any]:
        """The settled receipt of an answer that must be a good one."""
        assert answer.status_code == 200, answer.text
        return self.until_settled(answer.headers["X-Request-Id"])

    def until_settled(self, id: str) -> dict[str, Any]:
        def receipt() -> dict[str, Any] | None:
            found = self.proxy.receipt(id)
            return found if found["status"] == "settled" else None

        found: dict[str, Any] = until(receipt, 60)
        return found

    def counter(self, backend: str, name: str) -> int:
        """One of vLLM's own counters, summed over its engines."""
        url = self.proxy.node.registry.states[backend].url
        text = httpx.get(f"{url}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith((f"vllm:{name} ", f"vllm:{name}{{"))]
        assert lines, f"vLLM has no counter {name}"
        return int(sum(float(line.rsplit(maxsplit=1)[1]) for line in lines))

    def witnessed(self, backend: str) -> list[list[dict[str, Any]]]:
        """What each process of a backend that runs a model saw it compute, batch by batch (see inside.py)."""
        files = sorted((self.folder / f"{backend}-saw").glob("*.jsonl"))
        return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def expected_tokens(usage: Mapping[str, Any], sequences: int = 1) -> int:
    """What a request computes: each sequence its prompt, and all tokens of its answer but the last.

    vLLM counts the prompt of `n` sequences once, though it computes it `n` times (unless it was cached).
    """
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return int((usage["prompt_tokens"] - cached) * sequences + usage.get("completion_tokens", 0) - sequences)


def model(
    name: str, folder: Path, args: Mapping[str, Any], *, python: Path | None = None, devices: tuple[int, ...] = (0,)
) -> dict[str, Any]:
    """A configured model; `args` are vLLM's flags."""
    common = {"enforce-eager": True, "max-num-seqs": 32, "dtype": "float32", "kv-cache-memory-bytes": _CACHE_BYTES}
    backend = {
        "kind": "vllm",
        "model": str(folder),
        "python": str(python or vllm_python()),
        "devices": list(devices),
        "startup_seconds": STARTUP_SECONDS,
        "args": {**common, **args},
    }
    return {"name": name, "backend": backend}


def with_plugin(folder: Path, name: str, **environment: str) -> Path:
    """An interpreter that runs vLLM with what inside.py puts into it, and with these environment variables.

    Every batch takes 5 ms at least, as it does with a model of real size: vLLM's engine does without its output
    thread as long as batches follow each other so quickly as a tiny model's, and holds back streams and news of aborts.
    """
    plugin, saw = folder / f"{name}-plugin", folder / f"{name}-saw"
    info = plugin / "joulegate_inside-0.dist-info"
    for made in (info, saw):
        made.mkdir(parents=True)
    (plugin / "joulegate_inside.py").symlink_to(Path(__file__).with_name("inside.py"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: joulegate-inside\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\ninside = joulegate_inside:plug_in\n")
    variables = {"ENGINE_WITNESS": str(saw), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "ENGINE_PAUSE": "0.005"}
    script = folder / f"{name}-python"
    script.write_text(
        "#!/bin/sh\n"
        + "".join(f"export {key}='{value}'\n" for key, value in (variables | environment).items())
        + f'export PYTHONPATH="$PYTHONPATH:{plugin}"\nexec {vllm_python()} "$@"\n'
    )
    script.chmod(0o755)
    return script


@contextlib.contextmanager
def serving(
    folder: Path,
    gpus: NvmlStub,
    models: list[dict[str, Any]],
    *,
    kinds: Callable[[str], BackendKind] = kind_of,
    ready: bool = True,
) -> Iterator[Engines]:
    """Run a proxy over these models, whose GPUs are read as NVIDIA's are; the law is checked when it ends."""
    trace = folder / "trace.jsonl"
    meters: list[Meter] = [*discover(_GPUS, {}).meters, SteadyMeter("host", 50.0, kind="rapl")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
        with (
            _logged() as lines,
            running(folder, models=models, meters=meters, kinds=kinds, record=trace, wait=False) as proxy,
        ):
            if ready:
                until(lambda: proxy.client.get("/ready").status_code == 200, STARTUP_SECONDS)
            client = openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="-", max_retries=0)
            yield Engines(proxy, client, gpus, trace, folder, lines)


@contextlib.contextmanager
def _logged() -> Iterator[list[str]]:
    """The lines that `backends` logs, from now on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]  # all it should do
    logger = logging.getLogger("backends")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def started_by_hand(folder: Path, model: Path, name: str, port: int, steps: Path, backend: str) -> Iterator[None]:
    """A vLLM that somebody else runs, as docs/vllm.md says that it should be."""
    (folder / "packages").mkdir()
    (folder / "packages" / "backends").symlink_to(Path(backends.__file__).parent)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("JOULEGATE_")},
        "PYTHONPATH": str(folder / "packages"),
        "JOULEGATE_STEPS_SOCKET": str(steps),
        "JOULEGATE_BACKEND": backend,
        "JOULEGATE_DEVICES": "gpu:0",
        "OMP_NUM_THREADS": "1",
    }
    flags = {"model": model, "served-model-name": name, "port": port, "host": "127.0.0.1", "max-model-len": 1024}
    flags |= {"dtype": "float32", "max-num-seqs": 32, "kv-cache-memory-bytes": _CACHE_BYTES}
    flags |= {"scheduler-cls": "backends.vllm.reporter.scheduler"}
    command = [str(vllm_python()), "-m", "vllm.entrypoints.openai.api_server"]
    command += [f"--{flag}={value}" for flag, value in flags.items()]
    with (folder / "by-hand.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--enforce-eager", "--enable-prompt-tokens-details"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
