"""The page of the clients names the versions that the tests run."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.clients.environment import LITELLM

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "clients.md"
RUN = {
    "`openai` (Python)": version("openai"),
    "`openai` (Node)": json.loads((HERE / "node/package.json").read_text())["dependencies"]["openai"],
    "`anthropic` (Python)": version("anthropic"),
    "LangChain (`langchain-openai`)": version("langchain-openai"),
    "LiteLLM, as a client": LITELLM.partition("==")[2],
    "`huggingface_hub`": version("huggingface_hub"),
}


@pytest.mark.parametrize("library", RUN)
def test_the_version_that_is_run_is_the_one_documented(library: str) -> None:
    found = re.search(rf"^\| {re.escape(library)} \| ([\d.]+) \|", PAGE.read_text(), re.MULTILINE)
    assert found
    assert found[1] == RUN[library]
