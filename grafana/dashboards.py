"""The dashboards, written as Grafana's JSON: `python -m grafana.dashboards`."""

import json
from pathlib import Path

from grafana.panels import DATASOURCE, JSON, RED_ABOVE_ZERO, RED_BELOW_ONE, UP_DOWN, Panel, Query, Row, laid_out

FOLDER = Path(__file__).parent / "json"

#: What the variables at the dashboard's top select.
NODE = 'instance=~"$instance"'
MODEL = f'{NODE},model=~"$model"'
DEVICE = f'{NODE},device=~"$device"'


def rate(metric: str, selector: str, by: str = "") -> str:
    """Per-second rate of a counter, summed (by labels)."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{selector}}}[$__rate_interval]))"


def quantile(level: float, histogram: str, selector: str, by: str = "model") -> str:
    return f"histogram_quantile({level}, {rate(f'{histogram}_bucket', selector, f'le, {by}')})"


def quotient(numerator: str, denominator: str) -> str:
    """No data rather than NaN while there is nothing to divide by."""
    return f"{numerator} / ({denominator} > 0)"


def quantiles(histogram: str, selector: str, levels: tuple[float, ...] = (0.5, 0.95)) -> list[Query]:
    return [Query(quantile(level, histogram, selector), f"{{{{model}}}} p{level * 100:.0f}") for level in levels]


REQUEST_WATTS = rate("joulegate_energy_joules_total", MODEL)
JOULES_PER_REQUEST = quotient(
    rate("joulegate_request_energy_joules_sum", MODEL, "model"),
    rate("joulegate_request_energy_joules_count", MODEL, "model"),
)
JOULES_PER_OUTPUT_TOKEN = quotient(
    rate("joulegate_energy_joules_total", MODEL, "model"),
    rate("joulegate_tokens_total", f'{MODEL},kind="completion"', "model"),
)

NOW = Row(
    "Now",
    [
        Panel(
            "Power",
            [Query(f"sum (joulegate_device_power_watts{{{DEVICE}}})")],
            "watt",
            "Power of all devices, as their meters say.",
            kind="stat",
            width=4,
            height=5,
        ),
        Panel(
            "Spent on requests",
            [
                Query(
                    quotient(
                        rate("joulegate_account_energy_joules_total", f'{DEVICE},account="requests"'),
                        rate("joulegate_account_energy_joules_total", DEVICE),
                    )
                )
            ],
            "percentunit",
            "Share of the devices' energy that requests caused; the rest was idle, foreign or unattributed.",
            kind="stat",
            width=4,
            height=5,
        ),
        Panel(
            "Energy per request",
            [
                Query(
                    quotient(
                        rate("joulegate_request_energy_joules_sum", MODEL),
                        rate("joulegate_request_energy_joules_count", MODEL),
                    )
                )
            ],
            "joule",
            "Mean energy of a request, within the configured boundary.",
            kind="stat",
            width=4,
            height=5,
        ),
        Panel(
            "Emissions",
            [Query(f"{rate('joulegate_emissions_grams_total', MODEL)} * 3600")],
            "suffix: gCO2e/h",
            "Grams of CO2e per hour that requests cause.",
            kind="stat",
            width=4,
            height=5,
        ),
        Panel(
            "Requests",
            [Query(rate("joulegate_requests_total", MODEL))],
            "reqps",
            "Requests that end per second.",
            kind="stat",
            width=4,
            height=5,
        ),
        Panel(
            "Conservation residual",
            [Query(f"max (abs (joulegate_conservation_residual_joules{{{DEVICE}}}))")],
            "joule",
            "Counter minus all accounts. Always 0; anything else is a bug of Joulegate.",
            kind="stat",
            width=4,
            height=5,
            thresholds=RED_ABOVE_ZERO,
        ),
    ],
)

ENERGY = Row(
    "Energy",
    [
        Panel(
            "Power by device",
            [Query(f"joulegate_device_power_watts{{{DEVICE}}}", "{{device}} {{name}} ({{meter}})")],
            "watt",
            "As the meters say it; a meter named codecarbon is an estimate.",
        ),
        Panel(
            "Power by account",
            [Query(rate("joulegate_account_energy_joules_total", DEVICE, "account"), "{{account}}")],
            "watt",
            "Settled energy per second: what requests caused, what was idle, another process's, or unexplained.",
            stacked=True,
        ),
        Panel(
            "Power by model",
            [Query(rate("joulegate_energy_joules_total", MODEL, "model"), "{{model}}")],
            "watt",
            "Settled energy of requests per second.",
            stacked=True,
        ),
        Panel(
            "Energy per request",
            [Query(JOULES_PER_REQUEST, "{{model}}")],
            "joule",
            "Mean energy of a request.",
        ),
        Panel(
            "Energy of requests, quantiles",
            quantiles("joulegate_request_energy_joules", MODEL),
            "joule",
            "Half of the requests took less than p50, 95 % less than p95.",
        ),
        Panel(
            "Energy per output token",
            [Query(JOULES_PER_OUTPUT_TOKEN, "{{model}}")],
            "joule",
            "All energy of a model's requests over all tokens they produced.",
            decimals=3,
        ),
        Panel(
            "Power by part",
            [Query(rate("joulegate_energy_joules_total", MODEL, "part"), "{{part}}")],
            "watt",
            "Where requests' energy went: accelerators, host, the building's overhead, failed attempts.",
            stacked=True,
        ),
        Panel(
            "Emissions by model",
            [Query(f"{rate('joulegate_emissions_grams_total', MODEL, 'model, kind')} * 3600", "{{model}} {{kind}}")],
            "suffix: gCO2e/h",
            "Grams of CO2e per hour.",
            stacked=True,
        ),
        Panel(
            "Carbon intensity of the grid",
            [
                Query(
                    f"max by (zone, source) (joulegate_grid_carbon_intensity_grams_per_kwh{{{NODE}}})",
                    "{{zone}} ({{source}})",
                )
            ],
            "suffix: g/kWh",
            "What receipts are computed with.",
        ),
    ],
)

TRAFFIC = Row(
    "Traffic",
    [
        Panel(
            "Requests by model",
            [Query(rate("joulegate_requests_total", MODEL, "model"), "{{model}}")],
            "reqps",
            "Requests that end per second.",
            stacked=True,
        ),
        Panel(
            "Requests by status",
            [Query(rate("joulegate_requests_total", MODEL, "code"), "{{code}}")],
            "reqps",
            "499: the client went away before the answer's end.",
            stacked=True,
        ),
        Panel(
            "Requests in flight",
            [Query(f"sum by (model) (joulegate_requests_in_flight{{{MODEL}}})", "{{model}}")],
            "short",
            "Requests under way.",
            stacked=True,
        ),
        Panel(
            "Duration",
            quantiles("joulegate_request_duration_seconds", MODEL),
            "s",
            "From a request's arrival to its response's end.",
        ),
        Panel(
            "Time to first token",
            quantiles("joulegate_time_to_first_token_seconds", MODEL),
            "s",
            "Streams only.",
        ),
        Panel(
            "Tokens",
            [Query(rate("joulegate_tokens_total", MODEL, "model, kind"), "{{model}} {{kind}}")],
            "suffix: tokens/s",
            "As the backends' own usage says.",
        ),
    ],
)

TRUST = Row(
    "How good the figures are",
    [
        Panel(
            "Width of the intervals",
            quantiles("joulegate_interval_ratio", MODEL),
            "percentunit",
            "(high - low) / energy of settled receipts: counter tick and fit; the meter's own error stands apart.",
        ),
        Panel(
            "Error of provisional receipts",
            quantiles("joulegate_provisional_error_ratio", MODEL),
            "percentunit",
            "How far the figure in the headers was from the settled one.",
        ),
        Panel(
            "Error of the cost model",
            [Query(f"joulegate_attribution_fit_error_ratio{{{DEVICE}}}", "{{backend}} on {{device}}")],
            "percentunit",
            "Relative error of the fitted cost model on closed windows; no data until one has been fitted.",
        ),
        Panel(
            "Residual and pending",
            [
                Query(f"joulegate_conservation_residual_joules{{{DEVICE}}}", "{{device}} residual"),
                Query(f"joulegate_pending_energy_joules{{{DEVICE}}}", "{{device}} pending"),
            ],
            "joule",
            "The residual is always 0. Pending energy waits for its window to settle: 30 s at most.",
        ),
        Panel(
            "Meters compared",
            [Query(f"joulegate_meter_disagreement_ratio{{{DEVICE}}}", "{{device}}")],
            "percentunit",
            "How far a second source of the same device is from its meter; no data where there is only one.",
        ),
        Panel(
            "Idle power",
            [Query(f"joulegate_device_idle_power_watts{{{DEVICE}}}", "{{device}}")],
            "watt",
            "Calibrated from windows without work; no data until there was one.",
        ),
    ],
)

HEALTH = Row(
    "Health",
    [
        Panel(
            "Backends",
            [Query(f"joulegate_backend_up{{{MODEL}}}", "{{model}} on {{instance}}")],
            "short",
            "Whether each model can be served.",
            kind="state-timeline",
            thresholds=RED_BELOW_ONE,
            mappings=UP_DOWN,
        ),
        Panel(
            "Meters",
            [Query(f"joulegate_meter_up{{{DEVICE}}}", "{{device}} ({{meter}}) of {{instance}}")],
            "short",
            "Whether each meter's last reading succeeded.",
            kind="state-timeline",
            thresholds=RED_BELOW_ONE,
            mappings=UP_DOWN,
        ),
        Panel(
            "Step reports",
            [
                Query(rate("joulegate_step_reports_total", NODE, "backend"), "{{backend}}"),
                Query(rate("joulegate_step_reports_lost_total", NODE, "backend"), "{{backend}} lost"),
            ],
            "suffix: reports/s",
            "Lost ones make intervals wider and methods coarser.",
        ),
        Panel(
            "Receipts to be written",
            [
                Query(f"joulegate_store_receipts_waiting{{{NODE}}}", "{{instance}} waiting"),
                Query(f"joulegate_store_receipts_dropped_total{{{NODE}}}", "{{instance}} dropped"),
            ],
            "short",
            "They wait while the store is down; beyond the limit they are dropped.",
        ),
        Panel(
            "Memory of the proxy",
            [Query(f"process_resident_memory_bytes{{{NODE},job=~'joulegate.*'}}", "{{instance}}")],
            "bytes",
            "Resident memory of the proxy itself, without its backends.",
        ),
        Panel(
            "CPU of the proxy",
            [Query(f"rate(process_cpu_seconds_total{{{NODE},job=~'joulegate.*'}}[$__rate_interval])", "{{instance}}")],
            "percentunit",
            "100 % is one core.",
        ),
    ],
)

OVERVIEW = (NOW, ENERGY, TRAFFIC, TRUST, HEALTH)


def dashboard(title: str, uid: str, rows: tuple[Row, ...]) -> JSON:
    """One dashboard; the data source and what to look at are chosen at its top."""
    return {
        "uid": uid,
        "title": title,
        "tags": ["joulegate", "energy"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": _variables()},
        "annotations": {"list": []},
        "links": [],
        "panels": laid_out(rows),
    }


def _variables() -> list[JSON]:
    return [
        {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1},
        _choice("instance", "Node", "joulegate_requests_in_flight"),
        _choice("model", "Model", f"joulegate_requests_in_flight{{{NODE}}}"),
        _choice("device", "Device", f"joulegate_device_energy_joules_total{{{NODE}}}"),
    ]


def _choice(label: str, title: str, series: str) -> JSON:
    query = f"label_values({series}, {label})"
    return {
        "name": label,
        "label": title,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery", "qryType": 1},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def rendered() -> dict[Path, str]:
    """Every dashboard's file and what is to stand in it."""
    overview = dashboard("Joulegate overview", "joulegate-overview", OVERVIEW)
    return {FOLDER / "overview.json": json.dumps(overview, indent=1, ensure_ascii=False) + "\n"}


def main() -> None:
    for path, text in rendered().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
