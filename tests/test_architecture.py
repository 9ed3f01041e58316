"""Who may import whom: the map of the design, held by a test."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINES = {"torch", "vllm", "diffusers", "transformers", "xllamacpp"}
#: Folders of the proxy by layer: each may import itself and what stands to its right in the lists.
MAY_IMPORT = {
    "proxy/energy": {"proxy.energy"},
    "proxy/meter": {"proxy.meter", "proxy.energy", "proxy.errors", "proxy.trace"},
    "proxy/store": {"proxy.store", "proxy.energy", "proxy.errors"},
    "proxy/export": {"proxy.export", "proxy.energy"},
    "proxy/routing": {"proxy.routing", "proxy.energy", "proxy.relay.endpoints", "proxy.errors", "backends"},
}
#: I/O that has no place in a pure core.
IMPURE = {"asyncio", "socket", "os", "subprocess", "pathlib", "threading", "time", "random", "logging", "io", "json"}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no files in {folder}"
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("path", files("proxy"), ids=str)
def test_the_proxy_imports_no_engine(path: Path) -> None:
    assert ENGINES.isdisjoint(map(top, imports(path)))


@pytest.mark.parametrize("path", files("backends"), ids=str)
def test_backends_never_import_the_proxy(path: Path) -> None:
    assert "proxy" not in set(map(top, imports(path)))


@pytest.mark.parametrize("path", files("proxy/energy"), ids=str)
def test_the_energy_core_is_pure(path: Path) -> None:
    assert IMPURE.isdisjoint(map(top, imports(path)))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_they_may(folder: str) -> None:
    allowed = MAY_IMPORT[folder]
    for path in files(folder):
        for module in imports(path):
            if top(module) in {"proxy", "backends"}:
                inside = any(module == name or module.startswith(name + ".") for name in allowed)
                assert inside or module in {"proxy", "backends"}, f"{path.relative_to(ROOT)} imports {module}"


def test_importing_the_app_loads_no_engine() -> None:
    code = "import sys, proxy.app; print(sorted({'torch','vllm','diffusers','transformers'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
