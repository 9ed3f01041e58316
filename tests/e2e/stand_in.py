"""The stand-in engine for the real command line: an interpreter of a backend's own, in which vLLM is the stand-in."""

import json
import sys
from pathlib import Path
from typing import Any

from backends.vllm.versions import TESTED
from tests.backends import fake_engine

_SCRIPT = """#!{python}
import os, sys
if any(word.endswith("versions.py") for word in sys.argv):
    print({found!r})
    sys.exit()
name = next(word.partition("=")[2] for word in sys.argv if word.startswith("--served-model-name="))
known = ("--port=", "--token-ms=", "--start-seconds=", "--fail=", "--die-after-seconds=", "--unable=")
flags = [word for word in sys.argv if word.startswith(known)]
os.execv({python!r}, [{python!r}, {engine!r}, "--model=" + name, *flags])
"""


def interpreter(folder: Path) -> Path:
    """Make one, for `python` of backends of kind vllm; their `args` are the stand-in's flags."""
    path = folder / "stand-in-python"
    found = json.dumps({"version": TESTED, "missing": [], "module": True})
    path.write_text(_SCRIPT.format(python=sys.executable, found=found, engine=fake_engine.__file__))
    path.chmod(0o755)
    return path


def backend(python: Path, **args: Any) -> dict[str, Any]:
    """A backend of a configuration; flags with `_` for `-`."""
    named = {name.replace("_", "-"): value for name, value in args.items()}
    return {"kind": "vllm", "model": "stand-in", "python": str(python), "args": named}
