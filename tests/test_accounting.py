"""What the accountant adds to the ledger: a figure that no meter stands behind is none."""

from collections.abc import Callable, Sequence

import pytest

from backends.steps import StepReport
from proxy import accounting
from proxy.accounting import Accountant, Ticket
from proxy.energy.carbon import Intensity
from proxy.energy.events import Device, Sample
from proxy.energy.ledger import Ledger
from proxy.energy.quantities import GramsPerKilowattHour, Nanoseconds, microjoules
from proxy.energy.receipt import Accounting, Receipt, Request, Tokens

SECOND = 1_000_000_000
GPU, HOST = Device("gpu:0", "H100", "nvml-counter"), Device("host", "CPU", "rapl")


class Clock:
    def __init__(self) -> None:
        self.at = Nanoseconds(100 * SECOND)

    def __call__(self) -> Nanoseconds:
        return self.at

    def forward(self, seconds: float) -> None:
        self.at = Nanoseconds(self.at + round(seconds * SECOND))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(accounting, "now", found)
    return found


class Sink:
    """Keeps what settles; fails on the receipts in `bad`."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []
        self.bad: set[str] = set()

    def settled(self, receipt: Receipt, provisional: Receipt | None) -> None:
        if receipt.request.id in self.bad:
            raise RuntimeError("a sink's own defect")
        self.receipts.append(receipt)

    def still_provisional(self, receipt: Receipt) -> None:
        pass


class Node:
    """An accountant whose meters draw 100 W each; `dead` ones are not read. `later` has it settle a few at a time."""

    def __init__(self, clock: Clock, later: list[Callable[[], None]] | None = None) -> None:
        terms = Accounting("node", 1.0, Intensity(GramsPerKilowattHour(56), "FRA", "static", "2023"), devices={})
        self.sink = Sink()
        self.accountant = Accountant(
            Ledger(known_only=True), terms, {"chat": ("gpu:0", "host")}, sinks=[self.sink],
            later=None if later is None else later.append,
        )  # fmt: skip
        self.dead: set[str] = set()
        self._clock = clock
        self.accountant.observe([GPU, HOST])

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / 0.1)):
            self._clock.forward(0.1)
            at = self._clock()
            energy = microjoules(100 * at / SECOND)
            names = {"gpu:0", "host"} - self.dead
            self.accountant.observe([Sample(name, at, energy) for name in sorted(names)])

    def serve(self, seconds: float) -> Ticket:
        """One request, worked on all the time."""
        return self.serve_all(["a" * 32], seconds)[0]

    def serve_all(self, ids: Sequence[str], seconds: float) -> list[Ticket]:
        """Requests that one step has computed, all the time."""
        requests = [Request(id, "chat", "chat", "/v1/chat/completions", created=0.0) for id in ids]
        tickets = [self.accountant.open(request) for request in requests]
        attempts, started = [ticket.attempt("chat") for ticket in tickets], self._clock()
        self.run(seconds)
        ones = [1] * len(ids)
        self.accountant.steps("chat", [StepReport(started, self._clock(), ("gpu:0",), attempts, ones, ones)])
        for ticket in tickets:
            ticket.finish("completed", Tokens())
        return tickets


def test_a_request_that_a_meter_failed_to_measure_settles_without_a_figure(clock: Clock) -> None:
    node = Node(clock)
    node.run(1)
    node.dead = {"gpu:0"}
    ticket = node.serve(1)
    node.run(40)
    found = node.accountant.receipt(ticket.request.id)
    assert found is not None
    assert (found.status, found.figures) == ("unavailable", None)


def test_a_meter_that_comes_back_in_time_has_measured_it(clock: Clock) -> None:
    node = Node(clock)
    node.run(1)
    node.dead = {"gpu:0"}
    ticket = node.serve(1)
    node.run(10)
    node.dead = set()
    node.run(40)
    found = node.accountant.receipt(ticket.request.id)
    assert found is not None
    assert found.status == "settled"
    assert found.figures is not None
    assert found.figures.parts.gpu > 0
    for balance in node.accountant.ledger.devices():
        assert balance.residual == 0


def test_a_request_that_no_meter_could_see_begin_has_no_figure_at_its_end(clock: Clock) -> None:
    node = Node(clock)
    node.run(1)
    node.dead = {"gpu:0"}
    node.run(60)
    told = node.serve(1).provisional
    assert told is not None
    assert (told.status, told.figures) == ("unavailable", None)


def test_many_that_settle_together_are_handed_out_a_few_at_a_time_and_once_each(clock: Clock) -> None:
    later: list[Callable[[], None]] = []
    node, ids = Node(clock, later), [f"{number:032x}" for number in range(100)]
    node.run(1)
    node.serve_all(ids, 1)
    node.run(2)
    at_first = len(node.sink.receipts)
    assert 0 < at_first < 100
    assert len(later) == 1
    for id in ids:  # those that wait to be handed out are told as they settled
        found = node.accountant.receipt(id)
        assert found is not None
        assert found.status == "settled"
    while later:
        later.pop(0)()
    assert sorted(receipt.request.id for receipt in node.sink.receipts) == ids
    assert node.accountant.unsettled == 0


def test_the_end_does_not_wait_for_what_would_be_handed_out_later(clock: Clock) -> None:
    later: list[Callable[[], None]] = []
    node, ids = Node(clock, later), [f"{number:032x}" for number in range(100)]
    node.run(1)
    node.serve_all(ids, 1)
    node.accountant.close()
    for call in later:
        call()
    assert sorted(receipt.request.id for receipt in node.sink.receipts) == ids


def test_a_sink_that_fails_on_one_receipt_gets_the_others(clock: Clock) -> None:
    node, ids = Node(clock), [f"{number:032x}" for number in range(5)]
    node.sink.bad = {ids[2]}
    node.run(1)
    node.serve_all(ids, 1)
    node.run(2)
    assert {receipt.request.id for receipt in node.sink.receipts} == {*ids} - {ids[2]}
