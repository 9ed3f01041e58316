"""Any model that vLLM serves: its own OpenAI-compatible server, reporting every engine step.

`args` are vLLM's flags without their dashes: `max-model-len: 8192`, `enforce-eager: true`, `runner: pooling`. What
joulegate sets itself (see `_OURS`) is refused. Several `devices` without a parallel size mean tensor parallelism.
"""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.spec import BackendError, BackendSpec, Launch, Task
from backends.vllm import versions

logger = logging.getLogger(__name__)

_SCHEDULER = "backends.vllm.reporter.scheduler"
_OURS = frozenset({"model", "served-model-name", "host", "port", "uds", "api-key", "scheduler-cls", "root-path"})
_PARALLEL = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")
_PROBE_SECONDS = 60
_MODULE = ("vllm.entrypoints.openai.api_server", "--model")
_COMMAND = ("vllm.entrypoints.cli.main", "serve")  # what `vllm serve` runs


@dataclass(frozen=True)
class VllmKind:
    tasks: tuple[Task, ...] = ("chat", "classification", "embedding", "score", "audio")
    reports_steps: bool = True

    def launch(self, spec: BackendSpec, port: int, socket: Path) -> Launch | None:
        """vLLM's server. Raises BackendError without vLLM or a model, or for an argument that is ours or impossible."""
        if not spec.model:
            raise BackendError(f"{spec.name}: a vllm backend needs model: a name on the hub, or a folder")
        if _is_local(spec.model) and not Path(spec.model).expanduser().exists():
            raise BackendError(f"{spec.name}: there is no model at {spec.model}")
        python = spec.python or sys.executable
        found = _probe(spec.name, python)
        watched = _can_be_watched(spec.name, found)
        flags = {**_defaults(spec, watched), **_arguments(spec)}
        address = ("--host=127.0.0.1", f"--port={port}", f"--served-model-name={spec.name}")
        server = _MODULE if found["module"] else _COMMAND
        command = (python, "-m", *server, str(Path(spec.model).expanduser()) if _is_local(spec.model) else spec.model)
        words = [word for name, value in flags.items() for word in _words(name, value)]
        return Launch((*command, *address, *words), _environment(spec), reports_steps=watched)


KIND = VllmKind()


def _is_local(model: str) -> bool:
    return model.startswith((".", "/", "~"))


def _probe(name: str, python: str) -> dict[str, Any]:
    """What this interpreter's vLLM is (see `versions`). Raises BackendError if it has none."""
    try:
        told = subprocess.run(
            [python, "-I", versions.__file__], capture_output=True, check=True, timeout=_PROBE_SECONDS
        ).stdout
        found: dict[str, Any] = json.loads(told)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise BackendError(f"{name}: cannot ask {python} for its vLLM: {error}") from error
    if found["missing"] == ["vllm"]:
        raise BackendError(f"{name}: vLLM is not installed for {python}: pip install 'joulegate[vllm]'")
    return found


def _can_be_watched(name: str, found: Mapping[str, Any]) -> bool:
    """Whether our scheduler fits the vLLM that was found; says so when it does not."""
    if found["missing"]:
        logger.warning(
            "%s: vLLM %s has no %s: its steps cannot be watched, its requests are accounted by the tokens the proxy "
            "sees (measured-tokens); tested with %s",
            *(name, found["version"], ", ".join(found["missing"]), versions.TESTED),
        )
    return not found["missing"]


def _defaults(spec: BackendSpec, watched: bool) -> dict[str, Any]:
    """What vLLM is told unless the configuration says otherwise."""
    flags: dict[str, Any] = {
        "enable-prompt-tokens-details": True,
        "disable-uvicorn-access-log": True,
        # Nothing is fetched on a client's behalf: .invalid never resolves. Pictures come as data URLs.
        "allowed-media-domains": ["media.invalid"],
    }
    if watched:
        flags["scheduler-cls"] = _SCHEDULER
    if spec.trust_remote_code:
        flags["trust-remote-code"] = True
    elif not str(spec.model).endswith(".gguf"):
        flags["load-format"] = "safetensors"
    if len(spec.devices) > 1 and not any(name in _names(spec.args) for name in _PARALLEL):
        flags["tensor-parallel-size"] = len(spec.devices)
    return flags


def _arguments(spec: BackendSpec) -> dict[str, Any]:
    """The configuration's own, checked as far as we can know better than vLLM."""
    args = _names(spec.args)
    for name in args:
        if name in _OURS:
            raise BackendError(f"{spec.name}: args.{name} is set by joulegate")
        if name == "trust-remote-code":
            raise BackendError(f"{spec.name}: args.{name}: say trust_remote_code: true beside the backend's kind")
    sizes = [int(args.get(name, 1)) for name in _PARALLEL]
    product = sizes[0] * sizes[1] * sizes[2]
    if spec.devices and product > 1 and product != len(spec.devices):
        raise BackendError(f"{spec.name}: its parallel sizes need {product} devices, not {len(spec.devices)}")
    return args


def _names(args: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-").removeprefix("--"): value for name, value in args.items()}


def _words(name: str, value: Any) -> list[str]:
    """One flag on a command line, as vLLM reads it."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, Mapping):
        return [f"--{name}={json.dumps(dict(value))}"]
    return [f"--{name}={value}"]


def _environment(spec: BackendSpec) -> dict[str, str]:
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if spec.devices:
        return quiet
    return {**quiet, "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")}  # GiB
