"""The committed dashboards are what the script writes, and hang together."""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from grafana.dashboards import FOLDER, rendered
from proxy.energy.receipt import Tokens
from proxy.export.metrics import Metrics
from tests.export.nodes import snapshot
from tests.receipts import receipt

DASHBOARDS = sorted(rendered())


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["panels"]
    return found


def expressions(path: Path) -> Iterator[str]:
    for panel in panels(path):
        for target in panel.get("targets", ()):
            yield target["expr"]


def exported() -> set[str]:
    """The names of all series that a busy node exports."""
    metrics = Metrics(["chat"])
    metrics.watch(lambda: snapshot(lost=1))
    metrics.request_finished("chat", "/v1/chat/completions", 200, 0.1)
    metrics.first_token("chat", 0.1)
    metrics.tokens("chat", Tokens(completion=1))
    metrics.receipt_settled(receipt("a"), None)
    families = text_string_to_metric_families(metrics.render().decode())
    return {sample.name for family in families for sample in family.samples}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_the_committed_dashboard_is_what_the_script_writes(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == rendered()[path], "run: python -m grafana.dashboards"


def test_no_dashboard_is_left_over() -> None:
    assert sorted(FOLDER.glob("*.json")) == DASHBOARDS


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_only_metrics_that_exist_are_asked_for(path: Path) -> None:
    asked = {name for text in expressions(path) for name in re.findall(r"\b(?:joulegate|process)_\w+", text)}
    assert asked
    assert asked <= exported()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panels_neither_overlap_nor_leave_the_page(path: Path) -> None:
    places = [panel["gridPos"] for panel in panels(path)]
    assert all(place["x"] >= 0 and place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart_across = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_down = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_across or apart_down, (one, other)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panels_can_be_told_apart(path: Path) -> None:
    ids = [panel["id"] for panel in panels(path)]
    assert len(ids) == len(set(ids))
    assert all(panel["description"] for panel in panels(path) if panel["type"] != "row")
