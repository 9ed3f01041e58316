"""`python -m bench.attribution [--quick] [--json FILE]` prints the accuracy tables; all in them is simulated."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import numpy as np

from bench.attribution.evaluate import Result, evaluate
from bench.attribution.report import main_tables, seeds_table, stress_table
from bench.attribution.scenarios import Scenario, main_loads, stresses

QUICK_SCALE = 0.1
QUICK_STRESS_SECONDS = 3.0
NOTE = "Simulated: no hardware was measured. Truth: the exact Shapley value of the simulator's own step energy."


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    loads = _chosen(main_loads(QUICK_SCALE if options.quick else 1.0), options)
    hard = _chosen(stresses(QUICK_STRESS_SECONDS) if options.quick else stresses(), options)
    if not loads and not hard:
        print(f"no scenario is called {options.only}", file=sys.stderr)
        return 2
    begun = perf_counter()
    failed: dict[str, str] = {}
    load_results, hard_results = _run(loads, failed), _run(hard, failed)
    others = _run([replace(s, seed=s.seed + more) for more in range(1, options.seeds) for s in loads], failed)
    print(NOTE, end="\n\n")
    if load_results:
        print(main_tables(load_results))
    if hard_results:
        print(stress_table(hard_results))
    if others:
        print(seeds_table([*load_results, *others]))
    for name, reason in failed.items():
        print(f"FAILED: {name}: {reason}")
    print(f"{perf_counter() - begun:.0f} s")
    if options.json is not None:
        document = _document(options, load_results, hard_results, others) | {"failed": failed}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.attribution", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short runs: tells whether it works, not how well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat the loads with N seeds in a row")
    parser.add_argument("--only", metavar="NAME", action="append", help="just this scenario (may be given again)")
    return parser.parse_args(arguments)


def _chosen(scenarios: list[Scenario], options: argparse.Namespace) -> list[Scenario]:
    wanted = [s for s in scenarios if options.only is None or s.name in options.only]
    return [replace(scenario, seed=options.seed) for scenario in wanted]


def _run(scenarios: list[Scenario], failed: dict[str, str]) -> list[Result]:
    """A scenario that fails is named in `failed`: it must not take the others' figures with it."""
    results = []
    for scenario in scenarios:
        print(f"{scenario.name}, seed {scenario.seed} ...", file=sys.stderr, flush=True)
        try:
            results.append(evaluate(scenario))
        except Exception as error:
            failed[f"{scenario.name}, seed {scenario.seed}"] = f"{type(error).__name__}: {error}"
    return results


def _document(
    options: argparse.Namespace, loads: list[Result], hard: list[Result], others: list[Result]
) -> dict[str, object]:
    return {
        "simulated": True,
        "note": NOTE,
        "quick": options.quick,
        "seed": options.seed,
        "seeds": list(range(options.seed, options.seed + options.seeds)),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "joulegate": _own_version()},
        "machine": platform.machine(),
        "loads": [result.as_json() for result in loads],
        "stresses": [result.as_json() for result in hard],
        "other_seeds": [result.as_json() for result in others],
    }


def _own_version() -> str:
    try:
        return version("joulegate")
    except PackageNotFoundError:
        return "uninstalled"


if __name__ == "__main__":
    raise SystemExit(main())
