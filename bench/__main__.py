"""`python -m bench [--quick]`: every benchmark, one after the other; each is a command of its own, too."""

import subprocess
import sys

BENCHMARKS = ("attribution", "ledger", "accounting", "step_reporter", "overhead")
TAKES_QUICK = {"attribution", "overhead"}


def main() -> int:
    quick = "--quick" in sys.argv[1:]
    worst = 0
    for name in BENCHMARKS:
        print(f"\n=== python -m bench.{name}", flush=True)
        options = ["--quick"] if quick and name in TAKES_QUICK else []
        worst = max(worst, subprocess.run([sys.executable, "-m", f"bench.{name}", *options], check=False).returncode)
    return worst


if __name__ == "__main__":
    sys.exit(main())
