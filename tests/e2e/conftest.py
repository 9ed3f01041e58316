"""One proxy for all tests that do no harm to it."""

from collections.abc import Iterator

import pytest

from tests.e2e.harness import Proxy, running


@pytest.fixture(scope="session")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with running(tmp_path_factory.mktemp("proxy")) as found:
        yield found
