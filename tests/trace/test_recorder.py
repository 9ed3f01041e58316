import io
import logging
import os
import resource
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.energy.events import (
    UNKNOWN_REQUEST,
    BackendState,
    Device,
    Event,
    Finish,
    Loss,
    Processes,
    Sample,
    Start,
    Step,
)
from proxy.energy.ledger import Ledger
from proxy.energy.quantities import Microjoules, Nanoseconds, nanoseconds
from proxy.recorder import Recorder, RecordingError
from proxy.replay import replay, replay_events
from proxy.trace import encode, read_events

DEVICE = Device("gpu:0", "H100", "nvml-counter", accuracy_ratio=0.05)


def at(seconds: float) -> Nanoseconds:
    return nanoseconds(seconds)


def step(started: float, ended: float, *requests: str, devices: tuple[str, ...] = ("gpu:0",)) -> Step:
    size = len(requests)
    return Step("chat", devices, at(started), at(ended), list(requests), [1] * size, [10] * size)


def sample(second: float, energy: float) -> Sample:
    return Sample("gpu:0", at(second), Microjoules(round(energy * 1e6)))


def recorded(path: Path) -> list[Event]:
    return [event for _, event in read_events(path)]


def history() -> Iterator[Event]:
    yield DEVICE
    for number in range(60):
        name = f"r{number}"
        yield Start(name, at(number), "chat")
        yield sample(number + 0.1, number * 100)
        yield step(number + 0.2, number + 0.8, name)
        yield Finish(name, at(number + 0.9), "completed")
    yield sample(61, 6100)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def test_what_is_recorded_is_what_happened(trace: Path) -> None:
    recorder = Recorder(trace)
    recorder.record(list(history()))
    recorder.close()
    assert recorded(trace) == list(history())
    assert recorder.lost == 0


def test_a_replay_of_a_recording_equals_the_live_ledger(trace: Path) -> None:
    live = Ledger(known_only=True)
    recorder = Recorder(trace)
    for event in (*history(), step(60.1, 60.5, "nobody the proxy knows")):
        recorder.record([event])
        live.apply(event)
    recorder.close()
    live.close()
    out = io.StringIO()
    replay(trace, out)
    again = io.StringIO()
    numbered = [(1, event) for event in recorded(trace)]
    replay_events(numbered, "again", again)
    assert out.getvalue() == again.getvalue()
    (balance,) = live.devices()
    energies = {a.request: sum(share.active for share in a.devices.values()) for a in live.drain()}
    assert f'"unattributed_joules":{balance.unattributed // 1_000_000}.' in out.getvalue()
    for request, energy in energies.items():
        assert f'"request":"{request}"' in out.getvalue()
        assert f'"energy_joules":{energy // 10**6}.{energy % 10**6:06d}' in out.getvalue()


def test_ids_that_the_proxy_never_gave_are_recorded_as_nobodys(trace: Path) -> None:
    recorder = Recorder(trace)
    recorder.record([DEVICE, Start("a", at(0), "chat"), step(0, 1, "a", "stranger")])
    recorder.record([Finish("a", at(1), "completed"), step(1, 2, "a")])
    recorder.close()
    first, late = [event for event in recorded(trace) if isinstance(event, Step)]
    assert first.requests == ["a", UNKNOWN_REQUEST]
    assert late.requests == ["a"]  # its last step may be reported after its answer


def test_devices_without_a_meter_are_left_out(trace: Path) -> None:
    recorder = Recorder(trace)
    recorder.record([DEVICE, Start("a", at(0), "chat"), step(0, 1, "a", devices=("gpu:0", "gpu:7"))])
    recorder.record([Processes("gpu:7", at(1), 0.5), BackendState("chat", ("gpu:7",), at(1), loading=True)])
    recorder.close()
    _, _, recorded_step, state = recorded(trace)
    assert recorded_step == step(0, 1, "a")
    assert state == BackendState("chat", (), at(1), loading=True)


def test_full_files_become_backups_and_each_can_be_replayed_alone(trace: Path) -> None:
    recorder = Recorder(trace, max_bytes=4_000, backups=3)
    for event in history():
        recorder.record([event])
        if isinstance(event, Finish):
            recorder.flush()  # as the writer's thread does four times a second
    recorder.close()
    files = [trace, *(trace.with_name(f"{trace.name}.{n}") for n in (1, 2, 3))]
    assert sorted(trace.parent.iterdir()) == sorted(files)
    for file in files:
        assert file.stat().st_size <= 4_000
        out = io.StringIO()
        replay(file, out)
        assert '"residual_joules":0.000000' in out.getvalue()
    kept = [event for file in reversed(files) for event in recorded(file)]
    finishes = [event.request for event in kept if isinstance(event, Finish)]
    assert finishes == [f"r{number}" for number in range(60)][-len(finishes) :]


def test_requests_and_loadings_under_way_open_the_next_file(trace: Path) -> None:
    recorder = Recorder(trace, max_bytes=600, backups=1)
    loading = BackendState("painter", ("gpu:0",), at(0), loading=True)
    recorder.record([DEVICE, loading, Start("long", at(0), "chat")])
    recorder.record([event for n in range(20) for event in (sample(n, n), step(n, n + 0.5, "long"))])
    recorder.close()
    assert recorded(trace)[:3] == [DEVICE, loading, Start("long", at(0), "chat")]


def test_an_existing_trace_is_kept(trace: Path) -> None:
    for energy in (1.0, 2.0):
        recorder = Recorder(trace)
        recorder.record([DEVICE, sample(0, energy)])
        recorder.close()
    assert recorded(trace)[1] == sample(0, 2.0)
    assert recorded(trace.with_name("trace.jsonl.1"))[1] == sample(0, 1.0)


def test_only_the_owner_may_read_it(trace: Path) -> None:
    Recorder(trace).close()
    assert stat.S_IMODE(trace.stat().st_mode) == 0o600


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"cannot record to .*No such file"):
        Recorder(tmp_path / "absent" / "trace")


def test_a_full_queue_drops_the_bulk_counts_it_and_says_so_in_the_trace(trace: Path) -> None:
    recorder = Recorder(trace, queue_limit=3)
    flood = [event for n in range(10) for event in (sample(n, n), step(n, n + 0.5, "a"))]
    recorder.record([DEVICE, Start("a", at(0), "chat")])
    recorder.record(flood)
    recorder.record([Finish("a", at(20), "completed")])
    recorder.close()
    assert recorder.lost == 20
    assert recorded(trace) == [Loss("chat", 10), DEVICE, Start("a", at(0), "chat"), Finish("a", at(20), "completed")]


def test_a_full_disk_leaves_whole_lines_and_recording_goes_on(trace: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(trace)
    recorder.record([DEVICE, Start("a", at(0), "chat"), sample(0, 0)])
    recorder.flush()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (trace.stat().st_size + 100, before[1]))  # writes fail with EFBIG
    try:
        with caplog.at_level(logging.WARNING):
            recorder.record([step(n, n + 0.5, "a") for n in range(20)])
            recorder.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    recorder.record([sample(30, 30)])
    recorder.close()
    assert "cure:" in caplog.text
    assert recorder.lost == 20
    assert recorded(trace.with_name("trace.jsonl.1")) == [DEVICE, Start("a", at(0), "chat"), sample(0, 0)]
    assert recorded(trace) == [DEVICE, Start("a", at(0), "chat"), Loss("chat", 20), sample(30, 30)]


def test_many_threads_may_record_and_nothing_is_lost(trace: Path) -> None:
    recorder = Recorder(trace)
    recorder.record([DEVICE])

    def work(offset: int) -> None:
        for number in range(200):
            recorder.record([Start(f"{offset}-{number}", at(number), "chat")])

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    assert len(recorded(trace)) == 801


def test_a_recording_is_on_disk_without_being_closed(trace: Path) -> None:
    recorder = Recorder(trace)
    recorder.record([DEVICE])
    deadline = time.monotonic() + 20
    while trace.stat().st_size == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert trace.read_bytes() == encode(DEVICE)
    recorder.close()
    assert os.path.getsize(trace) == len(encode(DEVICE))
