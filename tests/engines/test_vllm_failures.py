"""What a vLLM says that cannot start is told in one line; the other models are served meanwhile."""

import pytest

from tests.e2e.harness import until
from tests.engines.engines import STARTUP_SECONDS, Engines

pytestmark = pytest.mark.engines


def why_missing(engines: Engines, name: str) -> str:
    answer = engines.proxy.client.get("/ready")
    assert answer.status_code == 503
    return str(answer.json()["missing"].get(name, ""))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere", "there is no model at /nowhere/at/all"),
        ("absent", "there is no GPU 9: this machine has 2, numbered from 0"),
        ("empty", "Invalid repository ID or local directory specified"),
        ("garbled", "is not a valid JSON file"),
        ("flag", "unrecognized arguments: --no-such-flag=3"),
        ("value", "argument --max-model-len: invalid human_readable_int_or_auto value: 'many'"),
        ("long", "max_model_len (99999) is greater than the derived max_model_len"),
        ("memory", "is less than desired CPU memory utilization"),
    ],
)
def test_why_a_model_cannot_be_served_is_told_in_one_line(broken: Engines, name: str, words: str) -> None:
    why = until(lambda: words in (told := why_missing(broken, name)) and told, STARTUP_SECONDS)
    assert why.startswith(("failed: ", "starting: "))
    assert "\n" not in why
    refused = broken.proxy.post("/v1/completions", {"model": name, "prompt": "hello"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"]
    served = broken.proxy.post(
        "/v1/chat/completions", {"model": "well", "messages": [{"role": "user", "content": "?"}]}
    )
    assert served.status_code == 200
    assert set(broken.proxy.client.get("/ready").json()["missing"]) == BROKEN


BROKEN = {"nowhere", "absent", "empty", "garbled", "flag", "value", "long", "memory"}
