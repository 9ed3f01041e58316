"""What the accountant adds to the ledger: a figure that no meter stands behind is none."""

import pytest

from backends.steps import StepReport
from proxy import accounting
from proxy.accounting import Accountant, Ticket
from proxy.energy.carbon import Intensity
from proxy.energy.events import Device, Sample
from proxy.energy.ledger import Ledger
from proxy.energy.quantities import GramsPerKilowattHour, Nanoseconds, microjoules
from proxy.energy.receipt import Accounting, Request, Tokens

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


class Node:
    """An accountant whose meters draw 100 W each; `dead` ones are not read."""

    def __init__(self, clock: Clock) -> None:
        terms = Accounting("node", 1.0, Intensity(GramsPerKilowattHour(56), "FRA", "static", "2023"), devices={})
        self.accountant = Accountant(Ledger(known_only=True), terms, {"chat": ("gpu:0", "host")})
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
        ticket = self.accountant.open(Request("a" * 32, "chat", "chat", "/v1/chat/completions", created=0.0))
        attempt, started = ticket.attempt("chat"), self._clock()
        self.run(seconds)
        report = StepReport(started, self._clock(), ("gpu:0",), [attempt], [1], [1])
        self.accountant.steps("chat", [report])
        ticket.finish("completed", Tokens())
        return ticket


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
