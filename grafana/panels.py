"""What a dashboard is made of: queries, panels and rows, as Grafana's JSON model wants them (schema version 39)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

JSON = dict[str, Any]
Kind = Literal["timeseries", "stat", "state-timeline"]

WIDTH = 24
DATASOURCE: JSON = {"type": "prometheus", "uid": "${datasource}"}
#: Green while a figure is 0 (or, in the second, 1), red otherwise.
RED_ABOVE_ZERO: JSON = {
    "mode": "absolute",
    "steps": [{"color": "green", "value": None}, {"color": "red", "value": 1e-9}],
}
RED_BELOW_ONE: JSON = {"mode": "absolute", "steps": [{"color": "red", "value": None}, {"color": "green", "value": 1}]}
PLAIN: JSON = {"mode": "absolute", "steps": [{"color": "green", "value": None}]}
UP_DOWN: list[JSON] = [
    {"type": "value", "options": {"0": {"text": "down", "color": "red"}, "1": {"text": "up", "color": "green"}}}
]


@dataclass(frozen=True)
class Query:
    """A PromQL expression and what its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """`unit` is one of Grafana's unit ids (`watt`, `joule`, `s`, `percentunit`, `short`, or `suffix:…`)."""

    title: str
    queries: Sequence[Query]
    unit: str
    description: str
    kind: Kind = "timeseries"
    width: int = 8
    height: int = 8
    stacked: bool = False
    decimals: int | None = None
    thresholds: JSON = field(default_factory=lambda: PLAIN)
    mappings: list[JSON] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


def laid_out(rows: Iterable[Row]) -> list[JSON]:
    """Rows from top to bottom; panels from left to right, wrapping at Grafana's 24 columns."""
    placed: list[JSON] = []
    y = 0
    for row in rows:
        placed.append(_row(row.title, len(placed) + 1, y))
        y += 1
        for panel, x, top in _places(row.panels, y):
            position = {"x": x, "y": top, "w": panel.width, "h": panel.height}
            placed.append({"id": len(placed) + 1, "gridPos": position, **_panel(panel)})
            y = max(y, top + panel.height)
    return placed


def _places(panels: Iterable[Panel], y: int) -> Iterator[tuple[Panel, int, int]]:
    x, tallest = 0, 0
    for panel in panels:
        if x + panel.width > WIDTH:
            x, y, tallest = 0, y + tallest, 0
        yield panel, x, y
        x += panel.width
        tallest = max(tallest, panel.height)


def _row(title: str, identity: int, y: int) -> JSON:
    position = {"x": 0, "y": y, "w": WIDTH, "h": 1}
    return {"id": identity, "type": "row", "title": title, "collapsed": False, "gridPos": position, "panels": []}


def _panel(panel: Panel) -> JSON:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "targets": [_target(query, chr(ord("A") + number)) for number, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _OPTIONS[panel.kind],
    }


def _target(query: Query, reference: str) -> JSON:
    return {
        "refId": reference,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend or "__auto",
        "range": True,
        "instant": False,
    }


def _defaults(panel: Panel) -> JSON:
    defaults: JSON = {"unit": panel.unit, "thresholds": panel.thresholds, "mappings": panel.mappings}
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
    if panel.kind == "timeseries":
        defaults["color"] = {"mode": "palette-classic"}
        defaults["min"] = 0
        defaults["custom"] = {
            "drawStyle": "line",
            "lineWidth": 1,
            "fillOpacity": 40 if panel.stacked else 10,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        }
    else:
        defaults["color"] = {"mode": "thresholds"}
    return defaults


_OPTIONS: dict[Kind, JSON] = {
    "timeseries": {
        "legend": {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["mean", "lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
    },
    "state-timeline": {
        "mergeValues": True,
        "showValue": "auto",
        "rowHeight": 0.9,
        "alignValue": "left",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": False},
        "tooltip": {"mode": "single", "sort": "none"},
    },
}
