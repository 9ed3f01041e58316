import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.energy.events import Device, Event, Processes, Sample
from proxy.energy.ledger import Ledger
from proxy.meter.base import Meter, MeterError, Reading
from proxy.meter.replay import ScriptedMeter
from proxy.meter.sampler import MeterStatus, Sampler, next_due

Emit = Callable[[Sequence[Event]], None]
Run = Callable[..., "Running"]


class Running:
    """A sampler at work, and what it has emitted."""

    def __init__(self, *meters: Meter, hz: float = 100, pids: Mapping[str, Collection[int]] | None = None) -> None:
        self.events: list[Event] = []
        self.threads: set[int] = set()
        self.sampler = Sampler(meters, self.emit, hz=hz, our_pids=lambda: pids or {})
        self.sampler.start()

    def emit(self, events: Sequence[Event]) -> None:
        self.threads.add(threading.get_ident())
        self.events += events

    def of(self, device: str) -> list[Sample]:
        return [event for event in list(self.events) if isinstance(event, Sample) and event.device == device]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, f"in vain; {self.sampler.status()}"
            time.sleep(0.005)

    def status(self, device: str) -> MeterStatus:
        return next(status for status in self.sampler.status() if status.device == device)


@pytest.fixture
def run() -> Iterator[Run]:
    all_running: list[Running] = []

    def start(*meters: Meter, **options: object) -> Running:
        running = Running(*meters, **options)  # type: ignore[arg-type]  # the options are Running's own
        all_running.append(running)
        return running

    yield start
    for running in all_running:
        running.sampler.stop()


def test_devices_come_first_then_samples_in_order_from_a_thread_of_its_own(run: Run) -> None:
    running = run(ScriptedMeter.constant(100), ScriptedMeter.constant(30, device="host"))
    running.until(lambda: len(running.of("gpu:0")) > 10 and len(running.of("host")) > 10)
    first, second = running.events[:2]
    assert isinstance(first, Device)
    assert isinstance(second, Device)
    assert (first.device, second.device) == ("gpu:0", "host")
    times = [sample.at for sample in running.of("gpu:0")]
    assert times == sorted(set(times))
    assert running.threads.isdisjoint({threading.get_ident()})
    assert len(running.threads) == 1
    assert running.status("gpu:0") == MeterStatus("gpu:0", "replay", "scripted gpu:0", True, None, None)


def test_a_sample_says_what_the_meter_said(run: Run) -> None:
    readings = iter(range(1_000_000))
    running = run(ScriptedMeter(lambda _: next(readings), lambda _: 250.0))
    running.until(lambda: len(running.of("gpu:0")) > 10)
    samples = running.of("gpu:0")[:10]
    assert [sample.energy for sample in samples] == [number * 1_000_000 for number in range(10)]
    assert {sample.power for sample in samples} == {250.0}


@given(period=st.floats(0.001, 1), durations=st.lists(st.floats(0, 5), min_size=1, max_size=20))
def test_the_cadence_does_not_drift_however_long_rounds_take(period: float, durations: list[float]) -> None:
    began = now = due = 1_000.0
    for duration in durations:
        now = max(now, due) + duration
        due = next_due(due, now, period)
        assert now < due + period * 1e-6
        assert due <= now + period * (1 + 1e-6)
        assert (due - began) / period == pytest.approx(round((due - began) / period), abs=1e-6)


def test_a_meter_that_fails_is_told_of_once_with_its_cure_and_the_others_go_on(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = ScriptedMeter.constant(1), ScriptedMeter.constant(1, device="gpu:1")
    bad.failure = MeterError("it broke", cure="mend it")
    with caplog.at_level(logging.WARNING):
        running = run(bad, good)
        running.until(lambda: len(running.of("gpu:1")) > 30)
    assert running.of("gpu:0") == []
    assert caplog.text.count("it broke; cure: mend it") == 1
    assert running.status("gpu:0").up is False
    assert running.status("gpu:0").error == "it broke; cure: mend it"
    assert running.status("gpu:1").up is True


def test_a_meter_that_recovers_is_sampled_again(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    meter = ScriptedMeter.constant(1)
    with caplog.at_level(logging.WARNING):
        running = run(meter)
        running.until(lambda: len(running.of("gpu:0")) > 2)
        meter.failure = MeterError("lost")
        running.until(lambda: not running.status("gpu:0").up)
        count = len(running.of("gpu:0"))
        meter.failure = None
        running.until(lambda: len(running.of("gpu:0")) > count + 2)
    assert running.status("gpu:0").up is True
    assert "works again" in caplog.text


def test_a_meter_with_a_bug_does_not_end_the_sampling(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = ScriptedMeter.constant(1), ScriptedMeter.constant(1, device="gpu:1")
    bad.failure = ZeroDivisionError("oh")
    with caplog.at_level(logging.WARNING):
        running = run(bad, good)
        running.until(lambda: len(running.of("gpu:1")) > 5)
    assert running.status("gpu:0").error == "ZeroDivisionError: oh"
    assert caplog.text.count("Traceback") == 1


def test_a_meter_whose_driver_hangs_shows_as_down(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.meter.sampler.STALE_SECONDS", 0.1)
    release = threading.Event()

    def hang(at: float) -> float:
        if at > 0.05:
            release.wait(20)
        return at

    running = run(ScriptedMeter(hang))
    running.until(lambda: len(running.of("gpu:0")) > 1)
    running.until(lambda: not running.status("gpu:0").up)
    assert "no reading for" in (running.status("gpu:0").error or "")
    release.set()
    running.until(lambda: running.status("gpu:0").up)


def test_a_receiver_that_fails_does_not_end_the_sampling(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def refuse(events: Sequence[Event]) -> None:
        calls.append(len(events))
        raise RuntimeError("the loop is closed")

    sampler = Sampler([ScriptedMeter.constant(1)], refuse, hz=200, our_pids=dict)
    with caplog.at_level(logging.WARNING):
        sampler.start()
        deadline = time.monotonic() + 20
        while len(calls) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
        sampler.stop()
    assert len(calls) >= 5
    assert caplog.text.count("could not be handed over") == 1


def test_stopping_ends_the_thread_and_closes_the_meters() -> None:
    meter = ScriptedMeter.constant(1)
    events: list[Event] = []
    before = set(threading.enumerate())
    sampler = Sampler([meter], events.extend, hz=100, our_pids=dict)
    sampler.start()
    sampler.stop()
    count = len(events)
    assert meter.closed
    assert set(threading.enumerate()) <= before
    time.sleep(0.05)
    assert len(events) == count


class SharedScriptedMeter(ScriptedMeter):
    """A scripted meter whose device others use too; it also disagrees with itself."""

    share: float | None = 0.25
    trouble: MeterError | None = None
    disagreement: float | None = None
    asked_of: Collection[int] = ()

    def foreign_share(self, ours: Collection[int]) -> float | None:
        self.asked_of = set(ours)
        if self.trouble:
            raise self.trouble
        return self.share


def processes_of(running: Running, device: str) -> list[Processes]:
    return [event for event in list(running.events) if isinstance(event, Processes) and event.device == device]


def test_a_gpus_foreign_share_is_emitted(run: Run) -> None:
    meter = SharedScriptedMeter(lambda at: at)
    running = run(meter, pids={"chat": [1]})
    running.until(lambda: bool(processes_of(running, "gpu:0")))
    assert processes_of(running, "gpu:0")[0].foreign_share == 0.25
    assert 1 in meter.asked_of


def test_a_share_that_cannot_be_told_is_not_emitted_as_none_used(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    silent, broken = SharedScriptedMeter(lambda at: at), SharedScriptedMeter(lambda at: at, device="gpu:1")
    silent.share, broken.trouble = None, MeterError("no permission", cure="become root")
    with caplog.at_level(logging.WARNING):
        running = run(silent, broken, hz=200)
        running.until(lambda: len(running.of("gpu:1")) > 10)
    assert processes_of(running, "gpu:0") == []
    assert processes_of(running, "gpu:1") == []
    assert caplog.text.count("no permission; cure: become root") == 1
    assert running.status("gpu:1").up is True


def test_disagreement_shows_in_the_status_and_a_new_accuracy_is_emitted(run: Run) -> None:
    meter = SharedScriptedMeter(lambda at: at)
    meter.accuracy_ratio = 0.05
    running = run(meter)
    running.until(lambda: len(running.of("gpu:0")) > 2)
    meter.disagreement = meter.accuracy_ratio = 0.3
    running.until(lambda: any(isinstance(e, Device) and e.accuracy_ratio == 0.3 for e in list(running.events)))
    assert running.status("gpu:0").disagreement == 0.3
    assert sum(isinstance(event, Device) for event in running.events) == 2


def test_the_hosts_cpu_time_is_split_between_us_and_others(run: Run) -> None:
    import os

    running = run(ScriptedMeter.constant(30, device="host"), pids={"proxy": [os.getpid()], "chat": []})
    running.until(lambda: len(processes_of(running, "host")) >= 2)
    share = processes_of(running, "host")[-1]
    assert set(share.backend_shares) == {"proxy"}
    assert 0 <= share.foreign_share <= 1
    total = share.foreign_share + sum(share.backend_shares.values())
    assert total == pytest.approx(1) or total == 0


def test_process_ids_that_cannot_be_had_do_not_end_the_sampling(caplog: pytest.LogCaptureFixture) -> None:
    def pids() -> Mapping[str, Collection[int]]:
        raise RuntimeError("the supervisor is gone")

    events: list[Event] = []
    sampler = Sampler([ScriptedMeter.constant(1, device="host")], events.extend, hz=100, our_pids=pids)
    with caplog.at_level(logging.WARNING):
        sampler.start()
        deadline = time.monotonic() + 20
        while len(events) < 20 and time.monotonic() < deadline:
            time.sleep(0.005)
        sampler.stop()
    assert len(events) >= 20
    assert "could not be found" in caplog.text


def test_the_ledger_lives_on_what_the_sampler_emits(run: Run) -> None:
    meter = SharedScriptedMeter(lambda at: 100 * at, lambda _: 100.0)
    running = run(meter, ScriptedMeter.constant(30, device="host"))
    running.until(lambda: len(processes_of(running, "host")) >= 1 and len(running.of("gpu:0")) > 20)
    running.sampler.stop()
    ledger = Ledger(known_only=True)
    for event in running.events:
        ledger.apply(event)
    ledger.close()
    for balance, device in zip(ledger.devices(), ("gpu:0", "host"), strict=True):
        first, *_, last = running.of(device)
        assert balance.counter == last.energy - first.energy
        assert balance.residual == 0


def test_a_reading_may_lack_power(run: Run) -> None:
    running = run(ScriptedMeter(lambda at: at))
    running.until(lambda: len(running.of("gpu:0")) > 0)
    assert running.of("gpu:0")[0].power is None
    assert ScriptedMeter(lambda at: 5.0).read() == Reading(5_000_000, None)  # type: ignore[arg-type]
