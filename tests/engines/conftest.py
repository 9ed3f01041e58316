"""Proxies in front of real vLLM engines, each started once for all tests that need it: they take a minute or more.

The meter of the GPUs that vLLM's CPU build thinks it runs on is the product's own, over the C stand-in of NVIDIA's
library (tests/nvml): the power that it simulates is the tests' to choose, and its energy is known exactly.
"""

import contextlib
import ctypes
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from backends import supervisor
from backends.kinds import kind_of
from backends.spec import BackendKind
from tests.e2e.harness import stand_ins, until
from tests.engines.engines import STARTUP_SECONDS, Engines, model, serving, started_by_hand, with_plugin
from tests.engines.environment import tiny_models
from tests.engines.unhooked import unhooked_python
from tests.nvml.fixtures import nvml_library
from tests.nvml.stub import Gpu, NvmlStub

__all__ = ["nvml_library"]


@pytest.fixture(scope="session")
def gpus(nvml_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NvmlStub]:
    """Two simulated GPUs, for this process only: the dynamic linker takes what it has loaded under a library's name."""
    ctypes.CDLL(str(nvml_library / "libnvidia-ml.so.1"))
    stub = NvmlStub(nvml_library, tmp_path_factory.mktemp("stub") / "control", [Gpu(), Gpu()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVML_STUB", str(stub.control))
        yield stub


class Stage:
    """One proxy with its engines at a time: all of them together would need a large machine's memory."""

    def __init__(self) -> None:
        self._shown = ""
        self._engines: Engines | None = None
        self._stack = contextlib.ExitStack()

    def show(self, name: str, start: Callable[[], AbstractContextManager[Engines]]) -> Engines:
        """The engines of this name, started if others (or none) are on."""
        if self._shown != name or self._engines is None:
            self.clear()
            self._shown, self._engines = name, self._stack.enter_context(start())
        return self._engines

    def clear(self) -> None:
        self._engines = None
        self._stack.close()


@pytest.fixture(scope="session")
def stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.clear()


@pytest.fixture
def engines(stage: Stage, gpus: NvmlStub, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """vLLM as most people run it: one that chats, one that classifies, one that embeds, one that sees."""

    def start() -> AbstractContextManager[Engines]:
        folder, models = tmp_path_factory.mktemp("engines"), tiny_models()
        guided = {
            "enable-auto-tool-choice": True,
            "tool-call-parser": "hermes",
            # A random model would fill its answers by schema with spaces.
            "structured-outputs-config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        served = [
            model("llama", models / "llama", {"max-model-len": 8192, **guided}, python=with_plugin(folder, "llama")),
            model("bert", models / "bert", {"max-model-len": 256, "runner": "pooling"}),
            model("embedder", models / "llama", {"max-model-len": 256, "runner": "pooling"}),
            model(
                "seer",
                models / "paligemma",
                {"max-model-len": 256, "load-format": "dummy"},
                python=with_plugin(folder, "seer", ENGINE_EYES="1"),
            ),
        ]
        return serving(folder, gpus, served)

    return stage.show("engines", start)


@pytest.fixture
def modes(stage: Stage, gpus: NvmlStub, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """vLLM in every way in which it can batch, with a witness of what its model computes."""
    # 1,280 tokens fit into the cache, 128 into a step: requests are chunked, and preempted when they have grown.
    tight = {"block-size": 32, "num-gpu-blocks-override": 40, "max-num-batched-tokens": 128}
    guess = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1}

    def start() -> AbstractContextManager[Engines]:
        folder, llama = tmp_path_factory.mktemp("modes"), tiny_models() / "llama"

        def mode(name: str, args: dict[str, Any], devices: tuple[int, ...] = (0,), **variables: str) -> dict[str, Any]:
            python = with_plugin(folder, name, **variables)
            return model(name, llama, {"max-model-len": 1024, **args}, python=python, devices=devices)

        served = [
            mode("tight", tight),
            mode("asynchronous", tight, ENGINE_ASYNC="1"),
            mode("speculative", {"speculative-config": guess}),
            mode("replicated", {"data-parallel-size": 2}, (0, 1)),
            mode("pipeline", {"pipeline-parallel-size": 2, "max-num-batched-tokens": 128}, (0, 1), ENGINE_PIPELINE="1"),
        ]
        return serving(folder, gpus, served)

    return stage.show("modes", start)


@pytest.fixture
def broken(stage: Stage, gpus: NvmlStub, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Engines that cannot start, each for a reason of its own, beside a stand-in that serves well."""

    @contextlib.contextmanager
    def start() -> Iterator[Engines]:
        folder, llama = tmp_path_factory.mktemp("broken"), tiny_models() / "llama"
        for made in ("empty", "garbled", "gpus/one", "gpus/two"):
            (folder / made).mkdir(parents=True)
        (folder / "garbled" / "config.json").write_text('{"model_type": ')
        served = [
            {"name": "well", "backend": {"kind": "llamacpp", "model": "fake", "devices": [0]}},
            model("nowhere", Path("/nowhere/at/all"), {}),
            model("absent", llama, {}, devices=(9,)),
            model("empty", folder / "empty", {}),
            model("garbled", folder / "garbled", {}),
            model("flag", llama, {"no-such-flag": 3}),
            model("value", llama, {"max-model-len": "many"}),
            model("long", llama, {"max-model-len": 99_999}),
            model("memory", llama, {"kv-cache-memory-bytes": None, "gpu-memory-utilization": 1.0}),
        ]

        def kinds(kind: str) -> BackendKind:
            return kind_of(kind) if kind == "vllm" else stand_ins(kind)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("backends.supervisor.NVIDIA_GPUS", folder / "gpus")
            with serving(folder, gpus, served, kinds=kinds, ready=False) as engines:
                until(lambda: "well" not in engines.proxy.client.get("/ready").json()["missing"], STARTUP_SECONDS)
                yield engines

    return stage.show("broken", start)


@pytest.fixture
def attached(stage: Stage, gpus: NvmlStub, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """A vLLM without the hook, whose port is taken at first, and one of somebody else's, watched and not watched."""

    @contextlib.contextmanager
    def start() -> Iterator[Engines]:
        folder, llama = tmp_path_factory.mktemp("attached"), tiny_models() / "llama"
        steps, port = folder / "run" / "steps.sock", supervisor._free_port()
        python = unhooked_python(folder / "unhooked")
        there = {"kind": "remote", "url": f"http://127.0.0.1:{port}", "model": "tiny", "devices": [0]}
        served = [
            model("unhooked", llama, {"max-model-len": 1024}, python=python),
            {"name": "elsewhere", "backend": {**there, "steps": str(steps)}},
            {"name": "unwatched", "backend": there},
        ]
        with (
            started_by_hand(folder, llama, "tiny", port, steps, "elsewhere"),
            socket.create_server(("127.0.0.1", 0)) as taken,
            pytest.MonkeyPatch.context() as patch,
        ):
            free, first = supervisor._free_port, [int(taken.getsockname()[1])]
            patch.setattr(supervisor, "_free_port", lambda: first.pop() if first else free())
            with serving(folder, gpus, served) as engines:
                yield engines

    return stage.show("attached", start)
