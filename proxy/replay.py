"""`joulegate replay`: a recorded trace through the ledger that serves live traffic."""

from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from proxy.energy.events import Event
from proxy.energy.ledger import EventError, Ledger
from proxy.trace import TraceError, attribution_line, balance_line, read_events


def replay(path: Path, out: TextIO) -> None:
    """Write one line per request as it settles, then one per device. Raises TraceError.

    Lines written before a malformed one was met are right as far as they go.
    """
    replay_events(read_events(path), str(path), out)


def replay_events(events: Iterable[tuple[int, Event]], trace: str, out: TextIO) -> None:
    """As `replay`, for events with the numbers of their lines."""
    ledger = Ledger()
    for number, event in events:
        try:
            ledger.apply(event)
        except EventError as error:
            raise TraceError(trace, number, str(error)) from error
        _write_settled(ledger, out)
    ledger.close()
    _write_settled(ledger, out)
    for balance in ledger.devices():
        out.write(balance_line(balance) + "\n")


def _write_settled(ledger: Ledger, out: TextIO) -> None:
    for attribution in ledger.drain():
        out.write(attribution_line(attribution) + "\n")
