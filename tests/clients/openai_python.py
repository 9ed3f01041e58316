"""openai-python's own API-resource tests through the proxy, with OpenAI's specification as the backend.

    python -m tests.clients.openai_python CHECKOUT

CHECKOUT is a clone of openai-python (its work tree or its git directory; what is committed counts). Its tests and its
library are run from a copy, twice: directly against Steady, the mock server they are written for, which answers by the
specification in the clone; and against the proxy in front of it (`TEST_API_BASE_URL`). A test that passes the first
time and not the second fails because of the proxy: then the exit code is 1. Needs Node for Steady, git, and what
`make check` has installed; nothing of openai-python is part of this project.
"""

import argparse
import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from proxy.routing.registry import Route
from tests.clients.environment import node_modules
from tests.e2e.harness import MODELS, Proxy, running, until

#: The resources that the proxy serves.
SERVED = (
    "chat/test_completions.py",
    "test_completions.py",
    "test_responses.py",
    "responses",
    "test_embeddings.py",
    "test_moderations.py",
    "test_images.py",
    "test_models.py",
    "audio",
)
#: Methods of theirs that the proxy does not have: the file, the methods, and why.
OUT_OF_SCOPE = {
    r"chat/test_completions\.py::.*_(retrieve|update|list|delete)": "stored chat completions: no engine keeps any",
    r"test_images\.py::.*_create_variation": "variations of pictures: DALL·E 2's alone",
    r"test_models\.py::.*_delete": "deleting a fine-tuned model: models are configured, clients do not delete them",
    r"test_responses\.py::.*_compact": "compaction of a conversation by OpenAI's own models",
    r"responses/test_input_tokens\.py": "OpenAI's token counter; `/tokenize` and Anthropic's `count_tokens` count here",
}
#: Names of models in the tests; the proxy serves only what is configured.
NAMES = re.compile(r"""model=["']([^"']+)["']|^            ["'](gpt-[^"']+)["'],$""", re.MULTILINE)
#: Ids of responses in the tests, which nobody made: the proxy forwards those that it has seen made.
RESPONSES = ("resp_677efb5139a88190b512bc3fef8e535d", "response_id", "resp_123")
_STEADY = ("query-array", "form-array", "query-object", "form-object")


@dataclass(frozen=True)
class Outcome:
    """What came of the tests: each id's fate (`passed`, `failed`, `skipped`), and the words of failures."""

    tests: dict[str, str]
    words: dict[str, str]

    def count(self) -> str:
        counted = Counter(self.tests.values())
        return ", ".join(f"{counted[what]} {what}" for what in ("passed", "failed", "skipped"))


def unpack(checkout: Path, folder: Path) -> str:
    """Copy what is committed; the version."""
    archive = subprocess.run(["git", "-C", str(checkout), "archive", "HEAD"], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    found = re.search(r'"(.+)"', (folder / "src/openai/_version.py").read_text().partition("__version__")[2])
    assert found
    return found[1]


def specification(folder: Path) -> Path:
    """The specification, its paths under /v1 as the proxy asks for them."""
    head, begin, paths = (folder / "api_reference/openapi.transformed.yml").read_text().partition("\npaths:\n")
    written = folder / "specification.yml"
    written.write_text(head + begin + re.sub(r"^  /", "  /v1/", paths, flags=re.MULTILINE))
    return written


@contextlib.contextmanager
def steady(document: Path) -> Iterator[str]:
    """The mock server; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = [f"--validator-{what}-format=brackets" for what in _STEADY]
    command = ["node", str(node_modules() / "@stdy/cli/steady.js"), "--host", "127.0.0.1", "-p", str(port), "-q"]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*command, *options, str(document)], stdout=subprocess.DEVNULL) as process:
        try:
            until(lambda: _answers(f"{url}/_x-steady/health"), 60)
            yield url
        finally:
            process.terminate()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def models(folder: Path, url: str) -> list[dict[str, object]]:
    """The mock server under every name that the tests use (the only such model, so that none need be named), and a
    classifier that moderates.
    """
    texts = [path.read_text() for name in SERVED for path in _files(folder / "tests/api_resources" / name)]
    names = sorted({name for text in texts for found in NAMES.findall(text) for name in found if name} - {"model"})
    mock: dict[str, object] = {"name": "mock", "aliases": names, "backend": {"kind": "remote", "url": url}}
    return [mock, {**MODELS[2], "moderation": True}]


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.py")) if path.is_dir() else [path]


def remember(proxy: Proxy, url: str) -> None:
    """As if the responses that the tests ask for had been made through this proxy, and stayed when deleted."""
    spec = next(spec for spec in proxy.node.registry.specs.values() if spec.url == url)
    route = Route(spec.id, url, None, None, reports_steps=False, takes_response_id=False)
    stored = proxy.context.responses
    stored.forget = lambda id_: None  # type: ignore[method-assign] # a test deletes what the next one asks for

    def made() -> None:
        for id_ in RESPONSES:
            stored.remember(msgspec.Raw(msgspec.json.encode(id_)), route, None)

    proxy.on_loop(made)


def run(folder: Path, base_url: str) -> Outcome:
    """Run their tests against an address."""
    report = folder / "report.xml"
    environment = {
        **os.environ,
        "TEST_API_BASE_URL": base_url,
        "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder}",
        "DEFER_PYDANTIC_BUILD": "false",
    }
    options = ["-q", "--no-header", "-o", "addopts=", "-o", "junit_family=xunit1", "-p", "no:cacheprovider"]
    files = [f"tests/api_resources/{name}" for name in SERVED]
    command = [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *files]
    subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, check=False)
    return read(report)


def read(report: Path) -> Outcome:
    tests: dict[str, str] = {}
    words: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        file = str(case.get("file")).removeprefix("tests/api_resources/")
        id_ = f"{file}::{str(case.get('classname')).rpartition('.')[2]}::{case.get('name')}"
        bad = [child for child in case if child.tag in {"failure", "error"}]
        tests[id_] = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        if bad:
            words[id_] = str(bad[0].get("message")).partition("\n")[0]
    return Outcome(tests, words)


def out_of_scope(id_: str) -> str | None:
    return next((why for pattern, why in OUT_OF_SCOPE.items() if re.search(pattern, id_)), None)


def compare(direct: Outcome, through: Outcome) -> list[str]:
    """The tests in scope that pass against the mock server and not through the proxy."""
    lost = [id_ for id_, what in direct.tests.items() if what == "passed" and through.tests.get(id_) != "passed"]
    return [id_ for id_ in lost if out_of_scope(id_) is None]


def report(version: str, direct: Outcome, through: Outcome) -> tuple[list[str], bool]:
    """What is told, and whether all is well."""
    outside = Counter(why for id_ in through.tests if (why := out_of_scope(id_)) is not None)
    inside = Outcome({id_: what for id_, what in through.tests.items() if out_of_scope(id_) is None}, through.words)
    caused = compare(direct, through)
    lines = [
        f"openai-python {version}: against the mock server {direct.count()}",
        *(f"  out of scope, {count}: {why}" for why, count in sorted(outside.items())),
        f"  in scope, through the proxy {inside.count()}",
        *(f"  {id_}: {through.words.get(id_, 'it was not run')[:300]}" for id_ in caused),
        f"  caused by the proxy: {len(caused)}",
    ]
    return lines, bool(inside.tests) and not caused


def main() -> int:
    parser = argparse.ArgumentParser(description="openai-python's own tests through the proxy")
    parser.add_argument("checkout", type=Path)
    checkout = parser.parse_args().checkout
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        version = unpack(checkout, folder)
        with steady(specification(folder)) as url:
            direct = run(folder, f"{url}/v1")
            with running(folder, models=models(folder, url)) as proxy:
                remember(proxy, url)
                through = run(folder, f"{proxy.url}/v1")
                until(proxy.settled)
    lines, well = report(version, direct, through)
    sys.stdout.write("\n".join([*lines, ""]))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
