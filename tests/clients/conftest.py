"""The proxy that client libraries talk to, with what each of their calls must leave behind."""

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.harness import Proxy, running


@pytest.fixture(scope="session")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with running(tmp_path_factory.mktemp("clients")) as found:
        yield found


@pytest.fixture
def accounted(proxy: Proxy) -> Callable[..., None]:
    """Check what a client saw of its request's energy against the receipt, which settles."""

    def check(id_: str, joules: float | str | None = None, outcome: str = "completed") -> None:
        receipt = proxy.receipt(id_)
        assert (receipt["status"], receipt["outcome"]) == ("settled", outcome)
        assert 0 <= receipt["low_joules"] <= receipt["energy_joules"] <= receipt["high_joules"]
        if joules is not None:
            assert float(joules) >= 0

    return check
