"""The law, in every history: the accounts of a device sum to its counter's rises, to the microjoule, at any time."""

from collections import Counter
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from proxy.energy.attribution import Attribution
from proxy.energy.events import Event, Sample
from proxy.energy.ledger import EventError, Ledger
from tests.energy.histories import histories


def rises(samples: Iterable[Sample]) -> int:
    """What the counter rose, told independently of the ledger: stale samples out, drops are no rises."""
    last: Sample | None = None
    total = 0
    for sample in samples:
        if last is not None and sample.at <= last.at:
            continue
        total += max(sample.energy - last.energy, 0) if last else 0
        last = sample
    return total


def live_through(history: list[Event], *, known_only: bool) -> tuple[Ledger, list[Attribution]]:
    ledger, settled = Ledger(known_only=known_only), list[Attribution]()
    for event in history:
        before = ledger.devices()
        try:
            ledger.apply(event)
        except EventError:
            assert ledger.devices() == before
        assert all(balance.residual == 0 for balance in ledger.devices())
        settled += ledger.drain()
    return ledger, settled


@given(histories(), st.booleans())
def test_accounts_sum_to_the_counter_at_any_time(history: list[Event], known_only: bool) -> None:
    ledger, settled = live_through(history, known_only=known_only)
    ledger.close()
    settled += ledger.drain()
    for balance in ledger.devices():
        samples = [event for event in history if isinstance(event, Sample) and event.device == balance.device]
        assert balance.counter == rises(samples)
        assert balance.pending == 0
        assert balance.residual == 0
        shares = [
            attribution.devices[balance.device] for attribution in settled if balance.device in attribution.devices
        ]
        assert sum(share.active for share in shares) == balance.requests
        assert min(balance.requests, balance.idle, balance.foreign, balance.unattributed) >= 0


@given(histories(), st.booleans())
def test_settled_accounts_only_rise(history: list[Event], known_only: bool) -> None:
    ledger = Ledger(known_only=known_only)
    last: dict[str, tuple[int, int, int, int]] = {}
    for event in history:
        try:
            ledger.apply(event)
        except EventError:
            continue
        for balance in ledger.devices():
            now = (balance.requests, balance.idle, balance.foreign, balance.unattributed)
            assert all(new >= old for new, old in zip(now, last.get(balance.device, now), strict=True))
            last[balance.device] = now


@given(histories(), st.booleans())
def test_every_request_settles_once_and_its_figures_make_sense(history: list[Event], known_only: bool) -> None:
    ledger, settled = live_through(history, known_only=known_only)
    ledger.close()
    settled += ledger.drain()
    for attribution in settled:
        assert attribution.settled
        assert attribution.started <= attribution.ended
        for share in attribution.devices.values():
            assert 0 <= share.low <= share.active <= share.high
            assert 0 <= share.marginal <= share.active <= share.meanwhile
    assert max(Counter(attribution.request for attribution in settled).values(), default=1) == 1
    assert all(ledger.attribution(attribution.request) is None for attribution in settled)


@given(histories())
def test_the_same_history_gives_the_same_figures(history: list[Event]) -> None:
    one, two = (live_through(history, known_only=True) for _ in range(2))
    assert one[1] == two[1]
    assert one[0].devices() == two[0].devices()
