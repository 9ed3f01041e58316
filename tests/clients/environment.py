"""Client libraries in environments of their own, made once and kept where the engines' are.

Node's `openai` is installed by `npm ci` from the lock file beside this; LiteLLM needs other versions of what we pin.
"""

import shutil
import sys
from pathlib import Path

from tests.engines.environment import cache, hash_of, locked, run

LITELLM = "litellm==1.110.2"
_NODE = Path(__file__).with_name("node")


def node_modules() -> Path:
    """The folder with Node's libraries, made if it is not there."""
    folder = cache() / f"node-{hash_of(_NODE / 'package-lock.json')}"
    with locked(folder.with_suffix(".lock")):
        if not (folder / ".complete").exists():
            folder.mkdir(exist_ok=True)
            for name in ("package.json", "package-lock.json"):
                shutil.copy(_NODE / name, folder)
            run("npm", "ci", "--prefix", str(folder), "--no-audit", "--no-fund", "--ignore-scripts", "--silent")
            (folder / ".complete").touch()
    return folder / "node_modules"


def litellm_python() -> Path:
    """The interpreter of an environment with LiteLLM in it (some 380 MB), made if it is not there."""
    folder = cache() / LITELLM.replace("==", "-")
    python = folder / "bin" / "python"
    with locked(folder.with_suffix(".lock")):
        if not (folder / ".complete").exists():
            run(sys.executable, "-m", "venv", "--clear", str(folder))
            run(str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", LITELLM)
            (folder / ".complete").touch()
    return python
