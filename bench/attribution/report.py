"""The tables, as text."""

from collections.abc import Sequence

from bench.attribution.evaluate import PROVISIONAL, REFERENCE, SETTLED, Result
from bench.attribution.peers import PEERS

Rows = Sequence[Sequence[str]]


def main_tables(results: Sequence[Result]) -> str:
    """Methods down, loads across: mean error with (median, 95th percentile), then the cold start alone."""
    head = ["split", *(f"{r.scenario} (batch {r.mean_batch:.0f})" for r in results)]
    labels = [SETTLED, PROVISIONAL, *PEERS, REFERENCE]
    errors = [[label, *(_errors(r, label) for r in results)] for label in labels]
    cold = [[label, *(f"{r.errors[label].cold_mape:.1f}" for r in results)] for label in labels]
    return (
        _section("Error of a request's joules, %: mean (median, 95th percentile), cold start included", [head, *errors])
        + _section("The cold start alone (requests of the first 30 s), mean error, %", [head, *cold])
        + _section("What Joulegate promises beside", _ledger_rows(results))
    )


def stress_table(results: Sequence[Result]) -> str:
    """One row per scenario: ours, what the counter allows, and the best peer."""
    head = ["scenario", "settled: mean (median, p95)", "cold", "reference", "best peer's split", "", "Zeus"]
    rows = [_stress_row(result) for result in results]
    title = "One thing made harder at a time, %"
    return _section(title, [head, *rows]) + _section("What Joulegate promises beside", _ledger_rows(results))


def seeds_table(results: Sequence[Result]) -> str:
    """Luck: the same loads with other arrivals and another phase of the meter."""
    names = list(dict.fromkeys(r.scenario for r in results))
    seeds = list(dict.fromkeys(r.seed for r in results))
    mapes = {(r.scenario, r.seed): r.errors[SETTLED].mape for r in results}
    head = ["load", *(f"seed {seed}" for seed in seeds), "mean"]
    rows = []
    for name in names:
        found = [mapes[name, seed] for seed in seeds if (name, seed) in mapes]
        cells = [f"{mapes[name, seed]:.1f}" if (name, seed) in mapes else "failed" for seed in seeds]
        rows.append([name, *cells, f"{sum(found) / len(found):.1f}"])
    return _section("Settled, mean error by seed, %", [head, *rows])


def _stress_row(result: Result) -> list[str]:
    peer, mape = result.best_peer()
    settled, reference, zeus = (result.errors[label] for label in (SETTLED, REFERENCE, next(iter(PEERS))))
    return [
        result.scenario, _errors(result, SETTLED), f"{settled.cold_mape:.1f}", f"{reference.mape:.1f}", f"{mape:.1f}",
        peer, f"{zeus.mape:.0f}",
    ]  # fmt: skip


def _errors(result: Result, label: str) -> str:
    errors = result.errors[label]
    digits = 1 if errors.mape < 100 else 0
    return f"{errors.mape:.{digits}f} ({errors.median:.{digits}f}, {errors.p95:.{digits}f})"


def _ledger_rows(results: Sequence[Result]) -> Rows:
    head = [
        "scenario", "provisional against settled, % (p95)", "inside interval, % (cold, provisional)",
        "half-width, % (>= 1 s)", "residual, uJ", "us per request-step", "idle", "foreign", "missing",
    ]  # fmt: skip
    return [head, *(_ledger_row(result) for result in results)]


def _ledger_row(result: Result) -> list[str]:
    f = result.ledger
    return [
        result.scenario,
        f"{f.provisional_against_settled_mape:.1f} ({f.provisional_against_settled_p95:.1f})",
        f"{100 * f.coverage:.0f} ({100 * f.coverage_cold:.0f}, {100 * f.coverage_provisional:.0f})",
        f"{f.median_half_width_percent:.1f} ({f.median_half_width_percent_long:.1f})",
        str(f.largest_residual_microjoules),
        f"{f.microseconds_per_request_step:.2f}",
        f"{f.idle_ratio:.3f}",
        "" if f.foreign_ratio is None else f"{f.foreign_ratio:.3f}",
        str(f.missing),
    ]


def _section(title: str, rows: Rows) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([title, "", lines[0], "-" * len(lines[0]), *lines[1:], "", ""])
