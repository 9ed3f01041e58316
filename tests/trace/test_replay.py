import io
import json
from pathlib import Path
from typing import Any

import pytest

from proxy.replay import replay
from proxy.trace import TraceError

DEVICE = '{"type":"device","device":"gpu:0","name":"H100","meter":"nvml-counter"}'


def sample(at: float, energy: float) -> str:
    return json.dumps({"type": "sample", "device": "gpu:0", "at": at, "energy_joules": energy})


def step(started: float, ended: float, *requests: str) -> str:
    work = [{"request": request, "tokens": 1, "context": 10} for request in requests]
    return json.dumps(
        {"type": "step", "backend": "chat", "devices": ["gpu:0"], "started": started, "ended": ended, "work": work}
    )


def finish(request: str, at: float) -> str:
    return json.dumps({"type": "finish", "request": request, "at": at, "outcome": "completed"})


def replayed(tmp_path: Path, *lines: str) -> list[dict[str, Any]]:
    trace, out = tmp_path / "trace.jsonl", io.StringIO()
    trace.write_text("\n".join(lines) + "\n")
    replay(trace, out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_requests_come_as_they_settle_then_the_devices(tmp_path: Path) -> None:
    rows = replayed(
        tmp_path,
        DEVICE,
        sample(0, 100),
        step(0, 1, "a", "b"),
        finish("b", 1),
        sample(1, 200),
        step(1, 2, "a"),
        finish("a", 2),
        sample(2, 260),
    )
    assert [row.get("request") for row in rows] == ["b", "a", None]
    assert rows[-1]["device"] == "gpu:0"
    assert rows[-1]["counter_joules"] == 160
    assert rows[-1]["residual_joules"] == 0
    accounts = ("requests_joules", "idle_joules", "foreign_joules", "unattributed_joules")
    assert sum(rows[-1][name] for name in accounts) == pytest.approx(160, abs=1e-9)
    assert sum(row["energy_joules"] for row in rows[:-1]) == pytest.approx(rows[-1]["requests_joules"], abs=1e-6)


def test_a_request_without_finish_is_unfinished(tmp_path: Path) -> None:
    rows = replayed(tmp_path, DEVICE, sample(0, 0), step(0, 1, "a"), sample(1, 50))
    assert rows[0]["outcome"] == "unfinished"
    assert rows[0]["energy_joules"] > 0


def test_an_empty_trace_has_nothing_to_say(tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", io.StringIO()
    trace.write_text("")
    replay(trace, out)
    assert out.getvalue() == ""


def test_what_only_the_ledger_can_refuse_is_told_with_its_line(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join([DEVICE, sample(1e12, 5)]) + "\n")
    with pytest.raises(TraceError, match=r"trace\.jsonl:2: time is out of range"):
        replay(trace, io.StringIO())


def test_a_malformed_line_is_told_with_its_line(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join([DEVICE, sample(1, 5), '{"type":"sample"']) + "\n")
    with pytest.raises(TraceError, match=r"trace\.jsonl:3: "):
        replay(trace, io.StringIO())


def test_work_that_no_meter_ever_saw_has_no_figure_instead_of_a_false_zero(tmp_path: Path) -> None:
    """Before the first sample, after the last one, or on a device without any."""
    never = replayed(tmp_path, DEVICE, step(0, 1, "a"), finish("a", 1))
    late = replayed(tmp_path, DEVICE, sample(0, 0), step(0, 1, "b"), sample(1, 50), step(2, 3, "a"), finish("a", 3))
    early = replayed(tmp_path, DEVICE, step(0, 1, "a"), finish("a", 1), sample(2, 0), step(2, 3, "b"), sample(3, 50))
    for rows in (never, late, early):
        [a] = [row for row in rows if row.get("request") == "a"]
        assert (a["energy_joules"], a["low_joules"], a["high_joules"], a["devices"]) == (None, None, None, {})
        assert rows[-1]["residual_joules"] == 0


def test_half_a_figure_is_none(tmp_path: Path) -> None:
    host = '{"type":"device","device":"host","name":"CPU","meter":"rapl"}'
    both = step(0, 1, "a").replace('["gpu:0"]', '["gpu:0", "host"]')
    [a, *_] = replayed(tmp_path, DEVICE, host, sample(0, 0), both, finish("a", 1), sample(1, 50))
    assert (a["energy_joules"], a["devices"]) == (None, {"gpu:0": 50})


def test_a_request_whose_backend_tells_nothing_has_no_figure(tmp_path: Path) -> None:
    started = '{"type":"start","request":"a","at":0,"backend":"silent"}'
    [a, *_] = replayed(tmp_path, DEVICE, started, sample(0, 0), finish("a", 1), sample(1, 50))
    assert (a["energy_joules"], a["devices"]) == (None, {})


def test_a_request_that_did_nothing_used_nothing(tmp_path: Path) -> None:
    [a, *_] = replayed(tmp_path, DEVICE, sample(0, 0), finish("a", 1), sample(1, 50))
    assert (a["energy_joules"], a["devices"]) == (0, {})
