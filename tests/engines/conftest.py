"""A proxy in front of real vLLM engines, started once for all tests: they take a minute or more."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from backends.kinds import kind_of
from tests.e2e.harness import Proxy, running, until
from tests.engines.environment import tiny_models, vllm_python

STARTUP_SECONDS = 900.0


@dataclass(frozen=True)
class Engines:
    """The proxy, an OpenAI client of it, and the trace it records."""

    proxy: Proxy
    client: openai.OpenAI
    trace: Path


def model(name: str, folder: Path, **args: Any) -> dict[str, Any]:
    common = {"enforce-eager": True, "max-num-seqs": 32, "dtype": "float32"}
    backend = {"kind": "vllm", "model": str(folder), "python": str(vllm_python()), "devices": [0]}
    return {"name": name, "backend": {**backend, "startup_seconds": STARTUP_SECONDS, "args": {**common, **args}}}


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    """vLLM's CPU build thinks it runs on gpu:0, whose meter is a steady one."""
    folder, models = tmp_path_factory.mktemp("engines"), tiny_models()
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    patch.setenv("OMP_NUM_THREADS", "1")
    served = [
        model("llama", models / "llama", **{"max-model-len": 8192}),
        model("bert", models / "bert", **{"max-model-len": 256, "runner": "pooling"}),
        model("embedder", models / "llama", **{"max-model-len": 256, "runner": "pooling"}),
    ]
    trace = folder / "trace.jsonl"
    with running(folder, models=served, kinds=kind_of, record=trace, wait=False) as proxy:
        until(lambda: proxy.client.get("/ready").status_code == 200, STARTUP_SECONDS)
        yield Engines(proxy, openai.OpenAI(base_url=f"{proxy.url}/v1", api_key="-", max_retries=0), trace)
    patch.undo()
