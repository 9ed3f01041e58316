"""What the ledger does with small histories whose answer is plain."""

import tracemalloc

import pytest

from proxy.energy.attribution import Attribution
from proxy.energy.events import (
    BackendState,
    Device,
    Event,
    Finish,
    Loss,
    Model,
    Processes,
    Start,
    Step,
)
from proxy.energy.ledger import EventError, Ledger
from proxy.energy.quantities import Microjoules, Nanoseconds
from tests.energy.histories import GPU, HOST, at, sample, step

JOULE = 1_000_000


def told(ledger: Ledger, *events: Event) -> Ledger:
    for event in events:
        ledger.apply(event)
    return ledger


def closed(ledger: Ledger) -> dict[str, Attribution]:
    ledger.close()
    return {attribution.request: attribution for attribution in ledger.drain()}


def energy(attribution: Attribution, device: str = "gpu:0") -> float:
    return attribution.devices[device].active / JOULE


def start(request: str, when: float, backend: str = "chat") -> Start:
    return Start(request, at(when), backend)


def finish(request: str, when: float) -> Finish:
    return Finish(request, at(when), "completed")


def calibrated(*, known_only: bool = False) -> Ledger:
    """A ledger that has seen ten idle seconds of 100 W, until 10 s and 1000 J."""
    return told(Ledger(known_only=known_only), GPU, *(sample("gpu:0", i / 2, i * 50.0) for i in range(21)))


# --- who gets what ---


def test_a_request_alone_in_a_window_gets_all_of_it() -> None:
    ledger = told(Ledger(), GPU, sample("gpu:0", 0, 0), step(0, 1, {"a": 10}), sample("gpu:0", 1, 100), finish("a", 1))
    [a] = closed(ledger).values()
    assert (energy(a), a.method, a.outcome) == (100.0, "measured-steps", "completed")
    assert a.devices["gpu:0"].low < 100 * JOULE < a.devices["gpu:0"].high


def test_equal_work_gets_equal_shares() -> None:
    ledger = told(Ledger(), GPU, sample("gpu:0", 0, 0), step(0, 1, {"a": 10, "b": 10}), sample("gpu:0", 1, 101))
    requests = closed(ledger)
    assert energy(requests["a"]) == energy(requests["b"]) == 50.5


def test_several_participants_of_one_request_belong_to_it() -> None:
    both = Step("chat", ("gpu:0",), at(0), at(1), ["a", "a", "b"], [1, 1, 1], [9, 9, 9])
    requests = closed(told(Ledger(), GPU, sample("gpu:0", 0, 0), both, sample("gpu:0", 1, 90)))
    assert energy(requests["a"]) == pytest.approx(60)


def test_more_work_gets_more() -> None:
    work = {"long": (2000, 2000), "short": (10, 10)}
    requests = closed(told(Ledger(), GPU, sample("gpu:0", 0, 0), step(0, 1, work), sample("gpu:0", 1, 100)))
    assert energy(requests["long"]) > 3 * energy(requests["short"])


def test_a_gap_is_idle_at_the_calibrated_power() -> None:
    ledger = told(calibrated(), step(10, 10.5, {"a": 5}), sample("gpu:0", 11, 1250), finish("a", 10.6))
    [a] = closed(ledger).values()
    [gpu] = ledger.devices()
    assert gpu.idle_power == pytest.approx(100)
    assert energy(a) == pytest.approx(200, rel=0.25)
    assert gpu.idle / JOULE == pytest.approx(1050, rel=0.06)


def test_without_steps_everything_is_idle() -> None:
    ledger = calibrated()
    ledger.close()
    [gpu] = ledger.devices()
    assert (gpu.idle, gpu.requests, gpu.pending) == (1000 * JOULE, 0, 0)


def test_work_of_nobody_known_is_unattributed() -> None:
    ledger = told(Ledger(known_only=True), GPU, start("a", 0), sample("gpu:0", 0, 0))
    told(ledger, step(0, 1, {"a": 1, "stranger": 1, "": 1}), sample("gpu:0", 1, 90))
    requests = closed(ledger)
    [gpu] = ledger.devices()
    assert set(requests) == {"a"}
    assert (energy(requests["a"]), gpu.unattributed / JOULE) == pytest.approx((30, 60))


def test_a_step_without_participants_is_unattributed() -> None:
    ledger = told(Ledger(), GPU, sample("gpu:0", 0, 0), step(0, 1, {}), sample("gpu:0", 1, 90))
    ledger.close()
    assert ledger.devices()[0].unattributed == 90 * JOULE


def test_loading_is_unattributed_not_idle() -> None:
    ledger = told(calibrated(), BackendState("chat", ("gpu:0",), at(10), True), sample("gpu:0", 12, 1500))
    told(ledger, BackendState("chat", ("gpu:0",), at(12), False), sample("gpu:0", 13, 1600))
    ledger.close()
    [gpu] = ledger.devices()
    assert (gpu.unattributed / JOULE, gpu.idle / JOULE) == pytest.approx((500, 1100))


def test_what_another_process_used_is_foreign() -> None:
    ledger = told(Ledger(), GPU, sample("gpu:0", 0, 0), Processes("gpu:0", at(0), 0.25), step(0, 1, {"a": 1}))
    told(ledger, Processes("gpu:0", at(1), 0.25), sample("gpu:0", 1, 100))
    [a] = closed(ledger).values()
    assert (energy(a), ledger.devices()[0].foreign / JOULE) == (75, 25)


def test_cpu_time_prices_the_split_between_backends_on_the_host() -> None:
    ledger = told(Ledger(), HOST, sample("host", 0, 0), Processes("host", at(0), 0.0))
    told(ledger, step(0, 1, {"a": 1}, backend="chat", devices=("host",)))
    told(ledger, step(0, 1, {"b": 1}, backend="painter", devices=("host",)))
    told(ledger, Processes("host", at(1), 0.2, {"chat": 0.6, "painter": 0.2}), sample("host", 1, 100))
    requests = closed(ledger)
    assert (energy(requests["a"], "host"), energy(requests["b"], "host")) == pytest.approx((60, 20))
    assert requests["a"].method == "estimated"


def test_the_proxys_own_work_is_shared_equally_and_does_not_touch_the_method() -> None:
    ledger = told(Ledger(known_only=True), GPU, HOST, start("a", 0), start("b", 0))
    told(ledger, sample("gpu:0", 0, 0), sample("host", 0, 0), step(0, 1, {"a": 9, "b": 1}))
    told(ledger, step(0, 1, {"a": 1, "b": 1}, backend="proxy", devices=("host",), source="relay"))
    told(ledger, sample("gpu:0", 1, 100), sample("host", 1, 20), finish("a", 1), finish("b", 1))
    requests = closed(ledger)
    assert (energy(requests["a"], "host"), energy(requests["b"], "host")) == (10, 10)
    assert requests["a"].method == "measured-steps"


def test_one_backend_on_several_devices_has_each_devices_window_split_alone() -> None:
    second = Device("gpu:1", "H100", "nvml-counter")
    ledger = told(Ledger(), GPU, second, sample("gpu:0", 0, 0), sample("gpu:1", 0, 0))
    told(ledger, step(0, 1, {"a": 1, "b": 1}, devices=("gpu:0", "gpu:1")))
    told(ledger, sample("gpu:0", 1, 100), sample("gpu:1", 1, 60))
    a = closed(ledger)["a"]
    assert (energy(a, "gpu:0"), energy(a, "gpu:1")) == (50, 30)


# --- windows ---


def test_polls_that_see_no_change_extend_the_window() -> None:
    polls = [sample("gpu:0", i / 10, 0) for i in range(10)]
    ledger = told(Ledger(), GPU, *polls, step(0, 1, {"a": 1}), sample("gpu:0", 1, 100), finish("a", 1))
    assert energy(closed(ledger)["a"]) == 100


def test_a_request_shorter_than_a_tick_gets_a_share_and_a_wide_interval() -> None:
    ledger = told(calibrated(known_only=True), start("a", 10.40), finish("a", 10.42))
    told(ledger, step(10.40, 10.42, {"a": 5}), sample("gpu:0", 10.5, 1055))
    [a] = closed(ledger).values()
    share = a.devices["gpu:0"]
    assert share.low > 0 or share.active > 0
    assert share.high - share.low > 0.5 * share.active > 0


def test_a_counter_reset_begins_a_new_epoch_and_is_no_false_zero() -> None:
    ledger = told(calibrated(), step(10, 11, {"a": 5}), sample("gpu:0", 11, 7), step(11, 12, {"b": 5}))
    told(ledger, sample("gpu:0", 12, 307), finish("a", 11), finish("b", 12))
    requests = closed(ledger)
    assert ledger.devices()[0].counter == 1300 * JOULE
    assert energy(requests["b"]) == 300
    assert requests["a"].devices["gpu:0"].active == 0
    assert requests["a"].devices["gpu:0"].high > 0


def test_dropped_samples_make_one_long_window_and_lose_nothing() -> None:
    ledger = told(calibrated(), *(step(10 + i, 11 + i, {"a": 5}) for i in range(8)), sample("gpu:0", 18, 3400))
    assert energy(closed(ledger)["a"]) == pytest.approx(2400)


def test_stale_and_repeated_samples_change_nothing() -> None:
    ledger = told(calibrated(), sample("gpu:0", 3, 1), sample("gpu:0", 10, 1000), sample("gpu:0", 10, 1200))
    assert ledger.devices()[0].counter == 1000 * JOULE


# --- when requests settle ---


def test_a_request_settles_when_its_last_window_has() -> None:
    ledger = told(calibrated(known_only=True), start("a", 10), step(10, 10.4, {"a": 5}), finish("a", 10.4))
    assert ledger.drain() == []
    provisional = ledger.attribution("a")
    assert provisional is not None
    assert not provisional.settled
    told(ledger, sample("gpu:0", 10.5, 1120), sample("gpu:0", 11.0, 1170), sample("gpu:0", 11.5, 1220))
    settled = ledger.attribution("a")
    assert settled is not None
    assert settled.settled
    assert ledger.drain() == [settled]
    assert ledger.attribution("a") is None
    assert ledger.drain() == []


def test_a_window_waits_for_the_report_of_open_work() -> None:
    ledger = told(calibrated(known_only=True), start("a", 10), step(10, 10.4, {"a": 5}), sample("gpu:0", 11, 1300))
    told(ledger, sample("gpu:0", 12, 1600), sample("gpu:0", 20, 4000))
    assert ledger.devices()[0].pending == 3000 * JOULE
    told(ledger, step(10.4, 20, {"a": 5}))
    assert ledger.devices()[0].pending == 0


def test_after_thirty_seconds_a_window_settles_whatever_is_missing_and_late_work_is_lost() -> None:
    ledger = told(calibrated(known_only=True), start("a", 10), start("b", 10), step(10, 11, {"a": 5, "b": 5}))
    told(ledger, sample("gpu:0", 11, 1300), sample("gpu:0", 12, 1600), sample("gpu:0", 41.9, 4600))
    assert ledger.devices()[0].pending == 3300 * JOULE
    ledger.advance(at(42.1))
    assert ledger.devices()[0].pending == 3000 * JOULE
    before = ledger.attribution("b")
    told(ledger, step(11, 12, {"b": 5}))
    after = ledger.attribution("b")
    assert before is not None
    assert after is not None
    assert after.devices["gpu:0"].active == before.devices["gpu:0"].active
    assert after.devices["gpu:0"].high > before.devices["gpu:0"].high


def test_a_relayed_backend_is_waited_for_request_by_request() -> None:
    ledger = told(calibrated(known_only=True), start("a", 10), start("b", 10))
    told(ledger, step(10, 10.2, {"b": 5}, source="relay"), step(10, 11, {"a": 5}, source="relay"))
    told(ledger, sample("gpu:0", 10.5, 1200), sample("gpu:0", 11, 1400))
    assert ledger.devices()[0].pending == 400 * JOULE
    told(ledger, step(10.2, 11.2, {"b": 5}, source="relay"))
    assert ledger.devices()[0].pending == 0


def test_in_a_replay_a_step_may_come_after_the_samples_that_cover_it() -> None:
    ledger = told(Ledger(), GPU, sample("gpu:0", 0, 0), sample("gpu:0", 1, 100), sample("gpu:0", 2, 300))
    told(ledger, finish("b", 2), step(0, 1, {"a": 1}), step(1, 2, {"a": 1, "b": 1}), finish("a", 2))
    requests = closed(ledger)
    assert (energy(requests["a"]), energy(requests["b"])) == (200, 100)
    assert requests["b"].backend == "chat"


def test_a_stopped_meter_does_not_hold_requests_for_ever() -> None:
    ledger = told(calibrated(known_only=True), start("a", 10), step(10, 11, {"a": 5}), finish("a", 11))
    ledger.advance(at(40))
    assert ledger.drain() == []
    ledger.advance(at(42))
    [a] = ledger.drain()
    assert a.settled


def test_at_the_end_of_the_file_everything_settles() -> None:
    ledger = told(Ledger(), GPU, sample("gpu:0", 0, 0), step(0, 1, {"a": 1, "b": 1}), sample("gpu:0", 1, 100))
    told(ledger, finish("b", 1))
    requests = closed(ledger)
    assert list(requests) == ["b", "a"]
    assert (requests["a"].outcome, requests["b"].outcome) == ("unfinished", "completed")


def test_a_request_that_never_finishes_does_not_hold_others() -> None:
    ledger = told(Ledger(known_only=True), GPU, start("stuck", 0), start("a", 0), sample("gpu:0", 0, 0))
    for i in range(40):
        told(ledger, step(i, i + 1, {"a": 1}), sample("gpu:0", i + 1, 100 * (i + 1)))
    told(ledger, finish("a", 40), sample("gpu:0", 41, 4100), sample("gpu:0", 72, 4200))
    assert [attribution.request for attribution in ledger.drain()] == ["a"]


def test_duplicates_count_once() -> None:
    first = step(0, 1, {"a": 1, "b": 1})
    ledger = told(Ledger(), GPU, sample("gpu:0", 0, 0), first, first, step(0, 1, {"a": 1, "b": 1}))
    told(ledger, step(0, 1, {"c": 1}), sample("gpu:0", 1, 90), finish("a", 1), finish("a", 5))
    requests = closed(ledger)
    assert energy(requests["a"]) == pytest.approx(energy(requests["b"]))
    assert requests["a"].ended == at(1)


def test_a_settled_id_does_not_open_again_by_a_late_step() -> None:
    ledger = told(Ledger(), GPU, sample("gpu:0", 0, 0), step(0, 1, {"a": 1}), finish("a", 1), sample("gpu:0", 1, 100))
    told(ledger, step(1, 3, {"b": 1}), sample("gpu:0", 3, 300))
    assert [attribution.request for attribution in ledger.drain()] == ["a"]
    told(ledger, step(2.9, 4, {"a": 1}), step(3, 4, {"b": 1}), sample("gpu:0", 4, 400))
    assert set(closed(ledger)) == {"b"}


# --- what cannot be told ---


def test_no_meter_at_all_settles_at_once_without_figures() -> None:
    ledger = told(Ledger(known_only=True), start("a", 0), step(0, 1, {"a": 1}), finish("a", 1))
    [a] = ledger.drain()
    assert (dict(a.devices), a.settled) == ({}, True)


def test_a_backend_that_reports_and_had_nothing_for_a_request_did_nothing_for_it() -> None:
    ledger = told(calibrated(known_only=True), start("a", 10), start("b", 10), step(10, 11, {"a": 5}))
    told(ledger, finish("b", 10.5), finish("a", 11), sample("gpu:0", 11, 1300), sample("gpu:0", 12, 1400))
    requests = closed(ledger)
    assert requests["b"].devices["gpu:0"].active == requests["b"].devices["gpu:0"].high == 0
    assert requests["b"].method == "measured-steps"


def test_a_backend_that_never_reports_leaves_its_requests_without_figures() -> None:
    ledger = told(calibrated(known_only=True), start("a", 10, "elsewhere"), finish("a", 11))
    told(ledger, sample("gpu:0", 11.2, 1120), sample("gpu:0", 12, 1200))
    [a] = ledger.drain()
    assert (dict(a.devices), a.method) == ({}, "measured-window")


def test_lost_reports_widen_the_interval() -> None:
    def width(*losses: Event) -> int:
        ledger = told(calibrated(known_only=True), start("a", 10), step(10, 11, {"a": 5, "": 5}), *losses)
        [a] = closed(told(ledger, finish("a", 11), sample("gpu:0", 11, 1300))).values()
        return a.devices["gpu:0"].high - a.devices["gpu:0"].low

    assert width(Loss("chat", 1)) > width() + 50 * JOULE


@pytest.mark.parametrize(
    ("source", "tokens", "method"),
    [("engine", 5, "measured-steps"), ("relay", 5, "measured-tokens"), ("relay", 0, "measured-window")],
)
def test_the_method_is_the_worst_source(source: str, tokens: int, method: str) -> None:
    virtual = Step(
        "chat", ("gpu:0",), at(0), at(1), ["a"], [tokens], [tokens], "relay" if source == "relay" else "engine"
    )
    assert closed(told(Ledger(), GPU, sample("gpu:0", 0, 0), virtual, sample("gpu:0", 1, 9)))["a"].method == method


def test_estimated_only_if_every_meter_is() -> None:
    ledger = told(Ledger(), GPU, HOST, sample("gpu:0", 0, 0), sample("host", 0, 0))
    told(ledger, step(0, 1, {"a": 1}, devices=("gpu:0", "host")), step(0, 1, {"b": 1}, devices=("host",), backend="x"))
    told(ledger, sample("gpu:0", 1, 100), sample("host", 1, 50))
    requests = closed(ledger)
    assert (requests["a"].method, requests["b"].method) == ("measured-steps", "estimated")


def test_a_figure_before_anything_is_known_of_a_device_may_be_anything_possible() -> None:
    ledger = told(Ledger(known_only=True), GPU, start("a", 0), sample("gpu:0", 0, 0), step(0.001, 0.002, {"a": 5}))
    a = told(ledger, finish("a", 0.002)).attribution("a")
    assert a is not None
    share = a.devices["gpu:0"]
    assert share.low == 0
    assert share.high / JOULE == pytest.approx(1500 * 0.001, rel=0.01)


def test_an_answer_that_overtakes_its_only_step_report_is_no_silent_zero() -> None:
    ledger = told(calibrated(known_only=True), start("a", 9), step(9, 9.9, {"a": 5}), finish("a", 9.9))
    b = told(ledger, start("b", 10), finish("b", 10.01)).attribution("b")
    assert b is not None
    share = b.devices["gpu:0"]
    assert 0 == share.low < share.active < share.high
    told(ledger, step(10, 10.01, {"b": 5}), sample("gpu:0", 10.5, 1060))
    assert share.low <= closed(ledger)["b"].devices["gpu:0"].active <= share.high


# --- idle, marginal, full ---


def test_idle_power_is_never_learnt_while_something_runs() -> None:
    ledger = told(Ledger(known_only=True), GPU, start("a", 0), *(sample("gpu:0", i, 5.0 * i) for i in range(20)))
    told(ledger, Processes("gpu:0", at(19), 0.5), finish("a", 19))
    told(ledger, *(sample("gpu:0", i, 100 + 5.0 * i) for i in range(20, 24)))
    ledger.close()
    assert ledger.devices()[0].idle_power != pytest.approx(5, rel=0.1)


def test_marginal_leaves_out_the_idle_power() -> None:
    ledger = told(calibrated(), step(10, 11, {"a": 5, "b": 5}), sample("gpu:0", 11, 1400), finish("a", 11))
    share = closed(ledger)["a"].devices["gpu:0"]
    assert (share.active, share.marginal) == (200 * JOULE, 150 * JOULE)


def test_full_adds_idle_once_a_minute_was_busy() -> None:
    ledger = told(calibrated(), *(sample("gpu:0", 10 + i, 1000 + 100 * i) for i in range(1, 61)))
    told(ledger, step(70, 110, {"a": 5}), sample("gpu:0", 110, 15000), finish("a", 110))
    told(ledger, step(110, 150, {"b": 5}), sample("gpu:0", 150, 23000), finish("b", 150), sample("gpu:0", 151, 23100))
    requests = closed(ledger)
    assert requests["a"].devices["gpu:0"].full is None
    share = requests["b"].devices["gpu:0"]
    assert share.full == pytest.approx(share.active * (1 + 7000 / 16000), rel=0.02)


def test_meanwhile_is_all_that_the_device_used() -> None:
    ledger = told(calibrated(known_only=True), start("a", 10.5), step(10, 12, {"a": 5, "": 5}), finish("a", 11.5))
    told(ledger, sample("gpu:0", 11, 1200), sample("gpu:0", 12, 1400))
    assert closed(ledger)["a"].devices["gpu:0"].meanwhile == pytest.approx(200 * JOULE)


# --- bad input ---


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (sample("gpu:7", 1, 1), "unknown device: gpu:7"),
        (step(0, 1, {"a": 1}, devices=("gpu:7",)), "unknown device: gpu:7"),
        (Step("chat", ("gpu:0",), at(2), at(1), ["a"], [1], [1]), "ends before it begins"),
        (Step("chat", ("gpu:0",), at(0), at(1), ["a"], [1, 2], [1]), "different lengths"),
        (Step("chat", ("gpu:0",), at(0), at(1), ["a"], [-1], [1]), "negative work"),
        (Step("chat", ("gpu:0",), at(0), at(1), ["a", "b"], [1, 1], [1, -1]), "negative work"),
        (Step("chat", ("gpu:0",), at(0), at(1), ["a", "b"], [1, 2**70], [1, 1]), "implausibly much"),
        (Step("chat", ("gpu:0",), at(0), at(1), ["a"], [1], [2**54]), "implausibly much"),
        (sample("gpu:0", 11, -5), "out of range"),
        (sample("gpu:0", 1e30, 5), "out of range"),
        (Processes("gpu:0", at(1), 1.5), "0..1"),
        (Processes("gpu:0", at(1), float("nan")), "0..1"),
        (Start("", at(1), "chat"), "needs an id"),
        (Finish("", at(1), "completed"), "unknown request"),
        (Loss("chat", -1), "cannot be -1"),
        (Model("chat", "gpu:0", {"token": float("inf")}), "finite"),
        (Model("chat", "gpu:7", {"token": 1.0}), "unknown device"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason_and_does_no_harm(event: Event, reason: str) -> None:
    ledger = told(calibrated(), step(10, 11, {"a": 1}))
    before = ledger.devices()
    with pytest.raises(EventError, match=reason):
        ledger.apply(event)
    assert ledger.devices() == before
    told(ledger, sample("gpu:0", 11, 1300))
    assert energy(closed(ledger)["a"]) == 300


def test_live_steps_may_name_devices_without_a_meter() -> None:
    ledger = told(Ledger(known_only=True), GPU, start("a", 0), sample("gpu:0", 0, 0))
    told(ledger, step(0, 1, {"a": 1}, devices=("gpu:0", "host")), sample("gpu:0", 1, 50), finish("a", 1))
    assert set(closed(ledger)["a"].devices) == {"gpu:0"}


def test_a_finish_of_an_unknown_request_is_refused_live_and_is_a_request_without_work_in_a_replay() -> None:
    with pytest.raises(EventError, match="unknown request"):
        Ledger(known_only=True).apply(finish("a", 1))
    [a] = closed(told(Ledger(), finish("a", 1))).values()
    assert (a.outcome, dict(a.devices)) == ("completed", {})


def test_enormous_figures_stay_exact() -> None:
    huge = Microjoules(2**60 + 12345)
    ledger = told(Ledger(), GPU, sample("gpu:0", 0, 0), step(0, 1, {"a": 7, "b": 1, "c": 3}))
    ledger.apply(type(sample("gpu:0", 1, 0))("gpu:0", Nanoseconds(at(1)), huge))
    requests = closed(ledger)
    assert sum(a.devices["gpu:0"].active for a in requests.values()) == huge
    assert ledger.devices()[0].residual == 0


def test_a_stream_and_a_whole_answer_of_as_many_tokens_cost_alike() -> None:
    """The relay sees the one in groups of tokens, the other only at its end."""
    ledger = told(Ledger(known_only=True), GPU, start("stream", 0), start("whole", 0), sample("gpu:0", 0, 0))
    for quarter in range(8):
        group = {"stream": (5, 105 + 5 * quarter)}
        told(ledger, step(quarter / 4, quarter / 4 + 0.25, group, source="relay"))
    told(ledger, step(0, 2, {"whole": (40, 140)}, source="relay"), finish("stream", 2), finish("whole", 2))
    told(ledger, *(sample("gpu:0", 0.5 * (i + 1), 50.0 * (i + 1)) for i in range(4)))
    requests = closed(ledger)
    assert energy(requests["stream"]) == pytest.approx(energy(requests["whole"]), rel=0.1)


def test_a_backend_that_waits_in_silence_is_given_up_after_thirty_seconds_and_is_idle_then() -> None:
    ledger = told(
        calibrated(known_only=True), start("a", 10), *(sample("gpu:0", 10 + i, 1000 + 100 * i) for i in range(1, 50))
    )
    balance = ledger.devices()[0]
    assert balance.idle == (59 - 30) * 100 * JOULE
    assert balance.pending == 30 * 100 * JOULE


def test_while_a_meter_is_silent_what_is_kept_does_not_grow_with_time() -> None:
    ledger = told(Ledger(known_only=True), GPU, *(sample("gpu:0", i / 2, i * 50.0) for i in range(5)))
    sizes, batch, count = [], 64, 0
    tracemalloc.start()
    for second in range(2, 182):
        names = [f"r{count + i}" for i in range(batch)]
        count += batch
        told(ledger, *(start(name, second) for name in names))
        for part in range(100):
            begun = second + part / 100
            told(ledger, step(begun, begun + 0.01, dict.fromkeys(names, 1)))
        told(ledger, *(finish(name, second + 1) for name in names))
        ledger.advance(at(second + 1))
        ledger.drain()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(sizes[120:]) < 1.25 * max(sizes[60:120])
    told(ledger, sample("gpu:0", 182, 20_000), sample("gpu:0", 182.5, 20_050))
    ledger.close()
    [balance] = ledger.devices()
    assert balance.residual == 0
    assert balance.unattributed > 0.5 * balance.counter
