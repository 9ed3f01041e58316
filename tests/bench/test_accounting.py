"""`python -m bench.accounting` drives the real books: they must balance, and requests must settle as it runs."""

from bench.accounting import Load, measure
from proxy import accounting


def test_requests_settle_while_the_bench_runs_and_the_books_balance() -> None:
    clock = accounting.now
    cost = measure(Load(requests=2_000, rate=1_000.0, in_flight=16))
    assert cost.residual == 0
    assert 0 < cost.unsettled < 1_000
    assert accounting.now is clock
