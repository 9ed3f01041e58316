"""The proxy's own OpenAPI document holds: whatever a client makes of it, no answer is undocumented or malformed."""

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from proxy.api.openapi import model_paths
from tests.e2e.harness import Proxy

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
#: Reading from the documentation itself, and the live stream of metrics text, is not what the fuzzing is for.
PAGES = ["/v1/models", "/v1/models/{model}", "/v1/energy/receipts", "/v1/energy/receipts/{id}", "/v1/energy/devices"]
OTHERS = ["/v1/responses/{id}", "/v1/responses/{id}/input_items", "/v1/responses/{id}/cancel", "/health", "/ready"]


def exercise(proxy: Proxy, operation: Any) -> None:
    """A few requests made from what the document says of an operation."""

    @settings(
        max_examples=6,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy())
        answer = case.call(base_url=proxy.url)
        case.validate_response(answer, checks=CHECKS)

    check()


@pytest.mark.parametrize("path", [*model_paths(), *PAGES, *OTHERS, "/metrics"])
def test_every_answer_is_a_documented_one(proxy: Proxy, path: str) -> None:
    document = json.loads(proxy.client.get("/openapi.json").content)
    schema = schemathesis.openapi.from_dict(document)
    for method in document["paths"][path]:
        exercise(proxy, schema[path][method.upper()])
