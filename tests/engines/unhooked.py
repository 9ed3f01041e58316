"""A vLLM as it would be if a version of it had no `--scheduler-cls`: the real one, but for that flag."""

import re
import subprocess
from pathlib import Path

from tests.engines.environment import vllm_python

_CHANGED = Path("engine") / "arg_utils.py"
_FLAG = re.compile(r"\w+\.add_argument\(\s*\"--scheduler-cls\".*?\n        \)\n", re.DOTALL)


def unhooked_python(folder: Path) -> Path:
    """The interpreter of an environment whose vLLM refuses the flag; everything else is linked to the real one."""
    asked = (str(vllm_python()), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
    packages = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    subprocess.run([str(vllm_python()), "-m", "venv", "--without-pip", str(folder)], check=True)
    own = folder / packages.relative_to(vllm_python().parent.parent)
    (own / "vllm.pth").write_text(f"{packages}\n")
    _link(packages / "vllm", own / "vllm")
    real, changed = packages / "vllm" / _CHANGED, own / "vllm" / _CHANGED
    changed.parent.unlink()
    _link(real.parent, changed.parent)
    changed.unlink()
    text, count = _FLAG.subn("pass\n", real.read_text())
    assert count == 1, f"{real} defines the flag in another way"
    changed.write_text(text)
    return folder / "bin" / "python"


def _link(real: Path, folder: Path) -> None:
    folder.mkdir()
    for child in real.iterdir():
        if child.name != "__pycache__":
            (folder / child.name).symlink_to(child)
