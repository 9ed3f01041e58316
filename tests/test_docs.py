"""What the documentation shows is what the code takes."""

import re
from pathlib import Path

import pytest
import yaml

from proxy.api.openapi import model_paths
from proxy.config import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_configurations_in_the_documentation_are_taken(path: Path) -> None:
    for block in blocks(path, "yaml"):
        document = yaml.safe_load(block)
        if isinstance(document, dict) and "models" in document:
            parse(document, source=path.name)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_model_endpoint_is_documented() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    assert [path for path in model_paths() if f"`{path}`" not in page and f"`POST {path}`" not in page] == []


def test_the_configuration_page_shows_every_section() -> None:
    (example,) = blocks(ROOT / "docs" / "configuration.md", "yaml")
    assert set(yaml.safe_load(example)) == {"server", "auth", "store", "energy", "models"}
