"""Runs the ledger, the very code that serves live traffic, over a simulated run's events."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import process_time

from bench.attribution.emission import Arrival
from proxy.energy.attribution import Attribution, DeviceBalance
from proxy.energy.events import Device, Finish, Model, Sample, Step
from proxy.energy.ledger import Ledger
from proxy.energy.quantities import nanoseconds

RESIDUAL_EVERY_SECONDS = 1.0


@dataclass(slots=True)
class Accounts:
    """By request what it was told at its end and what it settled to; the books; what the accounting took."""

    provisional: dict[str, Attribution] = field(default_factory=dict)
    settled: dict[str, Attribution] = field(default_factory=dict)
    balance: DeviceBalance | None = None
    largest_residual: int = 0
    request_steps: int = 0
    cpu_seconds: float = 0.0


def account(arrivals: list[Arrival], prior: Sequence[Model] = ()) -> Accounts:
    """Feed all events, as a proxy would, and close. `prior` is what a proxy would know of its models at start."""
    accounts, ledger = Accounts(), Ledger(known_only=True)
    checked, begun = 0.0, process_time()
    for at, event in arrivals:
        ledger.apply(event)
        if isinstance(event, Step):
            accounts.request_steps += len(event.requests)
        elif isinstance(event, Finish):
            _answer(accounts, ledger, event.request)
        elif isinstance(event, Sample):
            ledger.advance(nanoseconds(at))
            _collect(accounts, ledger)
            if at > checked + RESIDUAL_EVERY_SECONDS:
                accounts.cpu_seconds += process_time() - begun
                checked = at
                _check(accounts, ledger)
                begun = process_time()
        elif isinstance(event, Device):
            for model in prior:
                ledger.apply(model)
    ledger.close()
    _collect(accounts, ledger)
    accounts.cpu_seconds += process_time() - begun
    _check(accounts, ledger)
    return accounts


def _answer(accounts: Accounts, ledger: Ledger, request: str) -> None:
    now = ledger.attribution(request)
    if now is not None:
        accounts.provisional[request] = now


def _collect(accounts: Accounts, ledger: Ledger) -> None:
    for attribution in ledger.drain():
        accounts.settled[attribution.request] = attribution


def _check(accounts: Accounts, ledger: Ledger) -> None:
    (accounts.balance,) = ledger.devices()
    accounts.largest_residual = max(accounts.largest_residual, abs(accounts.balance.residual))
