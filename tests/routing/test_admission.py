"""Whose turn it is, and when a failed attempt is made again."""

import hypothesis.strategies as st
from hypothesis import given

from proxy.routing.admission import Admission
from proxy.routing.retries import RetryPolicy

POLICY = RetryPolicy(retries=2, retries_after_loss=1, pause=0.1, pause_cap=2.0, within=20.0)


def test_without_a_limit_everybody_goes() -> None:
    admission: Admission[int] = Admission(None, 0)
    assert [admission.arrive(who) for who in range(100)] == ["go"] * 100


def test_first_come_first_served_until_the_queue_is_full() -> None:
    admission: Admission[str] = Admission(1, 2)
    assert [admission.arrive(who) for who in "abcd"] == ["go", "wait", "wait", "full"]
    admission.give_up("b")
    assert admission.arrive("e") == "wait"
    assert [admission.leave(1.0), admission.leave(1.0), admission.leave(1.0)] == ["c", "e", None]
    assert admission.arrive("f") == "go"


def test_retry_after_follows_the_queue_and_the_time_requests_take() -> None:
    admission: Admission[int] = Admission(1, 10)
    quiet = admission.retry_after
    for who in range(11):
        admission.arrive(who)
    busy = admission.retry_after
    for _ in range(5):
        admission.leave(20.0)
    assert 1 <= quiet < busy
    assert admission.retry_after > busy


@given(st.integers(1, 4), st.integers(0, 4), st.lists(st.sampled_from(["arrive", "leave", "give up"])))
def test_the_bounds_hold_and_nobody_waits_while_there_is_room(limit: int, queue: int, events: list[str]) -> None:
    admission: Admission[int] = Admission(limit, queue)
    running, waiting = set[int](), list[int]()
    for who, event in enumerate(events):
        if event == "arrive":
            decision = admission.arrive(who)
            assert decision == ("go" if len(running) < limit else "wait" if len(waiting) < queue else "full")
            if decision == "go":
                running.add(who)
            elif decision == "wait":
                waiting.append(who)
        elif event == "leave" and running:
            running.pop()
            following = admission.leave(1.0)
            assert following == (waiting.pop(0) if waiting else None)
            running |= {following} if following is not None else set()
        elif event == "give up" and waiting:
            admission.give_up(waiting.pop())
        assert (admission.in_flight, admission.waiting) == (len(running), len(waiting))
        assert not waiting or len(running) == limit


def test_two_retries_and_one_of_a_request_that_a_backend_was_lost_over() -> None:
    def again(failures: int, *, lost: bool) -> bool:
        return POLICY.wait(failures, 0.0, 0.5, asked=0.0, lost=lost) is not None

    assert [again(failures, lost=False) for failures in (1, 2, 3)] == [True, True, False]
    assert [again(failures, lost=True) for failures in (1, 2)] == [True, False]


@given(st.integers(1, 2), st.floats(0, 100), st.floats(0, 1), st.floats(0, 100))
def test_no_retry_begins_late_or_before_the_backend_wants_it(
    failures: int, elapsed: float, chance: float, asked: float
) -> None:
    pause = POLICY.wait(failures, elapsed, chance, asked=asked, lost=False)
    if pause is not None:
        assert asked <= pause <= POLICY.pause_cap
        assert elapsed + pause <= POLICY.within
    else:
        assert asked > POLICY.pause_cap or elapsed + POLICY.pause_cap > POLICY.within


def test_higher_limits_let_in_those_who_wait_in_their_order() -> None:
    admission: Admission[str] = Admission(1, 9)
    for who in "abcd":
        admission.arrive(who)
    assert admission.limit(3, 9) == ["b", "c"]
    assert (admission.in_flight, admission.waiting) == (3, 1)
    assert admission.limit(None, 0) == ["d"]
    assert admission.arrive("e") == "go"


def test_lower_limits_send_nobody_away_and_hold_for_the_next() -> None:
    admission: Admission[str] = Admission(3, 9)
    for who in "abcde":
        admission.arrive(who)
    assert admission.limit(1, 1) == []
    assert admission.arrive("f") == "full"
    assert [admission.leave(1.0) for _ in range(3)] == [None, None, "d"]
    assert (admission.in_flight, admission.waiting) == (1, 1)
